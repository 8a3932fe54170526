// What the GPU's LoRA kernels share: the adapter's factors as operands of a tile, and the matmuls that give h and g.
//
// With 16-bit activations an adapter's products run on bfloat16 tensor cores. A value that bfloat16 does not hold (of
// float16, of a float32 adapter, of h and g beside them) is the sum of two, high + low, and a product of two such
// values is high·high + low·high + high·low: 16 bits of precision, and the range of float32 for h and g of float16. The
// parts stand in the workspace.
#pragma once
#include "../nf4/nf4_decode.cuh"
#include "lora.h"

namespace llamakern::cuda {

template <typename T>
using AdapterElement = std::conditional_t<std::is_same_v<T, float>, float, bfloat16>;

// A matrix [rows][columns] as its parts; `low` is null where it has none.
template <typename E>
struct Parts {
  const E *high = nullptr, *low = nullptr;
  int64_t ld = 0;

  template <bool kAcross>
  LK_DEVICE Dense<E, kAcross> operand(bool take_low, int64_t rows, int64_t columns) const {
    return {take_low ? low : high, ld, rows, columns};
  }
};

// tile += Σ U Vᵀ with all parts: u(low) and v(low) are the operands.
template <typename Tile, typename U, typename V>
LK_DEVICE void add_parts(Tile& tile, typename Tile::Shared& shared, const U& u, const V& v, bool low_u, bool low_v,
                         int64_t m, int64_t n, int64_t end, int64_t begin = 0) {
#pragma unroll 1
  for (int part = 0; part < 3; ++part)
    if (part == 0 || (part == 1 ? low_u : low_v)) tile.add(shared, u(part == 1), v(part == 2), m, n, end, begin);
}

// ---------------------------------------------------------------------------- the workspace

// Cuts the workspace into pieces that begin at multiples of 256 bytes. Without one it only counts.
class Pieces {
 public:
  explicit Pieces(void* workspace = nullptr) : begin_(static_cast<char*>(workspace)) {}

