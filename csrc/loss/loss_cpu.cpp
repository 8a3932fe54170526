// Linear cross-entropy on the CPU. Tokens that count are gathered into chunks. A chunk's scores appear block by block
// of the vocabulary and leave exponentials relative to the block's largest score; when all blocks are known these
// become P, which is packed as the matmuls for dh and dW want it. Only one chunk's P is ever in memory.
#include "loss.h"

#include "../common/gemm.h"

namespace llamakern::LK_ISA {

constexpr int64_t kChunkBytes = int64_t(32) << 20;  // of P, see linear_cross_entropy
constexpr int64_t kVocabBlock = kPanelRows;         // vocabulary rows of one block

// Element k of each word.
template <typename W>
static Vec element(IVec words, int k) {
  if constexpr (W::kPer == 1) return bits_as_float(words);
  return bits_as_float(k == 0 ? words << 16 : words & ibroadcast(int32_t(0xffff0000)));
}

// Tokens of one chunk, and for each what the softmax needs. Lanes that hold no token have g = 0.
template <typename T, int MV>
struct Chunk {
  using W = Words<T>;
  static constexpr int64_t width = kWidth<MV>;
  const LinearCrossEntropy<T>& p;
  const int64_t* tokens;  // rows of h
  const int64_t count, lanes = round_up(count, width), strips = lanes / width;
  const int64_t blocks = ceil_div(p.V, kVocabBlock), words = words_of<W>(p.V);
  const bool backward = p.dh || p.dw;

  Scratch<T> h{count * p.C};                                  // [count][C]
  Scratch<float> top{blocks * lanes}, total{blocks * lanes};  // [block][lane]: largest score, Σ exp(score - largest)
  Scratch<float> score{lanes}, loss{lanes}, g{lanes};         // of the label; of the token; its gradient
  Scratch<uint32_t> probs{backward ? lanes * words : 0};      // [strip][word][lane]: first exp(score - largest), then P

  Chunk(const LinearCrossEntropy<T>& p, const int64_t* tokens, int64_t count) : p(p), tokens(tokens), count(count) {}

  int64_t label(int64_t lane) const { return lane < count ? p.labels[tokens[lane]] : -1; }
  uint32_t* word(int64_t lane, int64_t v) {
    return probs.get() + (lane / width * words + v / W::kPer) * width + lane % width;
  }
  int64_t end_of_strip(int64_t strip) const { return min64((strip + 1) * width, round_up(count, kLanes)); }
  int64_t end_of(int64_t block) const { return min64(p.V, (block + 1) * kVocabBlock); }
};

template <typename T>
static void gather(T* h, const LinearCrossEntropy<T>& p, const int64_t* tokens, int64_t count) {
  parallel_ranges(count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) memcpy(h + i * p.C, p.h + tokens[i] * p.h_row, size_t(p.C) * sizeof(T));
  });
}

// What one block of scores c [rows of the block][width] leaves of a strip.
template <typename T, int MV>
static void take_scores(Chunk<T, MV>& k, const float* c, int64_t block, int64_t strip) {
  using W = Words<T>;
  constexpr int64_t width = kWidth<MV>;
  const int64_t first = block * kVocabBlock, rows = k.end_of(block) - first;
  for (int64_t lane = strip * width; lane < k.end_of_strip(strip); lane += kLanes, c += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t row = k.label(lane + i) - first;
      if (row >= 0 && row < rows) k.score[lane + i] = c[row * width + i];
    }
    Vec top = load(c), total{};
    for (int64_t r = 1; r < rows; ++r) top = max(top, load(c + r * width));
    for (int64_t r = 0; r < rows; r += W::kPer) {
      const Vec e = exp(load(c + r * width) - top);
      const Vec next = W::kPer == 2 && r + 1 < rows ? exp(load(c + (r + 1) * width) - top) : Vec{};
      total += e + next;
      if (k.backward) store_words(k.word(lane, first + r), W::join(e, next));
    }
    store(k.top + block * k.lanes + lane, top);
    store(k.total + block * k.lanes + lane, total);
  }
}

