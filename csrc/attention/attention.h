// Scaled dot-product attention with grouped-query heads; the (T, S) matrix is never in memory.
//
//   s_tj = scale·⟨q_t, k_j⟩ + mask_tj       p = softmax_j(s)       y_t = Σ_j p_tj v_j       lse_t = log Σ_j exp(s_tj)
//
//   delta_t = ⟨dy_t, y_t⟩ - dlse_t          dp_tj = ⟨dy_t, v_j⟩     ds_tj = p_tj (dp_tj - delta_t)
//   dq_t = scale·Σ_j ds_tj k_j              dk_j = scale·Σ_t ds_tj q_t               dv_j = Σ_t p_tj dy_t
//
// A query that may see no key gives y = 0, lse = -inf and gradient 0.
//
// LLaMA-Adapter's prompts (arXiv 2303.16199, eq. 6 to 8) add a softmax of their own, without a mask, to what words
// give:
//
//   a_tp = softmax_p(scale·⟨q_t, pk_p⟩)     y_t += g Σ_p a_tp pv_p        g of the query head, as it is
//
//   da_tp = ⟨dy_t, pv_p⟩    o_t = Σ_p a_tp da_tp    ds_tp = g a_tp (da_tp - o_t)    dg = Σ_t o_t
//   dq_t += scale·Σ_p ds_tp pk_p            dpk_p = scale·Σ_t ds_tp q_t              dpv_p = Σ_t g a_tp dy_t
//
// and delta_t is of the words' part of y: less g o_t. A query that sees no word keeps its prompts.
//
// Shapes: B batch, T query tokens, S key tokens, H query heads, Hkv key/value heads, D head_dim, P prompt length.
// G = H / Hkv query heads share a key/value head: query head h reads head h / G.
#pragma once
#include <cmath>

#include "../common/types.h"

namespace llamakern {

constexpr int64_t kMaxHeadDim = 256;

inline float default_scale(int64_t D) { return float(1.0 / std::sqrt(double(D))); }

// [B, T, H, D] with any strides (in elements) but a contiguous last dimension.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, token, head;

  LK_HD T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

// Keys [begin, end) of a sequence.
struct Keys {
  int64_t begin, end;
};

// Which keys a query may see by its place alone. Query t of T stands at i = S - T + t (bottom-right), or at i = t
// (top_left).
struct Sight {
  bool causal;  // j <= i
  bool top_left;
  int64_t window;  // 0, or i - window < j, and j < i + window where not causal
  int64_t chunk;   // 0, or floor(j / chunk) = floor(i / chunk)

  LK_HD Keys keys(int64_t t, int64_t T, int64_t S) const {
    const int64_t i = top_left ? t : S - T + t;
    Keys seen{0, S};
    if (causal) seen.end = min64(seen.end, i + 1);
    if (window) {
      seen.begin = max64(seen.begin, i - window + 1);
      if (!causal) seen.end = min64(seen.end, i + window);
    }
    if (chunk) {
      const int64_t first = (i >= 0 ? i / chunk : -ceil_div(-i, chunk)) * chunk;
      seen.begin = max64(seen.begin, first);
      seen.end = min64(seen.end, first + chunk);
    }
    return seen.begin < seen.end ? seen : Keys{0, 0};
  }
};

// A mask broadcast to (B, H, T, S) by strides that are 0 where it has one element. bool: true = attend; float: added to
// s, where the lowest value of its type hides as -inf does.
struct Mask {
  enum Kind { kNone, kBool, kFloat, kBfloat16, kFloat16 } kind;
  const void* data;
  int64_t batch, head, token, key;
};

template <typename T>
struct Prompts {
  Heads<const T> k, v;  // [B, P, Hkv, D]; a batch stride of 0 where all rows share them
  const float* gate;    // [H], or null: there are no prompts
  int64_t P, B;         // B: the rows of the batch that have prompts of their own, 1 where they share them
};

// Where one sequence lies: batch row, first token and count of queries and of keys.
struct Sequence {
  int64_t b, q_begin, T, k_begin, S;
};

template <typename T>
struct Attended {
  Heads<const T> q;     // [B, T, H, D]
  Heads<const T> k, v;  // [B, S, Hkv, D], or [blocks, block, Hkv, D] with a block_table
  const int32_t *starts_q,
      *starts_k;               // null, or [sequences + 1]: the sequences are packed one after the other in b = 0
  const int32_t* lengths;      // null, or [B]: the keys of row b are the first lengths[b]
  const int32_t* block_table;  // null, or [B, table_width]: key j of row b lies in block block_table[b][j / block]
  int64_t table_width, block;
  Mask mask;
  Sight sight;
  float scale;
  int64_t sequences;  // B where they are not packed
  int64_t T_, S, H, Hkv, D;
  Prompts<T> prompts = {};

  LK_HD int64_t G() const { return H / Hkv; }
  LK_HD Sequence sequence(int64_t n) const {
    if (starts_q) return {0, starts_q[n], starts_q[n + 1] - starts_q[n], starts_k[n], starts_k[n + 1] - starts_k[n]};
    return {n, 0, T_, 0, lengths ? lengths[n] : S};
  }
};

template <typename T>
struct AttentionForward {
  Heads<T> y;  // [B, T, H, D]  out
  float* lse;  // [B, H, T]     out
  Attended<T> in;
};

template <typename T>
struct AttentionBackward {
  Heads<T> dq, dk, dv;      // out, shapes of q, k, v
  Heads<const T> y, dy;     // [B, T, H, D]
  const float *lse, *dlse;  // [B, H, T]; dlse may be null
  Attended<T> in;
  Heads<T> dprompt_k = {}, dprompt_v = {};  // out, shapes of in.prompts: [in.prompts.B, P, Hkv, D]
  float* dprompt_gate = nullptr;            // [H]  out
};

// Writes k and v to the last T places of each row's first lengths[b].
template <typename T>
struct CacheAppend {
  Heads<T> k_cache, v_cache;   // [B, S, Hkv, D], or [blocks, block, Hkv, D] with a block_table
  Heads<const T> k, v;         // [B, T, Hkv, D]
  const int32_t* lengths;      // [B]
  const int32_t* block_table;  // null, or [B, table_width]
  int64_t table_width, block;
  int64_t B, T_, Hkv, D;
};

}  // namespace llamakern
