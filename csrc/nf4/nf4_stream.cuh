// NF4 linear for a few tokens of 16 bits: the time is that of reading W. A block of eight warps takes 32 rows of W,
// each warp every eighth unit of 64 weights along them, and decodes its bytes straight into the fragments of an mma: a
// quad of lanes holds 32 bytes of a row, so lane t of it the weights 16t ... 16t + 15 of the unit; step s of four
// multiplies the weights 4s ... 4s + 3 of each lane, and x is loaded in that order. The scale of a unit multiplies its
// finished products in float: weights beyond float16 cost nothing.
#pragma once
#include "nf4_few.cuh"

namespace llamakern::cuda {

constexpr int64_t kStreamTokens = 32;
constexpr int kStreamWarps = 8, kStreamThreads = 32 * kStreamWarps, kStreamRows = 32, kStreamUnit = 64;
static_assert(kStreamThreads == 256);  // a thread makes the table of one byte

// The factor with which the 16 codes round best to bfloat16: a root mean square error of 0.63e-3 instead of 1.06e-3.
template <typename T>
constexpr float kCodeFactor = std::is_same_v<T, bfloat16> ? 1.437f : 1.0f;

template <typename T>
bool can_stream(const Nf4Linear<T>& p) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return !std::is_same_v<T, float> && p.M <= kStreamTokens && p.w.K % kStreamUnit == 0 && p.w.block_shift >= 6 &&
         aligned(p.w.codes) && aligned(p.x) && p.x_row % 8 == 0;
}

// What a warp needs of one unit, for four groups of eight rows of W and kTiles of 16 tokens.
template <typename T, int kTiles>
struct StreamStage {
  uint2 bytes[4];         // of row lane / 4 of each group
  float scale[4];         // of that row
  uint4 x[kTiles][2][2];  // of tokens lane / 4 and lane / 4 + 8: 16 elements

  LK_DEVICE void load(const Nf4Linear<T>& p, int64_t first_row, int64_t unit) {
    const int64_t K = p.w.K, k = unit * kStreamUnit;
    if (k >= K) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t begin = min64(first_row + 8 * j + g, p.w.N - 1) * K + k;
      bytes[j] = *reinterpret_cast<const uint2*>(p.w.codes + (begin + 16 * t) / 2);
      scale[j] = block_scale(p.w, begin >> p.w.block_shift);
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int64_t m = 8 * i + g;
      const uint4* from = reinterpret_cast<const uint4*>(p.x + m * p.x_row + k + 16 * t);
#pragma unroll
      for (int half = 0; half < 2; ++half) x[i / 2][i % 2][half] = m < p.M ? from[half] : uint4{};
    }
  }

  // sums[j][i] += x W of the unit: fragments of C of tokens 16i ... and rows 8j ....
  LK_DEVICE void multiply(float (&sums)[4][kTiles][4], const uint32_t* table) const {
    uint32_t a[kTiles][4][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int low = 0; low < 2; ++low) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 v = x[i][low][half];
          a[i][2 * half][low] = v.x;
          a[i][2 * half][low + 2] = v.y;
          a[i][2 * half + 1][low] = v.z;
          a[i][2 * half + 1][low + 2] = v.w;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t pair[8];
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        const uint32_t four = b < 4 ? bytes[j].x : bytes[j].y;
        const uint32_t row = (b % 4 ? four >> (8 * (b % 4) - 5) : four << 5) & 255 << 5;  // byte b times 32
        pair[b] = table[row | threadIdx.x % 32];
      }
      // Those of the columns of C that the lane holds.
      float columns[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) columns[e] = __shfl_sync(~0u, scale[j], (threadIdx.x % 4 * 2 + e) * 4);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float product[4] = {};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint32_t b[2] = {pair[2 * s], pair[2 * s + 1]};
          mma<T>(product, a[i][s], b);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[j][i][e] = fmaf(product[e], columns[e % 2], sums[j][i][e]);
      }
    }
  }
};

// The two weights of each byte, a copy for each lane: no lookup waits for another. Later the sums of the warps.
constexpr int kStreamTable = 256 * 32;

// y[m][n] = x Wᵀ + term(m, n) + bias for the 32 rows of W that are this block's; `table` is shared memory.
template <typename T, int kTiles, typename Term>
LK_DEVICE void nf4_stream_rows(const Nf4Linear<T>& p, const Term& term, uint32_t* table) {
  constexpr int kAhead = 2, kTokens = 16 * kTiles;
  static_assert(kStreamWarps * kTokens * kStreamRows <= kStreamTable);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t n0 = int64_t(blockIdx.x) * kStreamRows, units = p.w.K / kStreamUnit;

  StreamStage<T, kTiles> stage[kAhead];
#pragma unroll
  for (int s = 0; s < kAhead; ++s) stage[s].load(p, n0, warp + s * kStreamWarps);
  float code[8];
  decode_codes(code, threadIdx.x);
  const uint32_t pair = narrow2<T>(code[0] * kCodeFactor<T>, code[1] * kCodeFactor<T>);
  for (int i = 0; i < 32; ++i) table[threadIdx.x * 32 + (lane + i) % 32] = pair;
  __syncthreads();

  float sums[4][kTiles][4] = {};
  for (int64_t unit = warp; unit < units; unit += kAhead * kStreamWarps) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int64_t now = unit + s * kStreamWarps;
      if (now >= units) break;
      stage[s].multiply(sums, table);
      stage[s].load(p, n0, now + kAhead * kStreamWarps);
    }
  }

  __syncthreads();
  float* parts = reinterpret_cast<float*>(table);  // [warp][token][row]
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = 16 * i + lane / 4 + e / 2 * 8, n = 8 * j + lane % 4 * 2 + e % 2;
        parts[(warp * kTokens + m) * kStreamRows + n] = sums[j][i][e];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kStreamRows; i += kStreamThreads) {
    const int64_t m = i / kStreamRows, n = n0 + i % kStreamRows;
    if (m >= p.M || n >= p.w.N) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kStreamWarps; ++w) sum += parts[w * kTokens * kStreamRows + i];
    const float y = sum * (1.0f / kCodeFactor<T>)+term.share(m, n, 0, 1);
    p.y[m * p.w.N + n] = narrow<T>(p.bias ? y + p.bias[n] : y);
  }
}

template <typename T, int kTiles, typename Term>
__global__ void __launch_bounds__(kStreamThreads, kTiles == 1 ? 2 : 1)
    nf4_stream_kernel(const Nf4Linear<T> p, const Term term) {
  __shared__ uint32_t table[kStreamTable];
  nf4_stream_rows<T, kTiles>(p, term, table);
}

template <typename T, typename Term>
void nf4_stream(const Nf4Linear<T>& p, const Term& term, Stream stream) {
  const auto kernel = p.M <= 16 ? nf4_stream_kernel<T, 1, Term> : nf4_stream_kernel<T, 2, Term>;
  LK_LAUNCH_AS("nf4_stream_kernel", kernel, dim3(unsigned(ceil_div(p.w.N, kStreamRows))), kStreamThreads, 0, stream)(
      p, term);
  check_launch("nf4_stream_kernel");
}

// Whether it could: few tokens, or so few that single lanes can do it.
template <typename T, typename Term>
bool nf4_few_tokens(const Nf4Linear<T>& p, const Term& term, Stream stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (can_stream(p)) {
      nf4_stream(p, term, stream);
      return true;
    }
  }
  if (p.M > kFewTokens) return false;
  nf4_few(p, term, stream);
  return true;
}

}  // namespace llamakern::cuda
