// The keys of LLaMA-Excitor (arXiv 2404.00913, section 3): to each token's key its own mixture of learned prompts is
// added, scaled by a gate.
//
//   z    = x Aᵀ                    e_h = s·z B_hᵀ
//   u    = τ·e_h P_hᵀ              w   = softmax of u over the prompts
//   K'_h = K_h + g_h·ρ(w V_h)      V is P where prompts are keys and values; ρ turns by RoPE, or is the identity
//
// e is not formed: u = z W_hᵀ with W_h = τ·s·P_h B_h, which holds for all tokens. With full_width there is one u for
// all heads, the sum of theirs.
//
// Backward, d being the gradient of K' turned back by ρᵀ; z is kept, u and w are made again:
//
//   dw = g_h·d V_hᵀ                dg_h = Σ w ⊙ (d V_hᵀ)          dV_h = g_h·wᵀ d
//   du = w ⊙ (dw - rowsum(dw ⊙ w))
//   dz = Σ_h du W_h                dW_h = duᵀ z
//   dP_h = τ·s·dW_h B_hᵀ           dB_h = τ·s·P_hᵀ dW_h           dK = dK'
//   dA = dzᵀ x                     dx = dz A
//
// Shapes: B batch, T tokens, M = B·T, C width, H key heads, D head_dim, P prompts, R rank, N prompts of their own: B
// or 1. T is the activations' type; what is learned is float.
#pragma once
#include "../common/types.h"

namespace llamakern {

constexpr int64_t kExcitorMaxD = 256;

// Heads of tokens, the last dimension contiguous; strides in elements.
template <typename T>
struct TokenHeads {
  T* data;  // [B, T, H, D]
  int64_t batch, token, head;

  LK_HD T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

// What forward and backward read beside x.
struct Excitor {
  const float* a;        // [R, C]
  const float* b;        // [H, D, R]
  const float* prompts;  // [N, P, H, D]
  const float* values;   // [N, P, H, D]  prompts again where they are keys and values
  const float* gate;     // [H], or one for all heads: then gate_head is 0
  int64_t gate_head;     // stride
  const float* cos;      // [T, D/2] angles by which ρ turns; null: it does not
  const float* sin;      // likewise
  int64_t angle_batch;   // stride of the angles over the batch, 0 where all rows share them
  bool interleaved;      // the pairs that ρ turns: (2i, 2i + 1), or (i, i + D/2)
  float scale;           // τ·s
  bool full_width;       // one softmax for all heads
  int64_t N, B, T_, C, H, D, P, R;

  LK_HD float gate_of(int64_t h) const { return gate[h * gate_head]; }
};

template <typename T>
struct ExcitorKeys {
  Excitor in;
  TokenHeads<T> y;  // [B, T, H, D], or with `beside` [B, T, H, 2D]: K, then g·w V  out
  float* z;         // [M, R]  out: the backward reads it
  const T* x;       // [M, C]  row stride x_row
  int64_t x_row;
  TokenHeads<const T> k;  // [B, T, H, D]
  bool beside;
};

template <typename T>
struct ExcitorKeysBackward {
  Excitor in;
  T* dx;                      // [M, C]  out, or null
  float *da, *db;             // [R, C], [H, D, R]  out
  float *dprompts, *dvalues;  // [N, P, H, D]  out; dvalues is null where prompts are keys and values
  float* dgate;               // [H] or [1]  out
  TokenHeads<const T> dy;     // [B, T, H, D]  gradient of what was added to K
  const T* x;                 // [M, C]  row stride x_row
  int64_t x_row;
  const float* z;  // [M, R]
};

}  // namespace llamakern
