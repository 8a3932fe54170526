// LoRA forward on the GPU: h = drop(x) Aᵀ, then y with the adapter as the first term of the base's sums.
#include "../nf4/nf4_stream.cuh"
#include "lora_tile.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- one reduction over adapter and base

template <typename T, typename Base>
struct Wide {
  T* y;
  Parts<AdapterElement<T>> h, b;  // [M][R] and [N][R]
  const T* x;
  int64_t x_row;
  Base base;
  Either<T> bias;
  float scale;
  int64_t M, N, K, R;
};

template <typename T, typename Tile, typename Base>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) lora_linear_kernel(const Wide<T, Base> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.M, p.N);
  const Range range = p.base.range(at.n, at.n + Tile::kColumns);
  const float scale = p.scale * range.down;
  Tile tile;
  const auto h = [&](bool low) LK_INLINE { return p.h.template operand<false>(low, p.M, p.R); };
  const auto b = [&](bool low) LK_INLINE { return p.b.template operand<false>(low, p.N, p.R); };
  add_parts(tile, shared, h, b, p.h.low, p.b.low, at.m, at.n, p.R);
  tile.each([&](int, int, float& sum) LK_INLINE { sum *= scale; });
  tile.add(shared, Rows<T>{p.x, p.x_row, p.M, p.K}, p.base.operand(range.down), at.m, at.n, p.K);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, n = at.n + j;
    if (m >= p.M || n >= p.N) return;
    const float y = sum * range.up;
    p.y[m * p.N + n] = narrow<T>(p.bias ? y + p.bias[n] : y);
  });
}

template <typename T, typename Base>
void wide(const Wide<T, Base>& p, Stream stream) {
  with_tile<T>(p.M, p.N, [&]<typename Tile>() {
    launch_tiles<Tile>("lora_linear_kernel", lora_linear_kernel<T, Tile, Base>, p.M, p.N, stream, p);
  });
}

// ---------------------------------------------------------------------------- beside a base that is there already

template <typename T>
struct Beside {
  T* y;
  Parts<AdapterElement<T>> h, b;
  const T *base, *x;
  int64_t x_row;
  const T* w;
  Either<T> bias;
  float scale;
  int64_t M, N, K, R;

  // base[m][n]; computed again where float16 could not hold it.
  LK_DEVICE float wide_base(float base, int64_t m, int64_t n) const {
    if constexpr (std::is_same_v<T, float16>) {
      if (fabsf(base) == INFINITY) {
        base = bias ? bias[n] : 0.0f;
#pragma unroll 1
        for (int64_t k = 0; k < K; ++k) base = fmaf(widen(x[m * x_row + k]), widen(w[n * K + k]), base);
      }
    }
    return base;
  }
};

// y = base + s·h Bᵀ; where the second term is 0 the base's bits stay, -0 included, and a NaN's always.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) lora_beside_kernel(const Beside<T> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.M, p.N);
  Tile tile;
  const auto h = [&](bool low) LK_INLINE { return p.h.template operand<false>(low, p.M, p.R); };
  const auto b = [&](bool low) LK_INLINE { return p.b.template operand<false>(low, p.N, p.R); };
  add_parts(tile, shared, h, b, p.h.low, p.b.low, at.m, at.n, p.R);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, n = at.n + j;
    if (m >= p.M || n >= p.N) return;
    const T base = p.base[m * p.N + n];
    const bool keeps = sum == 0.0f || widen(base) != widen(base);
    p.y[m * p.N + n] = keeps ? base : narrow<T>(p.wide_base(widen(base), m, n) + sum * p.scale);
  });
}

template <typename T>
void beside(const Beside<T>& p, Stream stream) {
  launch_tiles<SmallTile<T>>("lora_beside_kernel", lora_beside_kernel<T, SmallTile<T>>, p.M, p.N, stream, p);
}

// ---------------------------------------------------------------------------- a few tokens over NF4

constexpr int kDownThreads = 128;

// x[0 ... 8) of T or float32, the others 0.
template <typename T>
LK_DEVICE void load_either(float (&out)[8], const Either<T>& from, int64_t row, int64_t ld, int64_t k) {
  if (from.wide)
    load_eight(out, from.wide + row * ld + k, ld - k, rows_aligned(from.wide, ld));
  else
    load_eight(out, from.same + row * ld + k, ld - k, rows_aligned(from.same, ld));
}

template <typename T>
struct FewDown {
  float* h;    // [M][R]  out
  const T* x;  // [M][K]
  int64_t x_row;
  Either<T> a;  // [R][K]
  Dropout drop;
  int64_t M, K, R;
};

