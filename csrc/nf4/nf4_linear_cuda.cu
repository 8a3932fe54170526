// NF4 linear on the GPU: y = x Wᵀ and dx = dy W from the same packed bytes.
#include "nf4_stream.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- forward

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) nf4_linear_kernel(const Nf4Linear<T> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const int64_t M = p.M, N = p.w.N, K = p.w.K;
  const TileAt<Tile> at(M, N);
  const Range range = range_of<T>(p.w, at.n, at.n + Tile::kColumns, 0, K);
  Tile tile;
  tile.add(shared, Rows<T>{p.x, p.x_row, M, K}, Nf4Operand<T, false>(p.w, range.down), at.m, at.n, K);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, n = at.n + j;
    if (m >= M || n >= N) return;
    const float y = sum * range.up;
    p.y[m * N + n] = narrow<T>(p.bias ? y + p.bias[n] : y);
  });
}

template <typename T>
void nf4_linear(const Nf4Linear<T>& p, void*, Stream stream) {
  if (p.M * p.w.N == 0) return;
  if (nf4_few_tokens(p, NoTerm(), stream)) return;
  with_tile<T>(p.M, p.w.N, [&]<typename Tile>() {
    launch_tiles<Tile>("nf4_linear_kernel", nf4_linear_kernel<T, Tile>, p.M, p.w.N, stream, p);
  });
}

template <typename T>
void nf4_linears(const Nf4Linears<T>& p, void*, Stream stream) {
  for (int i = 0; i < p.count; ++i)
    nf4_linear(Nf4Linear<T>{.y = p.y[i], .x = p.x, .x_row = p.x_row, .w = p.w[i], .bias = {}, .M = p.M}, nullptr,
               stream);
}

// ---------------------------------------------------------------------------- backward

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    nf4_linear_backward_kernel(const Nf4LinearBackward<T> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const int64_t M = p.M, N = p.w.N, K = p.w.K;
  const TileAt<Tile> at(M, K);
  const Range range = range_of<T>(p.w, 0, N, at.n, at.n + Tile::kColumns);
  Tile tile;
  tile.add(shared, Rows<T>{p.dy, p.dy_row, M, N}, Nf4Operand<T, true>(p.w, range.down), at.m, at.n, N);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, k = at.n + j;
    if (m < M && k < K) p.dx[m * K + k] = narrow<T>(sum * range.up);
  });
}

template <typename T>
void nf4_linear_backward(const Nf4LinearBackward<T>& p, void*, Stream stream) {
  with_tile<T>(p.M, p.w.K, [&]<typename Tile>() {
    launch_tiles<Tile>("nf4_linear_backward_kernel", nf4_linear_backward_kernel<T, Tile>, p.M, p.w.K, stream, p);
  });
}

LK_CUDA_KERNEL(Nf4Linear<float>, nf4_linear<float>);
LK_CUDA_KERNEL(Nf4Linear<bfloat16>, nf4_linear<bfloat16>);
LK_CUDA_KERNEL(Nf4Linear<float16>, nf4_linear<float16>);
LK_CUDA_KERNEL(Nf4Linears<float>, nf4_linears<float>);
LK_CUDA_KERNEL(Nf4Linears<bfloat16>, nf4_linears<bfloat16>);
LK_CUDA_KERNEL(Nf4Linears<float16>, nf4_linears<float16>);
LK_CUDA_KERNEL(Nf4LinearBackward<float>, nf4_linear_backward<float>);
LK_CUDA_KERNEL(Nf4LinearBackward<bfloat16>, nf4_linear_backward<bfloat16>);
LK_CUDA_KERNEL(Nf4LinearBackward<float16>, nf4_linear_backward<float16>);

}  // namespace llamakern::cuda
