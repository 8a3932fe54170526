// A block on the CPU: the kernels of the other rooms, one after the other, over working memory that stays warm.
#include "block.h"

#include <algorithm>
#include <initializer_list>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/vec.h"
#include "../norm/norm.h"
#include "../rope/rope.h"
#include "../swiglu/swiglu.h"

namespace llamakern::LK_ISA {

// This set's kernel of another room.
template <typename Params>
static void step(const Params& params) {
  run_on(kThisIsa, params);
}

// y, and s = x + residual where there is one: norm(s)·weight
template <typename T>
static void normed(T* y, T* s, const T* x, int64_t x_row, const T* residual, int64_t residual_row,
                   const Either<T>& weight, const BlockDecode<T>& p) {
  const auto with = [&]<typename W>(const W* of) {
    step(RmsNorm<T, W>{.y = y,
                       .s = s,
                       .x = x,
                       .residual = residual,
                       .weight = of,
                       .x_row = x_row,
                       .residual_row = residual_row,
                       .eps = p.eps,
                       .M = p.B,
                       .C = p.C});
  };
  weight.wide ? with(weight.wide) : with(weight.same);
}

template <typename T>
static void linear(T* y, const T* x, const Nf4Matrix& w, const BlockDecode<T>& p) {
  step(Nf4Linear<T>{.y = y, .x = x, .x_row = w.K, .w = w, .bias = {}, .M = p.B});
}

// Up to three weights over the same x.
template <typename T>
static void linears(const T* x, const BlockDecode<T>& p, std::initializer_list<T*> y,
                    std::initializer_list<Nf4Matrix> w) {
  Nf4Linears<T> some{.y = {}, .w = {}, .x = x, .x_row = p.C, .count = int(w.size()), .M = p.B};
  std::copy(y.begin(), y.end(), some.y);
  std::copy(w.begin(), w.end(), some.w);
  step(some);
}

// x [B, heads·D] -> y, each row turned to its newest position.
template <typename T>
static void turned(T* y, const T* x, int64_t heads, const int64_t* positions, const BlockDecode<T>& p) {
  step(Rope<T>{.y = y,
               .x = x,
               .x_batch = heads * p.D,
               .x_token = heads * p.D,
               .x_head = p.D,
               .cos = p.cos,
               .sin = p.sin,
               .angle_batch = 0,
               .positions = positions,
               .position_batch = 1,
               .interleaved = p.interleaved,
               .sign = 1.0f,
               .B = p.B,
               .T_ = 1,
               .H = heads,
               .D = p.D});
}

template <typename T>
static Heads<T> rows_of_heads(T* data, int64_t heads, int64_t D) {
  return {data, heads * D, heads * D, D};
}

// q [B, H·D] and the new k, v [B, Hkv·D] -> y [B, H·D]; k and v go to the cache.
template <typename T>
static void attended(T* y, T* q, T* k, T* v, const BlockDecode<T>& p) {
  step(CacheAppend<T>{.k_cache = p.k_cache,
                      .v_cache = p.v_cache,
                      .k = rows_of_heads<const T>(k, p.Hkv, p.D),
                      .v = rows_of_heads<const T>(v, p.Hkv, p.D),
                      .lengths = p.lengths,
                      .block_table = nullptr,
                      .table_width = 0,
                      .block = p.S,
                      .B = p.B,
                      .T_ = 1,
                      .Hkv = p.Hkv,
                      .D = p.D});
  const auto read = [](const Heads<T>& h) { return Heads<const T>{h.data, h.batch, h.token, h.head}; };
  Scratch<float> lse(p.B * p.H);
  step(AttentionForward<T>{.y = rows_of_heads(y, p.H, p.D),
                           .lse = lse,
                           .in = {.q = rows_of_heads<const T>(q, p.H, p.D),
                                  .k = read(p.k_cache),
                                  .v = read(p.v_cache),
                                  .starts_q = nullptr,
                                  .starts_k = nullptr,
                                  .lengths = p.lengths,
                                  .block_table = nullptr,
                                  .table_width = 0,
                                  .block = p.S,
                                  .mask = {Mask::kNone, nullptr, 0, 0, 0, 0},
                                  .sight = {.causal = true, .top_left = false, .window = 0, .chunk = 0},
                                  .scale = default_scale(p.D),
                                  .sequences = p.B,
                                  .T_ = 1,
                                  .S = p.S,
                                  .H = p.H,
                                  .Hkv = p.Hkv,
                                  .D = p.D}});
}

// y = s + x, rounded once
template <typename T>
static void add(T* y, const T* s, const T* x, int64_t n) {
  for_vectors(n, [=](int64_t i, auto left) { store(y + i, load(s + i, left) + load(x + i, left), left); });
}

template <typename T>
static void block_decode(const BlockDecode<T>& p) {
  const int64_t B = p.B, heads = p.H * p.D, kv_heads = p.Hkv * p.D;
  Scratch<T> h(B * p.C), s(B * p.C), out(B * p.C);
  {
    Scratch<int64_t> positions(B);
    for (int64_t b = 0; b < B; ++b) positions[b] = p.lengths[b] - 1;
    Scratch<T> q(B * heads), k(B * kv_heads), v(B * kv_heads), q_turned(B * heads), k_turned(B * kv_heads);
    normed<T>(h, nullptr, p.x, p.x_row, nullptr, 0, p.attention_norm, p);
    linears<T>(h, p, {q, k, v}, {p.q, p.k, p.v});
    turned<T>(q_turned, q, p.H, positions, p);
    turned<T>(k_turned, k, p.Hkv, positions, p);
    attended<T>(q, q_turned, k_turned, v, p);
    linear<T>(out, q, p.o, p);
  }
  normed<T>(h, s, out, p.C, p.x, p.x_row, p.ffn_norm, p);
  Scratch<T> gate(B * p.F), up(B * p.F);
  linears<T>(h, p, {gate, up}, {p.gate, p.up});
  step(Swiglu<T>{.y = gate, .gate = gate, .up = up, .gate_row = p.F, .up_row = p.F, .M = B, .F = p.F});
  linear<T>(out, gate, p.down, p);
  add<T>(p.y, s, out, B * p.C);
}

LK_KERNEL(BlockDecode<float>, block_decode<float>);
LK_KERNEL(BlockDecode<bfloat16>, block_decode<bfloat16>);
LK_KERNEL(BlockDecode<float16>, block_decode<float16>);

}  // namespace llamakern::LK_ISA