// A block of threads takes a row of A.
template <typename T>
__global__ void __launch_bounds__(kDownThreads) lora_few_down_kernel(const FewDown<T> p) {
  __shared__ float warp_sum[kDownThreads / 32][kFewTokens];
  const bool aligned = rows_aligned(p.x, p.x_row);
  float sum[kFewTokens] = {};
  for (int64_t k = threadIdx.x * 8; k < p.K; k += kDownThreads * 8) {
    float row[8];
    load_either(row, p.a, blockIdx.x, p.K, k);
#pragma unroll
    for (int m = 0; m < kFewTokens; ++m) {
      if (m >= p.M) break;
      float token[8];
      load_eight(token, p.x + m * p.x_row + k, p.K - k, aligned);
      const uint64_t keys = p.drop.seed ? p.drop.row_keys(m) : 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (p.drop.seed && is_dropped(p.drop, keys, k + j)) token[j] = 0.0f;
        sum[m] = fmaf(token[j], row[j], sum[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kFewTokens; ++m) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], other);
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32][m] = sum[m];
  }
  __syncthreads();
  const int64_t m = threadIdx.x;
  if (m >= p.M) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kDownThreads / 32; ++warp) total += warp_sum[warp][m];
  p.h[m * p.R + blockIdx.x] = total * p.drop.keep_scale;
}

template <typename T>
void few_down(const FewDown<T>& p, Stream stream) {
  if (p.M * p.R == 0) return;
  LK_LAUNCH(lora_few_down_kernel<T>, dim3(unsigned(p.R)), kDownThreads, 0, stream)(p);
  check_launch("lora_few_down_kernel");
}

// ---------------------------------------------------------------------------- the ops

// h = drop(x) Aᵀ; returns its parts. Where h is null, `pieces` only counts.
template <typename T>
Parts<AdapterElement<T>> down(Pieces& pieces, float* h, const T* x, int64_t x_row, const AnyLora<T>& lora, int64_t M,
                              Stream stream) {
  const auto a = lora.parts_of_a(pieces, stream);
  const Narrow<T> narrow{h, x, x_row, lora.drop, a, M, lora.R, lora.K, lora.drop.keep_scale};
  return lora_narrow<false>(pieces, narrow, lora.low, stream);
}

template <typename T, typename P>
void lora_linear(const LoraLinear<T, P>& p, void* workspace, Stream stream) {
  const int64_t M = p.M, N = p.N, K = p.K;
  const AnyLora<T> lora(p.lora, N, K);
  Pieces pieces(workspace);
  const auto h = down(pieces, p.h, p.x, p.x_row, lora, M, stream), b = lora.parts_of_b(pieces, stream);
  if (p.base)
    beside(Beside<T>{p.y, h, b, p.base, p.x, p.x_row, p.w, p.bias, lora.scale, M, N, K, lora.R}, stream);
  else
    wide(Wide<T, DenseBase<T, false>>{p.y, h, b, p.x, p.x_row, {p.w, N, K}, p.bias, lora.scale, M, N, K, lora.R},
         stream);
}

template <typename T, typename P>
void nf4_lora_linear(const Nf4LoraLinear<T, P>& p, void* workspace, Stream stream) {
  const int64_t M = p.M, N = p.w.N, K = p.w.K;
  const AnyLora<T> lora(p.lora, N, K);
  Pieces pieces(workspace);
  Parts<AdapterElement<T>> h;
  if (M <= kFewTokens)
    few_down(FewDown<T>{p.h, p.x, p.x_row, {lora.a, lora.wide_a}, lora.drop, M, K, lora.R}, stream);
  else
    h = down(pieces, p.h, p.x, p.x_row, lora, M, stream);
  if (M * N == 0) return;
  const Nf4Linear<T> linear{.y = p.y, .x = p.x, .x_row = p.x_row, .w = p.w, .bias = p.bias, .M = M};
  const AdapterTerm<T> term{p.h, {lora.b, lora.wide_b}, lora.R, lora.scale};
  if (nf4_few_tokens(linear, term, stream)) return;
  const auto b = lora.parts_of_b(pieces, stream);
  wide(Wide<T, Nf4Base<T, false>>{p.y, h, b, p.x, p.x_row, {p.w}, p.bias, lora.scale, M, N, K, lora.R}, stream);
}

template <typename T, typename P>
int64_t parts_bytes(const Lora<P>& p, int64_t M, int64_t N, int64_t K) {
  const AnyLora<T> lora(p, N, K);
  Pieces pieces;
  down<T>(pieces, nullptr, nullptr, 0, lora, M, nullptr);
  lora.parts_of_b(pieces, nullptr);
  return pieces.bytes();
}
template <typename T, typename P>
int64_t lora_linear_bytes(const LoraLinear<T, P>& p) {
  return parts_bytes<T>(p.lora, p.M, p.N, p.K);
}
template <typename T, typename P>
int64_t nf4_lora_linear_bytes(const Nf4LoraLinear<T, P>& p) {
  return parts_bytes<T>(p.lora, p.M, p.w.N, p.w.K);
}

#define LK_LORA_KERNELS(T, P)                                                                       \
  static const File<LoraLinear<T, P>> lora_##T##_##P(&lora_linear<T, P>, &lora_linear_bytes<T, P>); \
  static const File<Nf4LoraLinear<T, P>> nf4_lora_##T##_##P(&nf4_lora_linear<T, P>, &nf4_lora_linear_bytes<T, P>)
LK_LORA_KERNELS(float, float);
LK_LORA_KERNELS(bfloat16, bfloat16);
LK_LORA_KERNELS(bfloat16, float);
LK_LORA_KERNELS(float16, float16);
LK_LORA_KERNELS(float16, float);

}  // namespace llamakern::cuda