  template <typename E>
  E* take(int64_t count) {
    E* piece = begin_ ? reinterpret_cast<E*>(begin_ + bytes_) : nullptr;
    bytes_ += round_up(count * int64_t(sizeof(E)), 256);
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

constexpr int kSplitThreads = 256;

// high + low = data
template <typename T>
struct Split {
  bfloat16 *high, *low;  // [rows][ld]; low may be null
  const float* wide;     // [rows][columns], or of T:
  const T* same;
  int64_t rows, columns, ld;
};

template <typename T>
__global__ void __launch_bounds__(kSplitThreads) lora_split_kernel(const Split<T> p) {
  const int64_t i = int64_t(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (i >= p.rows * p.columns) return;
  const float x = p.wide ? p.wide[i] : widen(p.same[i]);
  const int64_t at = i / p.columns * p.ld + i % p.columns;
  p.high[at] = narrow<bfloat16>(x);
  if (p.low) p.low[at] = narrow<bfloat16>(x - widen(narrow<bfloat16>(x)));
}

// ---------------------------------------------------------------------------- the adapter

// The adapter as the kernels of T take it: made once for each T.
template <typename T>
struct AnyLora {
  using E = AdapterElement<T>;
  const T *a, *b;                // null where they are
  const float *wide_a, *wide_b;  // of float32 beside 16 bits
  int64_t R, N, K;
  float scale;
  Dropout drop;
  bool low;  // whether A, B, h and g have low parts

  template <typename P>
  AnyLora(const Lora<P>& lora, int64_t N, int64_t K) : R(lora.R), N(N), K(K), scale(lora.scale), drop(lora.drop) {
    if constexpr (std::is_same_v<P, T>) {
      a = lora.a, b = lora.b, wide_a = wide_b = nullptr;
    } else {
      a = b = nullptr, wide_a = lora.a, wide_b = lora.b;
    }
    low = std::is_same_v<T, float16> || wide_a;
  }

  // The parts of A [R][K] and B [N][R], of h or g [M][R]. Without a workspace `pieces` only counts.
  Parts<E> parts_of_a(Pieces& pieces, Stream stream) const { return split(pieces, a, wide_a, R, K, stream); }
  Parts<E> parts_of_b(Pieces& pieces, Stream stream) const { return split(pieces, b, wide_b, N, R, stream); }
  Parts<E> parts_of(Pieces& pieces, const float* narrow, int64_t M, Stream stream) const {
    if constexpr (std::is_same_v<T, float>)
      return {narrow, nullptr, R};
    else
      return split(pieces, nullptr, narrow, M, R, stream);
  }

 private:
  Parts<E> split(Pieces& pieces, const T* same, const float* wide, int64_t rows, int64_t columns, Stream stream) const {
    if constexpr (std::is_same_v<T, E>)
      if (same) return {same, nullptr, columns};
    if constexpr (std::is_same_v<E, bfloat16>) {
      const int64_t ld = round_up(columns, 8);
      Split<T> p{pieces.take<bfloat16>(rows * ld), nullptr, wide, same, rows, columns, ld};
      if (low) p.low = pieces.take<bfloat16>(rows * ld);
      if (p.high && rows * columns > 0) {
        const unsigned blocks = unsigned(ceil_div(rows * columns, kSplitThreads));
        LK_LAUNCH(lora_split_kernel<T>, dim3(blocks), kSplitThreads, 0, stream)(p);
        check_launch("lora_split_kernel");
      }
      return {p.high, p.low, ld};
    }
    return {};
  }
};

LK_DEVICE bool is_dropped(const Dropout& drop, uint64_t keys, int64_t k) {
  return dropout_draw(uint32_t(k), uint32_t(keys), uint32_t(keys >> 32)) < drop.threshold;
}

// x or dy, of x only what drop keeps; the factor 1 / (1 - p) is applied to sums of them.
template <typename T, bool kAcrossMemory>
struct Kept {
  using Element = AdapterElement<T>;
  static constexpr bool kAcross = kAcrossMemory;
  static constexpr int kChunk = 16 / sizeof(T);
  struct Chunk {
    T x[kChunk];
  };
  const T* x;
  int64_t ld, rows, columns;
  Dropout drop;
  bool low;  // the part that bfloat16 leaves over

  LK_DEVICE void fetch(Element*, Chunk& chunk, int64_t row, int64_t column) const {
    const int64_t left = row < rows ? columns - column : 0;
    const T* from = x + row * ld + column;
    if (left >= kChunk && rows_aligned(x, ld)) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from);
      chunk = __builtin_bit_cast(Chunk, raw);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) chunk.x[j] = j < left ? from[j] : T{};
    }
    if (!drop.seed || left <= 0) return;
    const uint64_t keys = drop.row_keys(row);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (is_dropped(drop, keys, column + j)) chunk.x[j] = T{};
  }
  LK_DEVICE void put(Element* to, const Chunk& chunk) const {
    uint4* out = reinterpret_cast<uint4*>(to);
    if constexpr (std::is_same_v<T, Element>) {
      *out = __builtin_bit_cast(uint4, chunk);
    } else {
      uint32_t pair[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pair[j] = narrow2<Element>(part(chunk.x[2 * j]), part(chunk.x[2 * j + 1]));
      *out = uint4{pair[0], pair[1], pair[2], pair[3]};
    }
  }

 private:
  LK_DEVICE float part(T value) const {
    const float x = widen(value);
    return low ? x - widen(narrow<Element>(x)) : x;
  }
};

// ---------------------------------------------------------------------------- the base

// W [N][K] as it stands, or in NF4: of y = x Wᵀ (kAcross = false) or of dx = dy W (true), whose tile has columns
// [begin, end).
template <typename T, bool kAcross>
struct DenseBase {
  const T* w;
  int64_t N, K;

  LK_DEVICE Range range(int64_t, int64_t) const { return {}; }
  LK_DEVICE Dense<T, kAcross> operand(float) const { return {w, K, N, K}; }
};

template <typename T, bool kAcross>
struct Nf4Base {
  Nf4Matrix w;

  LK_DEVICE Range range(int64_t begin, int64_t end) const {
    return kAcross ? range_of<T>(w, 0, w.N, begin, end) : range_of<T>(w, begin, end, 0, w.K);
  }
  LK_DEVICE Nf4Operand<T, kAcross> operand(float down) const { return Nf4Operand<T, kAcross>(w, down); }
};

// ---------------------------------------------------------------------------- beside a few tokens

// s·h Bᵀ
template <typename T>
struct AdapterTerm {
  const float* h;
  Either<T> b;
  int64_t R;
  float scale;

