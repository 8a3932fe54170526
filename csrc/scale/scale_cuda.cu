// Scale and shift on the GPU: a thread has one pack of channels. In the backward it goes down a group of rows and
// holds the sums of its channels in registers; a second kernel adds up the groups in order.
#include "../common/pack.cuh"
#include "scale.h"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

static constexpr int kThreads = 128;
static constexpr int kSumThreads = 256;
static constexpr int64_t kGroups = 64, kGroupRows = 32;  // of rows: so many at most, and of so many rows at least

// The pack's values in float.
template <typename T, int N>
static LK_DEVICE void widen_pack(float (&to)[N], const Either<T>& from, int64_t c) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from ? from[c + i] : 0.0f;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) scale_shift_kernel(const ScaleShift<T> p) {
  const unsigned blocks = unsigned(ceil_div(p.C, int64_t(kThreads) * N)), m = blockIdx.x / blocks;
  const int64_t c = (int64_t(blockIdx.x - m * blocks) * kThreads + threadIdx.x) * N;
  if (c >= p.C) return;
  float x[N], scale[N], shift[N];
  load(x, p.x + m * p.x_row + c);
  widen_pack(scale, p.scale, c);
  widen_pack(shift, p.shift, c);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = product(x[i], scale[i]);
    if (shift[i] != 0.0f) x[i] += shift[i];
  }
  store(p.y + m * p.C + c, x);
}

// parts [2][groups][C]: each group's dscale and dshift.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    scale_shift_backward_kernel(const ScaleShiftBackward<T> p, float* parts, int64_t rows) {
  const int64_t c = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (c >= p.C) return;
  float scale[N], dscale[N] = {}, dshift[N] = {};
  widen_pack(scale, p.scale, c);
  const int64_t first = blockIdx.y * rows, end = min64(p.M, first + rows);
#pragma unroll 2
  for (int64_t m = first; m < end; ++m) {
    float dy[N], x[N] = {};
    load(dy, p.dy + m * p.dy_row + c);
    if (p.dscale) load(x, p.x + m * p.x_row + c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dscale[i] = fmaf(dy[i], x[i], dscale[i]);
      dshift[i] += dy[i];
      dy[i] *= scale[i];
    }
    if (p.dx) store(p.dx + m * p.C + c, dy);
  }
  if (!parts) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    parts[blockIdx.y * p.C + c + i] = dscale[i];
    parts[(gridDim.y + blockIdx.y) * p.C + c + i] = dshift[i];
  }
}

static __global__ void __launch_bounds__(kSumThreads)
    scale_shift_sum_kernel(float* dscale, float* dshift, const float* parts, int64_t groups, int64_t C) {
  const int64_t c = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (c >= C) return;
  float* const out = blockIdx.y == 0 ? dscale : dshift;
  if (!out) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < groups; ++i) sum += parts[(blockIdx.y * groups + i) * C + c];
  out[c] = sum;
}

// -------------------------------------------------------------------------- launchers

template <typename T>
static void scale_shift(const ScaleShift<T>& p, void*, Stream stream) {
  if (p.M == 0 || p.C == 0) return;
  with_packs<T>(in_packs<T>({p.y, {p.C}}) && in_packs<T>({p.x, {p.x_row}}), [&]<int N>() {
    const unsigned blocks = unsigned(p.M * ceil_div(p.C, int64_t(kThreads) * N));
    LK_LAUNCH((scale_shift_kernel<T, N>), blocks, kThreads, 0, stream)(p);
  });
  check_launch("scale_shift_kernel");
}

static int64_t groups_of(int64_t M) { return min64(kGroups, ceil_div(M, kGroupRows)); }

template <typename T>
static int64_t parts_bytes(const ScaleShiftBackward<T>& p) {
  return p.dscale || p.dshift ? 2 * groups_of(p.M) * p.C * int64_t(sizeof(float)) : 0;
}

template <typename T>
static void scale_shift_backward(const ScaleShiftBackward<T>& p, void* workspace, Stream stream) {
  if (p.C == 0) return;
  float* const parts = p.dscale || p.dshift ? static_cast<float*>(workspace) : nullptr;
  const int64_t rows = ceil_div(p.M, max64(1, groups_of(p.M))), groups = ceil_div(p.M, max64(1, rows));
  const bool packs = p.C % kPack<T> == 0 && in_packs<T>({p.dx, {}}) && in_packs<T>({p.dy, {p.dy_row}}) &&
                     in_packs<T>({p.x, {p.x_row}});
  if (p.M > 0) {
    with_packs<T>(packs, [&]<int N>() {
      const dim3 grid(unsigned(ceil_div(p.C, int64_t(kThreads) * N)), unsigned(groups));
      LK_LAUNCH((scale_shift_backward_kernel<T, N>), grid, kThreads, 0, stream)(p, parts, rows);
    });
    check_launch("scale_shift_backward_kernel");
  }
  if (!p.dscale && !p.dshift) return;
  const dim3 grid(unsigned(ceil_div(p.C, kSumThreads)), 2);
  LK_LAUNCH(scale_shift_sum_kernel, grid, kSumThreads, 0, stream)(p.dscale, p.dshift, parts, groups, p.C);
  check_launch("scale_shift_sum_kernel");
}

LK_CUDA_KERNEL(ScaleShift<float>, scale_shift<float>);
LK_CUDA_KERNEL(ScaleShift<bfloat16>, scale_shift<bfloat16>);
LK_CUDA_KERNEL(ScaleShift<float16>, scale_shift<float16>);
LK_CUDA_KERNEL(ScaleShiftBackward<float>, scale_shift_backward<float>, parts_bytes<float>);
LK_CUDA_KERNEL(ScaleShiftBackward<bfloat16>, scale_shift_backward<bfloat16>, parts_bytes<bfloat16>);
LK_CUDA_KERNEL(ScaleShiftBackward<float16>, scale_shift_backward<float16>, parts_bytes<float16>);

}  // namespace llamakern::cuda
