// The launchers of the kernels here. Raw pointers, row-major.
#pragma once
#include <cstddef>
#include <map>
#include <string>

#include "../../csrc/common/ptx.cuh"

using namespace llamakern;
using namespace llamakern::cuda;

template <typename T>
struct Gemm {
  float* c;     // [M, N]  out, C = A Bᵀ
  const T* a;   // [M, K]
  const T* b;   // [N, K]
  int M, N, K;  // K a multiple of 8
};
template <typename T>
void gemm(const Gemm<T>& p);

struct Attention {
  bfloat16* o;                // [H, T, 64]  out, softmax(q kᵀ scale) v, causal
  const bfloat16 *q, *k, *v;  // [H, T, 64]
  float scale;
  int H, T;
};
void attention(const Attention& p);

void row_sum(float* y, const float* x, int rows, int columns);    // y[r] = Σ x[r, :]
void sum(float* y, const float* x, int n);                        // *y += Σ x, over many blocks
void halves_sum(float* y, const bfloat16* x, int n, int blocks);  // y[b] = Σ x by every block b

void peek(float* y, const float* x, int threads = 1);  // *y = *x

// *y = Σ x by whichever block comes last; partial [blocks], counter one zero, which is left zero.
void sum_by_last(float* y, const float* x, int n, float* partial, unsigned* counter);
constexpr int kSumBlock = 256;

void column_sum(float* y, const float* x, int tiles);  // y[i] = Σ x[:, i], [tiles, 128]
void handed_on(int* y, int threads);               // y[0] += the numbers of threads, one after another by the flag y[1]
void locked_sum(int* y, int blocks, int threads);  // y[0] += 1 by every thread, under the lock y[1]

// Each warp instruction on numbers whose answers can be written down.
constexpr int kInstructions = 64;
void instructions(int* y);                                       // [32, kInstructions]
void matrix_products(float* c, const float* a, const float* b);  // [3, 16, 8] = bf16, f16, tf32 of [16, 16] x [16, 8]
void traffic(float* y, const float* x);                          // x, y [1024]: some lines that use memory badly

const std::map<std::string, void (*)(float* y, const float* x)>& bugs();  // x, y [192]
void switches(int rounds, int threads);
