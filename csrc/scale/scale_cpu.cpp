// Scale and shift on the CPU: one pass over memory each way. In the backward each task has some rows of some channels
// and holds their sums in L1; these are added in order.
#include "scale.h"

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/vec.h"

namespace llamakern::LK_ISA {

constexpr int64_t kTaskRows = 64, kTaskChannels = 1024;  // a multiple of kLanes

// The C values in float, 0 where there are none.
template <typename T>
static void widen_all(float* to, const Either<T>& from, int64_t C) {
  for_vectors(C, [&](int64_t c, auto n) {
    store(to + c, from.wide ? load(from.wide + c, n) : from.same ? load(from.same + c, n) : Vec{}, n);
  });
}

template <typename T>
static void scale_shift(const ScaleShift<T>& p) {
  Scratch<float> scale(p.C), shift(p.C);
  widen_all(scale, p.scale, p.C);
  widen_all(shift, p.shift, p.C);
  const float *s = scale, *b = shift;
  parallel_ranges(p.M, max64(1, 16384 / max64(1, p.C)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = p.x + m * p.x_row;
      T* y = p.y + m * p.C;
      for_vectors(p.C, [=](int64_t c, auto n) {
        const Vec product = load(x + c, n) * load(s + c, n), more = load(b + c, n);
        store(y + c, more == Vec{} ? product : product + more, n);
      });
    }
  });
}

// `rows` rows from m on of `count` channels: dx, and what they add to the sums of these channels.
template <int rows, bool kSums, typename T>
static void backward_rows(const ScaleShiftBackward<T>& p, const float* scale, float* dscale, float* dshift, int64_t m,
                          int64_t first, int64_t count) {
  const T *dy = p.dy + m * p.dy_row + first, *x = kSums ? p.x + m * p.x_row + first : nullptr;
  T* dx = p.dx ? p.dx + m * p.C + first : nullptr;
  for_vectors(count, [&](int64_t c, auto n) {
    Vec along[rows], d[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      d[r] = load(dy + r * p.dy_row + c, n);
      if constexpr (kSums) along[r] = d[r] * load(x + r * p.x_row + c, n);
      if (dx) store(dx + r * p.C + c, d[r] * load(scale + first + c, n), n);
    }
    const auto add = [&](float* sums, const Vec(&v)[rows]) {
      if constexpr (rows == 4)
        store(sums + c, load(sums + c) + ((v[0] + v[1]) + (v[2] + v[3])));
      else
        store(sums + c, load(sums + c) + v[0]);
    };
    if constexpr (kSums) add(dscale, along);
    add(dshift, d);
  });
}

template <bool kSums, typename T>
static void backward_task(const ScaleShiftBackward<T>& p, const float* scale, float* dscale, float* dshift,
                          int64_t begin, int64_t end, int64_t first, int64_t count) {
  for (; begin + 4 <= end; begin += 4) backward_rows<4, kSums>(p, scale, dscale, dshift, begin, first, count);
  for (; begin < end; ++begin) backward_rows<1, kSums>(p, scale, dscale, dshift, begin, first, count);
}

template <typename T>
static void scale_shift_backward(const ScaleShiftBackward<T>& p) {
  const int64_t groups = ceil_div(p.M, kTaskRows), blocks = ceil_div(p.C, kTaskChannels), row = blocks * kTaskChannels;
  Scratch<float> scale(p.C), dscale(groups * row), dshift(groups * row);
  widen_all(scale, p.scale, p.C);
  const float* s = scale;
  parallel_for(groups * blocks, [&](int64_t task) {
    const int64_t group = task / blocks, first = task % blocks * kTaskChannels;
    const int64_t begin = group * kTaskRows, end = min64(p.M, begin + kTaskRows),
                  count = min64(p.C - first, kTaskChannels);
    float *sums = dscale + group * row + first, *shifts = dshift + group * row + first;
    memset(sums, 0, kTaskChannels * sizeof(float));
    memset(shifts, 0, kTaskChannels * sizeof(float));
    if (p.dscale)
      backward_task<true>(p, s, sums, shifts, begin, end, first, count);
    else
      backward_task<false>(p, s, sums, shifts, begin, end, first, count);
  });
  const auto add_up = [&](float* out, const float* parts) {
    if (!out) return;
    for_vectors(p.C, [=](int64_t c, auto n) {
      Vec total = {};
      for (int64_t group = 0; group < groups; ++group) total += load(parts + group * row + c);
      store(out + c, total, n);
    });
  };
  add_up(p.dscale, dscale);
  add_up(p.dshift, dshift);
}

LK_KERNEL(ScaleShift<float>, scale_shift);
LK_KERNEL(ScaleShift<bfloat16>, scale_shift);
LK_KERNEL(ScaleShift<float16>, scale_shift);
LK_KERNEL(ScaleShiftBackward<float>, scale_shift_backward);
LK_KERNEL(ScaleShiftBackward<bfloat16>, scale_shift_backward);
LK_KERNEL(ScaleShiftBackward<float16>, scale_shift_backward);

}  // namespace llamakern::LK_ISA
