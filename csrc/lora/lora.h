// LoRA (arXiv 2106.09685, eq. 3) over a dense or an NF4 base weight, forward and backward.
//
//   h  = drop(x) Aᵀ                      y  = x Wᵀ + s·h Bᵀ + bias
//   g  = dy B                            dx = dy W + s·drop(g A)          the second term is R more columns of the
//   reduction dA = s·gᵀ drop(x)                    dB = s·dyᵀ h
//
// drop keeps element (m, k) where dropout_keeps says so, and multiplies it by 1 / (1 - p); the backward makes the same
// mask again from the seed. With B = 0 the sums of the base are untouched, bit for bit.
//
// Shapes: M tokens, N out_features, K in_features, R rank. T is the activations' type, P the adapter's: T or float.
#pragma once
#include "../nf4/nf4.h"

namespace llamakern {

// The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014).
LK_HD uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// One 32-bit draw for element k of a row whose two keys are given. U is uint32_t or a vector of them.
template <typename U>
LK_HD U dropout_draw(U k, U key, U offset) {
  U z = (k ^ key) * 0x9e3779b1u + offset;
  z = (z ^ (z >> 16)) * 0x85ebca6bu;
  z = (z ^ (z >> 13)) * 0xc2b2ae35u;
  return z ^ (z >> 16);
}

struct Dropout {
  const int64_t* seed = nullptr;  // one; null where nothing is dropped
  uint32_t threshold = 0;         // p·2^32: a smaller draw drops
  float keep_scale = 1.0f;        // 1 / (1 - p)

  // The keys of row m: the low and the high half.
  LK_HD uint64_t row_keys(int64_t m) const { return mix64(uint64_t(*seed) + uint64_t(m + 1) * 0x9e3779b97f4a7c15u); }
};

template <typename P>
struct Lora {
  const P* a;  // [R, K]
  const P* b;  // [N, R]
  int64_t R;
  float scale;
  Dropout drop;
};

template <typename T, typename P>
struct LoraLinear {
  T* y;           // [M, N]  out
  float* h;       // [M, R]  out: the backward reads it
  const T* base;  // [M, N]  x Wᵀ + bias, or null: then it is computed here, in one reduction with the adapter
  const T* x;     // [M, K]  row stride x_row
  int64_t x_row;
  const T* w;  // [N, K]  beside a base, it and bias are read where T is too short for an element of it, but not for y
  Either<T> bias;  // [N] or null
  Lora<P> lora;
  int64_t M, N, K;
};

template <typename T, typename P>
struct Nf4LoraLinear {
  T* y;        // [M, N]  out
  float* h;    // [M, R]  out: the backward reads it
  const T* x;  // [M, K]  row stride x_row
  int64_t x_row;
  Nf4Matrix w;
  Either<T> bias;  // [N] or null
  Lora<P> lora;
  int64_t M;
};

// dA and dB: the same whatever the base is.
template <typename T, typename P>
struct AdapterBackward {
  P *da, *db;   // [R, K], [N, R]  out
  const T* dy;  // [M, N]  row stride dy_row
  int64_t dy_row;
  const T* x;  // [M, K]  row stride x_row
  int64_t x_row;
  const float* h;  // [M, R]
  Lora<P> lora;
  int64_t M, N, K;
};

template <typename T, typename P>
struct LoraLinearBackward {
  T* dx;       // [M, K]  out, or null
  const T* w;  // [N, K]
  AdapterBackward<T, P> adapter;
};

template <typename T, typename P>
struct Nf4LoraLinearBackward {
  T* dx;  // [M, K]  out, or null
  Nf4Matrix w;
  AdapterBackward<T, P> adapter;
};

}  // namespace llamakern