template <typename T, int MV>
static void scores(Chunk<T, MV>& k) {
  using W = Words<T>;
  constexpr int64_t width = kWidth<MV>;
  const int64_t words = words_of<W>(k.p.C);
  Scratch<uint32_t> lanes(packed_size<W, MV>(k.count, k.p.C));
  pack_rows<W, MV>(lanes, k.h.get(), k.p.C, k.count, k.p.C);
  const Segment segment{lanes.get(), words, DenseRows<W, T>{k.p.w, k.p.w_row, k.p.C}};
  parallel_for(k.blocks, [&](int64_t block) {
    const int64_t rows = k.end_of(block) - block * kVocabBlock, c_strip = padded_rows(rows) * width;
    Scratch<uint32_t> panel(kPanelRows * kBlockWords);
    Scratch<float> c(min64(k.strips, kGroupStrips<MV>) * c_strip);
    for (int64_t strip = 0; strip < k.strips; strip += kGroupStrips<MV>) {
      const int64_t here = min64(k.strips - strip, kGroupStrips<MV>);
      bool add = false;
      accumulate<W, MV, Panel::kByRow>(c, add, panel, segment, strip, here, k.count - strip * width,
                                       block * kVocabBlock, rows);
      if (!add) memset(c, 0, size_t(here * c_strip) * 4);  // C = 0
      for (int64_t s = 0; s < here; ++s) take_scores(k, c + s * c_strip, block, strip + s);
    }
  });
}

// The losses; `total` becomes what turns a block's exponentials into P: g·exp(largest of the block) / Σ_v exp(z_v).
template <typename T, int MV>
static void losses(Chunk<T, MV>& k) {
  parallel_for(ceil_div(k.count, kLanes), [&](int64_t vec) {
    const int64_t lane = vec * kLanes;
    Vec top = load(k.top + lane), sum{};
    for (int64_t b = 1; b < k.blocks; ++b) top = max(top, load(k.top + b * k.lanes + lane));
    for (int64_t b = 0; b < k.blocks; ++b)
      sum = fma(load(k.total + b * k.lanes + lane), exp(load(k.top + b * k.lanes + lane) - top), sum);
    for (int i = 0; i < kLanes; ++i)
      k.loss[lane + i] = lane + i < k.count ? std::log(sum[i]) - (k.score[lane + i] - top[i]) : 0;
    const Vec share = load(k.g + lane) / sum;
    for (int64_t b = 0; b < k.blocks; ++b)
      store(k.total + b * k.lanes + lane, share * exp(load(k.top + b * k.lanes + lane) - top));
  });
}

// P from the exponentials; that of the label from its loss, since p - 1 of a rounded p would be lost where p is near 1.
template <typename T, int MV>
static void probabilities(Chunk<T, MV>& k) {
  using W = Words<T>;
  parallel_for(k.blocks * k.strips, [&](int64_t task) {
    const int64_t block = task % k.blocks, strip = task / k.blocks, first = block * kVocabBlock;
    for (int64_t lane = strip * k.width; lane < k.end_of_strip(strip); lane += kLanes) {
      const Vec scale = load(k.total + block * k.lanes + lane);
      for (int64_t v = first; v < k.end_of(block); v += W::kPer) {
        const IVec e = load_words(k.word(lane, v));
        store_words(k.word(lane, v), W::join(element<W>(e, 0) * scale, element<W>(e, 1) * scale));
      }
      for (int64_t i = lane; i < lane + kLanes; ++i) {
        const int64_t v = k.label(i);
        if (v < first || v >= k.end_of(block)) continue;
        const float p = k.g[i] * (std::exp(-k.loss[i]) - 1);
        if constexpr (W::kPer == 2)
          reinterpret_cast<bfloat16*>(k.word(i, v))[v % 2] = from_float<bfloat16>(p);
        else
          *reinterpret_cast<float*>(k.word(i, v)) = p;
      }
    }
  });
}

template <typename T, int MV>
static void input_gradient(Chunk<T, MV>& k) {
  using W = Words<T>;
  const auto& p = k.p;
  Scratch<T> dh(k.count * p.C);
  gemm<W, MV, Panel::kByWord>(k.count, p.C, StoreTokens<MV, T>{dh, k.count, p.C, {}},
                              Segment{k.probs.get(), k.words, DenseColumns<W, T>{p.w, p.w_row, p.V}});
  parallel_ranges(k.count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) memcpy(p.dh + k.tokens[i] * p.C, dh + i * p.C, size_t(p.C) * sizeof(T));
  });
}

// By row: row v is column v of P, its words run along the tokens.
template <typename T, int MV>
struct ProbabilityRows {
  Chunk<T, MV>& k;

  void operator()(uint32_t* out, int64_t v, int64_t word, int64_t words) const {
    using W = Words<T>;
    for (int64_t lane = word * W::kPer, end = lane + words * W::kPer; lane < end; lane += kLanes) {
      const IVec p = load_words(k.word(lane, v));
#if defined(LK_ISA_AVX512BF16)
      if constexpr (W::kPer == 2) {
        const __m256i half = _mm512_cvtepi32_epi16((__m512i)(v % 2 ? p >> 16 : p));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
      } else
#endif
        store_words(out, p);
      out += kLanes / W::kPer;
    }
  }
};

// What is kept of dW beside dw between chunks.
template <typename T>
using Rest = std::conditional_t<std::is_same_v<T, float16>, float, T>;

