// NF4 linear for a few tokens, in float: a warp takes a row of W, its lanes runs of 32 weights, and every weight that
// is decoded meets all tokens.
#pragma once
#include "nf4_decode.cuh"

namespace llamakern::cuda {

constexpr int64_t kFewTokens = 8;
constexpr int kFewThreads = 128, kFewRows = kFewThreads / 32;

// What a plain linear adds to y[m][n]. An adapter's term is a sum of which every step-th product makes a share.
struct NoTerm {
  LK_DEVICE float share(int64_t, int64_t, int, int) const { return 0.0f; }
};

// y[m][n] = x Wᵀ + term(m, n) + bias for up to kTokens tokens.
template <typename T, int kTokens, typename Term>
__global__ void __launch_bounds__(kFewThreads) nf4_few_kernel(const Nf4Linear<T> p, const Term term) {
  const int64_t n = int64_t(blockIdx.x) * kFewRows + threadIdx.x / 32, K = p.w.K;
  const int lane = threadIdx.x % 32;
  if (n >= p.w.N) return;
  const bool lies = runs_lie(p.w), aligned = rows_aligned(p.x, p.x_row);
  float sum[kTokens] = {};
  Run next = load_run(p.w, lies, n, lane * Run::kLength);
  for (int64_t k = lane * Run::kLength; k < K; k += 32 * Run::kLength) {
    const Run run = next;
    next = load_run(p.w, lies, n, k + 32 * Run::kLength);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float w[8];
      decode_codes(w, run.bytes[q]);
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] *= run.scale_of(8 * q + j);
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        if (m >= p.M) break;
        float x[8];
        load_eight(x, p.x + m * p.x_row + k + 8 * q, K - k - 8 * q, aligned);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[m] = fmaf(w[j], x[j], sum[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    if (m < p.M) sum[m] += term.share(m, n, lane, 32);
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], other);
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    if (lane != m || m >= p.M) continue;
    p.y[m * p.w.N + n] = narrow<T>(p.bias ? sum[m] + p.bias[n] : sum[m]);
  }
}

template <typename T, typename Term>
void nf4_few(const Nf4Linear<T>& p, const Term& term, Stream stream) {
  const dim3 grid(unsigned(ceil_div(p.w.N, kFewRows)));
  const auto kernel = p.M == 1 ? nf4_few_kernel<T, 1, Term> : nf4_few_kernel<T, kFewTokens, Term>;
  LK_LAUNCH_AS("nf4_few_kernel", kernel, grid, kFewThreads, 0, stream)(p, term);
  check_launch("nf4_few_kernel");
}

}  // namespace llamakern::cuda
