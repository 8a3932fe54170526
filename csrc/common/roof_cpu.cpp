// The roofs of each instruction set.
#include "roof.h"

#include "parallel.h"
#include "scratch.h"
#include "tile.h"

namespace llamakern::LK_ISA {

constexpr int kAccumulators = kTileVecs * kTileRows;  // the register tile's: they must hide the same latency
constexpr int64_t kPage = 4096, kPiece = 512 * 1024;  // pieces: small enough to even out the threads
constexpr int64_t kAhead = 4 * kPage;                 // bytes; the hardware's own prefetch stops at each page's end

template <typename W>
static float spin(int64_t rounds, float a, float b) {
  Vec acc[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = broadcast(a + float(i));  // all different: equal ones would be one
  const IVec lanes = bits_as_int(broadcast(a)), row = bits_as_int(broadcast(b));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) acc[i] = W::dot(acc[i], lanes, row);
  Vec total = acc[0];
  for (int i = 1; i < kAccumulators; ++i) total += acc[i];
  return sum(total);
}

template <typename W>
static void spin_all(const MultiplyAdds& p) {
  Scratch<float> results(p.tasks);  // written, so that no round can be left out
  parallel_for(p.tasks, [&](int64_t task) { results[task] = spin<W>(p.rounds, float(task), 1.0f); });
  *p.flops = 2 * W::kPer * kLanes * kAccumulators * p.tasks * p.rounds;
}

static void multiply_adds(const MultiplyAdds& p) { p.pairs ? spin_all<Words<bfloat16>>(p) : spin_all<FloatWords>(p); }

static int32_t read_piece(const char* p, int64_t bytes) {
  constexpr int kWidth = 4 * kLanes;
  IVec total[8] = {};
  for (int64_t i = 0; i < bytes; i += 8 * kWidth) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < 8 * kWidth; line += 64) __builtin_prefetch(p + i + kAhead + line);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) total[v] += load_words(reinterpret_cast<const uint32_t*>(p + i + v * kWidth));
  }
  int32_t sum = 0;
  for (const IVec& words : total)
    for (int lane = 0; lane < kLanes; ++lane) sum ^= words[lane];
  return sum;
}

static void read_memory(const ReadMemory& p) {
  const char* from = static_cast<const char*>(p.from);
  Scratch<int32_t> sums(ceil_div(p.bytes, kPiece));
  parallel_ranges(p.bytes, kPiece,
                  [&](int64_t begin, int64_t end) { sums[begin / kPiece] = read_piece(from + begin, end - begin); });
  *p.sum = 0;
  for (int64_t i = 0; i < ceil_div(p.bytes, kPiece); ++i) *p.sum ^= sums[i];
}

static void copy_memory(const CopyMemory& p) {
  const uint32_t* from = static_cast<const uint32_t*>(p.from);
  uint32_t* to = static_cast<uint32_t*>(p.to);
  parallel_ranges(p.bytes / 4, kPiece / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 2 * kLanes) {
      const IVec first = load_words(from + i), second = load_words(from + i + kLanes);
      store_words(to + i, first);
      store_words(to + i + kLanes, second);
    }
  });
}

LK_KERNEL(MultiplyAdds, multiply_adds);
LK_KERNEL(ReadMemory, read_memory);
LK_KERNEL(CopyMemory, copy_memory);

}  // namespace llamakern::LK_ISA
