// C = A Bᵀ on tensor cores. A block of 4 warps makes a 64x64 tile, a warp 32x32 of it. Slices of 32 along K arrive by
// cp.async in two buffers: one is multiplied while the next one lands.
#include "proof.h"

namespace {

constexpr int kTile = 64, kSlice = 32, kThreads = 128;
constexpr int kRow = kSlice + 8;  // +8: the 8 rows of an ldmatrix fall in different banks

template <typename T>
LK_DEVICE void load_slice(T (*tile)[kRow], const T* x, int row0, int rows, int k0, int K) {
  for (int i = threadIdx.x; i < kTile * kSlice / 8; i += kThreads) {
    const int row = i / (kSlice / 8), k = i % (kSlice / 8) * 8;
    const bool inside = row0 + row < rows && k0 + k < K;
    cp_async<16>(&tile[row][k], inside ? x + int64_t(row0 + row) * K + k0 + k : x, inside ? 16 : 0);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gemm_kernel(Gemm<T> p) {
  __shared__ __align__(16) T a_tile[2][kTile][kRow];
  __shared__ __align__(16) T b_tile[2][kTile][kRow];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int m_warp = warp / 2 * 32, n_warp = warp % 2 * 32;
  float acc[2][4][4] = {};

  load_slice(a_tile[0], p.a, m0, p.M, 0, p.K);
  load_slice(b_tile[0], p.b, n0, p.N, 0, p.K);
  cp_async_commit();
  for (int k0 = 0, now = 0; k0 < p.K; k0 += kSlice, now ^= 1) {
    if (k0 + kSlice < p.K) {
      load_slice(a_tile[now ^ 1], p.a, m0, p.M, k0 + kSlice, p.K);
      load_slice(b_tile[now ^ 1], p.b, n0, p.N, k0 + kSlice, p.K);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlice; k += 16) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix(a[i], &a_tile[now][m_warp + 16 * i + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int j = 0; j < 4; ++j) ldmatrix(b[j], &b_tile[now][n_warp + 8 * j + lane % 8][k + lane / 8 % 2 * 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(acc[i][j], a[i], b[j]);
      }
    }
    __syncthreads();  // the next slice overwrites the tile
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = m0 + m_warp + 16 * i + lane / 4 + e / 2 * 8, n = n0 + n_warp + 8 * j + lane % 4 * 2 + e % 2;
        if (m < p.M && n < p.N) p.c[int64_t(m) * p.N + n] = acc[i][j][e];
      }
    }
  }
}

}  // namespace

template <typename T>
void gemm(const Gemm<T>& p) {
  const dim3 grid((p.N + kTile - 1) / kTile, (p.M + kTile - 1) / kTile);
  LK_LAUNCH(gemm_kernel<T>, grid, kThreads, 0, 0)(p);
}
template void gemm(const Gemm<bfloat16>&);
template void gemm(const Gemm<float16>&);