  LK_DEVICE float share(int64_t m, int64_t n, int first, int step) const {
    float sum = 0.0f;
    for (int64_t r = first; r < R; r += step) sum = fmaf(h[m * R + r] * scale, b[n * R + r], sum);
    return sum;
  }
};

// ---------------------------------------------------------------------------- h and g

// out [M][R] = factor·Σ U Vᵀ and its parts: h = drop(x) Aᵀ (kAcross = false, V = A [R][depth]) or g = dy B (true, V = B
// [depth][R]). A long reduction is cut into pieces, by its length alone, which are summed in their order.
template <typename T>
struct Narrow {
  float* out;
  const T* u;  // [M][depth]
  int64_t u_row;
  Dropout drop;
  Parts<AdapterElement<T>> v;
  int64_t M, R, depth;
  float factor;
  int64_t pieces = 1, piece = 0;             // of so many steps
  float* partial = nullptr;                  // [pieces][M][R]
  bfloat16 *high = nullptr, *low = nullptr;  // [M][ld]: where 16 bits follow
  int64_t ld = 0;
};

constexpr int64_t kPieceSteps = 1024, kMostPieces = 16;

template <typename T, bool kAcross>
__global__ void __launch_bounds__(SmallTile<T>::kThreads, SmallTile<T>::kBlocks) lora_narrow_kernel(const Narrow<T> p) {
  using Tile = SmallTile<T>;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.M, p.R);
  Tile tile;
  const auto u = [&](bool low) LK_INLINE { return Kept<T, false>{p.u, p.u_row, p.M, p.depth, p.drop, low}; };
  const auto v = [&](bool low) LK_INLINE {
    return p.v.template operand<kAcross>(low, kAcross ? p.depth : p.R, kAcross ? p.R : p.depth);
  };
  const int64_t begin = blockIdx.y * p.piece, end = min64(p.depth, begin + p.piece);
  add_parts(tile, shared, u, v, std::is_same_v<T, float16>, p.v.low, at.m, at.n, end, begin);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, r = at.n + j;
    if (m < p.M && r < p.R) p.partial[(blockIdx.y * p.M + m) * p.R + r] = sum;
  });
}

template <typename T>
__global__ void __launch_bounds__(kSplitThreads) lora_narrow_sum_kernel(const Narrow<T> p) {
  const int64_t i = int64_t(blockIdx.x) * kSplitThreads + threadIdx.x, count = p.M * p.R;
  if (i >= count) return;
  float sum = p.partial[i];
  for (int64_t piece = 1; piece < p.pieces; ++piece) sum += p.partial[piece * count + i];
  sum *= p.factor;
  p.out[i] = sum;
  if (!p.high) return;
  const int64_t at = i / p.R * p.ld + i % p.R;
  p.high[at] = narrow<bfloat16>(sum);
  if (p.low) p.low[at] = narrow<bfloat16>(sum - widen(narrow<bfloat16>(sum)));
}

// Returns the parts of `out`. Where out is null, `pieces` only counts.
template <bool kAcross, typename T>
Parts<AdapterElement<T>> lora_narrow(Pieces& pieces, Narrow<T> p, bool low, Stream stream) {
  using Tile = SmallTile<T>;
  using E = AdapterElement<T>;
  p.pieces = max64(1, min64(kMostPieces, p.depth / kPieceSteps));
  p.piece = round_up(ceil_div(p.depth, p.pieces), Tile::kDepth);
  p.pieces = max64(1, ceil_div(p.depth, max64(1, p.piece)));
  p.partial = pieces.template take<float>(p.pieces * p.M * p.R);
  Parts<E> parts;
  if constexpr (std::is_same_v<E, float>) {
    parts = {p.out, nullptr, p.R};
  } else {
    p.ld = round_up(p.R, 8);
    p.high = pieces.template take<bfloat16>(p.M * p.ld);
    if (low) p.low = pieces.template take<bfloat16>(p.M * p.ld);
    parts = {p.high, p.low, p.ld};
  }
  if (!p.out || p.M * p.R == 0) return parts;
  dim3 grid = tiles_of<Tile>(p.M, p.R);
  grid.y = unsigned(p.pieces);
  const auto kernel = lora_narrow_kernel<T, kAcross>;
  LK_LAUNCH_AS("lora_narrow_kernel", kernel, grid, Tile::kThreads, sizeof(typename Tile::Shared), stream)(p);
  check_launch("lora_narrow_kernel");
  const unsigned blocks = unsigned(ceil_div(p.M * p.R, kSplitThreads));
  LK_LAUNCH(lora_narrow_sum_kernel<T>, dim3(blocks), kSplitThreads, 0, stream)(p);
  check_launch("lora_narrow_sum_kernel");
  return parts;
}

}  // namespace llamakern::cuda
