// SwiGLU on the CPU: one pass over memory each way.
#include "swiglu.h"

#include "../common/parallel.h"
#include "../common/vec.h"

namespace llamakern::LK_ISA {

// 1 / (1 + exp(-g)). Sixteen bits do not see that the product of a large g and log2(e) is rounded.
template <typename T>
static Vec sigmoid(Vec g) {
  const Vec e = sizeof(T) == 2 ? exp2(g * -1.44269504f) : exp(-g);
  return broadcast(1.0f) / (broadcast(1.0f) + e);
}

// fn(m, f, count) for pieces of rows that together are [M, F].
template <typename Fn>
static void for_pieces(int64_t M, int64_t F, const Fn& fn) {
  parallel_ranges(M * F, 16384, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t m = begin / F, f = begin % F, count = min64(F - f, end - begin);
      fn(m, f, count);
      begin += count;
    }
  });
}

template <typename T>
static void swiglu(const Swiglu<T>& p) {
  for_pieces(p.M, p.F, [&](int64_t m, int64_t f, int64_t count) {
    T* y = p.y + m * p.F + f;
    const T *gate = p.gate + m * p.gate_row + f, *up = p.up + m * p.up_row + f;
    for_vectors(count, [=](int64_t i, auto n) {
      const Vec g = load(gate + i, n);
      store(y + i, g * sigmoid<T>(g) * load(up + i, n), n);
    });
  });
}

template <typename T>
static void swiglu_backward(const SwigluBackward<T>& p) {
  for_pieces(p.M, p.F, [&](int64_t m, int64_t f, int64_t count) {
    T *dgate = p.dgate + m * p.F + f, *dup = p.dup + m * p.F + f;
    const T* dy = p.dy + m * p.dy_row + f;
    const T *gate = p.gate + m * p.gate_row + f, *up = p.up + m * p.up_row + f;
    for_vectors(count, [=](int64_t i, auto n) {
      const Vec g = load(gate + i, n), d = load(dy + i, n), s = sigmoid<T>(g), silu = g * s;
      store(dup + i, d * silu, n);
      store(dgate + i, d * load(up + i, n) * (s + silu * (broadcast(1.0f) - s)), n);
    });
  });
}

LK_KERNEL(Swiglu<float>, swiglu);
LK_KERNEL(Swiglu<bfloat16>, swiglu);
LK_KERNEL(Swiglu<float16>, swiglu);
LK_KERNEL(SwigluBackward<float>, swiglu_backward);
LK_KERNEL(SwigluBackward<bfloat16>, swiglu_backward);
LK_KERNEL(SwigluBackward<float16>, swiglu_backward);

}  // namespace llamakern::LK_ISA
