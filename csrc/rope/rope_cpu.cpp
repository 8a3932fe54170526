// RoPE on the CPU: each task turns the heads of some tokens.
#include "rope.h"

#include "../common/parallel.h"
#include "../common/vec.h"

namespace llamakern::LK_ISA {

template <typename T>
static void turn_halves(T* y, const T* x, const float* cos, const float* sin, float sign, int64_t half) {
  for_vectors(half, [=](int64_t i, auto n) {
    Vec a = load(x + i, n), b = load(x + half + i, n);
    rope_rotate(a, b, load(cos + i, n), load(sin + i, n) * sign);
    store(y + i, a, n);
    store(y + half + i, b, n);
  });
}

template <typename T>
static void turn_neighbours(T* y, const T* x, const float* cos, const float* sin, float sign, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
    rope_rotate(a, b, cos[i], sign * sin[i]);
    y[2 * i] = from_float<T>(a);
    y[2 * i + 1] = from_float<T>(b);
  }
}

template <typename T>
static void rope(const Rope<T>& p) {
  const int64_t half = p.D / 2;
  const int64_t tokens_per_task = max64(1, 8192 / max64(1, p.H * p.D));
  parallel_ranges(p.B * p.T_, tokens_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t bt = begin; bt < end; ++bt) {
      const int64_t b = bt / p.T_, t = bt % p.T_;
      const int64_t row = p.positions ? p.positions[b * p.position_batch + t] : t;
      const float* cos = p.cos + b * p.angle_batch + row * half;
      const float* sin = p.sin + b * p.angle_batch + row * half;
      for (int64_t h = 0; h < p.H; ++h) {
        const T* x = p.x + b * p.x_batch + t * p.x_token + h * p.x_head;
        T* y = p.y + (bt * p.H + h) * p.D;
        if (p.interleaved)
          turn_neighbours(y, x, cos, sin, p.sign, half);
        else
          turn_halves(y, x, cos, sin, p.sign, half);
      }
    }
  });
}

LK_KERNEL(Rope<float>, rope<float>);
LK_KERNEL(Rope<bfloat16>, rope<bfloat16>);
LK_KERNEL(Rope<float16>, rope<float16>);

}  // namespace llamakern::LK_ISA
