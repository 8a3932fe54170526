// A decoder block for the newest token of each row, over NF4 weights: one call in place of a dozen, so that nothing but
// kernels runs between two reads of weights.
//
//   h = norm(x)·attention_norm        q = h Wqᵀ     k = h Wkᵀ     v = h Wvᵀ        q and k turned to position n - 1
//   k_cache[n - 1] = k                v_cache[n - 1] = v                           n = lengths[b]
//   s = x + (softmax(q k_cacheᵀ / √D) v_cache) Woᵀ
//   g = norm(s)·ffn_norm              y = s + (silu(g Wgateᵀ)·(g Wupᵀ)) Wdownᵀ
//
// Each step is the kernel of its own room, so the bits are those of the steps one by one.
// Shapes: B rows, C model width, S places of the cache, H query heads, Hkv key/value heads, D head_dim, F hidden width.
#pragma once
#include "../attention/attention.h"
#include "../nf4/nf4.h"

namespace llamakern {

template <typename T>
struct BlockDecode {
  T* y;                                // [B, C]  out
  const T* x;                          // [B, C]  rows at x_row
  Either<T> attention_norm, ffn_norm;  // [C]
  Nf4Matrix q, k, v, o;                // [H·D, C]  [Hkv·D, C]  [Hkv·D, C]  [C, H·D]
  Nf4Matrix gate, up, down;            // [F, C]  [F, C]  [C, F]
  const float *cos, *sin;              // [positions, D/2]
  Heads<T> k_cache, v_cache;           // [B, S, Hkv, D]
  const int32_t* lengths;              // [B], the new token counts: 1 to S
  int64_t x_row;
  float eps;
  bool interleaved;  // rope's layout
  int64_t B, C, S, H, Hkv, D, F;
};

}  // namespace llamakern
