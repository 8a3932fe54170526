// Causal attention forward, head dimension 64. A block owns 64 queries of one head, each of its 4 warps 16 of them.
// Tiles of 64 keys and values arrive by cp.async in two buffers; the softmax is kept online, in base 2.
#include "proof.h"

namespace {

constexpr int kD = 64, kTile = 64, kThreads = 128;
constexpr int kRow = kD + 8;  // +8: the 8 rows of an ldmatrix fall in different banks

struct Storage {
  bfloat16 q[kTile][kRow];
  bfloat16 k[2][kTile][kRow];
  bfloat16 v[2][kTile][kRow];
};

LK_DEVICE void load_tile(bfloat16 (*tile)[kRow], const bfloat16* x, int t0, int T) {
  for (int i = threadIdx.x; i < kTile * kD / 8; i += kThreads) {
    const int t = i / (kD / 8), d = i % (kD / 8) * 8;
    const bool inside = t0 + t < T;
    cp_async<16>(&tile[t][d], inside ? x + int64_t(t0 + t) * kD + d : x, inside ? 16 : 0);
  }
}

// Over the 4 lanes that share a row of a fragment.
LK_DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
LK_DEVICE float row_sum4(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__global__ void __launch_bounds__(kThreads) attention_kernel(Attention p) {
  LK_DYNAMIC_SHARED(Storage, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int t0 = blockIdx.x * kTile, row0 = t0 + 16 * warp + lane / 4;  // this lane's rows: row0 and row0 + 8
  const int64_t head = int64_t(blockIdx.y) * p.T * kD;
  const float scale = p.scale * 1.44269504f;  // exp(x) = 2^(x log2 e)

  load_tile(s.q, p.q + head, t0, p.T);
  load_tile(s.k[0], p.k + head, 0, p.T);
  load_tile(s.v[0], p.v + head, 0, p.T);
  cp_async_commit();

  uint32_t q[kD / 16][4];
  float o[kD / 8][4] = {};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  const int tiles = blockIdx.x + 1;
  for (int tile = 0; tile < tiles; ++tile) {
    const int now = tile % 2;
    if (tile + 1 < tiles) {
      load_tile(s.k[now ^ 1], p.k + head, (tile + 1) * kTile, p.T);
      load_tile(s.v[now ^ 1], p.v + head, (tile + 1) * kTile, p.T);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int d = 0; d < kD / 16; ++d) ldmatrix(q[d], &s.q[16 * warp + lane % 16][16 * d + lane / 16 * 8]);
    }

    float x[kTile / 8][4] = {};  // scores, then probabilities
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
        uint32_t k[2];
        ldmatrix(k, &s.k[now][8 * j + lane % 8][16 * d + lane / 8 % 2 * 8]);
        mma<bfloat16>(x[j], q[d], k);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + 8 * h;
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = tile * kTile + 8 * j + lane % 4 * 2 + e;
          float& score = x[j][2 * h + e];
          score = column <= row ? score * scale : -INFINITY;
          top = fmaxf(top, score);
        }
      }
      const float m_new = fmaxf(m[h], row_max(top));  // finite: every row sees key 0 in tile 0
      const float rescale = exp2_approx(m[h] - m_new);
      m[h] = m_new;
      l[h] *= rescale;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = x[j][2 * h + e];
          score = exp2_approx(score - m_new);
          l[h] += score;
          o[j][2 * h + e] *= rescale;  // kTile == kD: as many columns of o as of scores
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTile / 16; ++t) {
      uint32_t probability[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &x[2 * t + i / 2][i % 2 * 2];
        probability[i] = pack(narrow<bfloat16>(pair[0]), narrow<bfloat16>(pair[1]));
      }
#pragma unroll
      for (int d = 0; d < kD / 8; ++d) {
        uint32_t v[2];
        ldmatrix<true>(v, &s.v[now][16 * t + lane % 16][8 * d]);
        mma<bfloat16>(o[d], probability, v);
      }
    }
    __syncthreads();  // the next tile overwrites this one
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + 8 * h;
    const float inverse = 1.0f / row_sum4(l[h]);
    if (row >= p.T) continue;
#pragma unroll
    for (int d = 0; d < kD / 8; ++d) {
      const uint32_t pair = pack(narrow<bfloat16>(o[d][2 * h] * inverse), narrow<bfloat16>(o[d][2 * h + 1] * inverse));
      *reinterpret_cast<uint32_t*>(p.o + head + int64_t(row) * kD + 8 * d + lane % 4 * 2) = pair;
    }
  }
}

}  // namespace

void attention(const Attention& p) {
  const dim3 grid((p.T + kTile - 1) / kTile, p.H);
#ifdef __CUDACC__
  cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Storage)));
#endif
  LK_LAUNCH(attention_kernel, grid, kThreads, sizeof(Storage), 0)(p);
}