// Adds the chunk's share. Between chunks a bfloat16 dW is kept as dw + low: 16 bits of mantissa. A float16 one has too
// short a range for either part: it is kept in low alone.
template <typename T, int MV>
static void weight_gradient(Chunk<T, MV>& k, Rest<T>* low, bool first, bool last) {
  using W = Words<T>;
  const auto& p = k.p;
  constexpr int kVecs = kTileVecs;
  Scratch<uint32_t> columns(packed_size<W, kVecs>(p.C, k.count));
  pack_columns<W, kVecs>(columns, k.h.get(), p.C, p.C, k.count);
  const auto store_block = [&](const float* c, int64_t strip, int64_t row, int64_t rows) {
    const int64_t begin = strip * kWidth<kVecs>, lanes = min64(p.C - begin, kWidth<kVecs>);
    for (int64_t r = 0; r < rows; ++r, c += kWidth<kVecs>) {
      T* dw = p.dw + (row + r) * p.C + begin;
      Rest<T>* rest = low ? low + (row + r) * p.C + begin : nullptr;
      for_vectors(lanes, [=](int64_t i, auto n) {
        constexpr bool kAlone = std::is_same_v<T, float16>;
        Vec x = load(c + i, n);
        if (!first && !kAlone) x += load(dw + i, n);
        if (!first && rest) x += load(rest + i, n);
        if (last || !kAlone) store(dw + i, x, n);
        if (!last && rest) store(rest + i, kAlone ? x : x - load(dw + i, n), n);
      });
    }
  };
  gemm<W, kVecs, Panel::kByRow>(p.C, p.V, store_block,
                                Segment{columns.get(), words_of<W>(k.count), ProbabilityRows<T, MV>{k}});
}

template <typename T>
static void linear_cross_entropy(const LinearCrossEntropy<T>& p) {
  Scratch<int64_t> tokens(p.M);
  Scratch<float> loss(p.M);
  int64_t count = 0;
  for (int64_t m = 0; m < p.M; ++m) {
    loss[m] = 0;
    if (p.labels[m] != p.ignore_index)
      tokens[count++] = m;
    else if (p.dh)
      memset(p.dh + m * p.C, 0, size_t(p.C) * sizeof(T));
  }
  if (p.dw && count == 0) memset(p.dw, 0, size_t(p.V * p.C) * sizeof(T));

  // A 16-bit dW that is summed over chunks needs `low`. Tokens whose P takes no more memory than that go at once.
  const int64_t low_size = p.dw && sizeof(T) == 2 ? p.V * p.C : 0;
  const int64_t budget = max64(kChunkBytes, low_size * int64_t(sizeof(Rest<T>)));
  const int64_t at_once = max64(kStrip, budget / (4 * max64(1, words_of<Words<T>>(p.V))) / kStrip * kStrip);
  const int64_t chunks = ceil_div(count, at_once), size = round_up(ceil_div(count, max64(1, chunks)), kStrip);
  Scratch<Rest<T>> low(chunks > 1 ? low_size : 0);
  Rest<T>* const rest = chunks > 1 && low_size ? low.get() : nullptr;
  for (int64_t from = 0; from < count; from += size)
    with_strips(min64(size, count - from), [&]<int MV>() {
      Chunk<T, MV> k(p, tokens + from, min64(size, count - from));
      for (int64_t i = 0; i < k.lanes; ++i) {
        const float g = i < k.count ? (p.dloss ? p.dloss[k.tokens[i]] : 1.0f) : 0.0f;
        k.g[i] = p.reduction == Reduction::kMean ? g / float(count) : g;
      }
      gather(k.h.get(), p, k.tokens, k.count);
      scores(k);
      losses(k);
      for (int64_t i = 0; i < k.count; ++i) loss[k.tokens[i]] = k.loss[i];
      if (k.backward) probabilities(k);
      if (p.dh) input_gradient(k);
      if (p.dw) weight_gradient(k, rest, from == 0, from + size >= count);
    });

  if (!p.loss) return;
  double sum = 0;
  for (int64_t m = 0; m < p.M; ++m) sum += double(loss[m]);
  if (p.reduction == Reduction::kNone)
    memcpy(p.loss, loss, size_t(p.M) * sizeof(float));
  else
    *p.loss = float(p.reduction == Reduction::kMean ? sum / double(count) : sum);
}

LK_KERNEL(LinearCrossEntropy<float>, linear_cross_entropy);
LK_KERNEL(LinearCrossEntropy<bfloat16>, linear_cross_entropy);
LK_KERNEL(LinearCrossEntropy<float16>, linear_cross_entropy);

}  // namespace llamakern::LK_ISA
