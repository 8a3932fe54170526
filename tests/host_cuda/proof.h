// The proof kernels' launchers. Raw pointers, row-major.
#pragma once
#include <cstddef>
#include "../../csrc/common/ptx.cuh"

using namespace llamakern;
using namespace llamakern::cuda;

template <typename T>
struct Gemm {
  float*   c;  // [M, N]  out, C = A Bᵀ
  const T* a;  // [M, K]
  const T* b;  // [N, K]
  int      M, N, K;  // K a multiple of 8
};
template <typename T> void gemm(const Gemm<T>& p);

struct Attention {
  bfloat16*       o;        // [H, T, 64]  out, softmax(q kᵀ scale) v, causal
  const bfloat16 *q, *k, *v;  // [H, T, 64]
  float       scale;
  int         H, T;
};
void attention(const Attention& p);

void row_sum(float* y, const float* x, int rows, int columns);  // y[r] = Σ x[r, :]
void sum(float* y, const float* x, int n);                       // *y += Σ x, over many blocks

void column_sum(float* y, const float* x, int tiles);            // y[i] = Σ x[:, i], [tiles, 128]

void instructions(int* y);  // [32, 32]

// Runs one of the seeded bugs, 0 for the correct form.
enum Bug { kNone, kMissingBarrier, kDivergentBarrier, kReadPastEnd, kSharedWritePastEnd, kMissingWait, kUnwritten, kMisaligned,
           kBlocksCollide, kMissingWarpSync, kDivergentWarp, kNamedBarrierCount, kOverflow };
void buggy(float* y, const float* x, int n, Bug bug);
void switches(int rounds, int threads);
