// Some lines that use memory badly, and as many that do not. The marks say what the report must say: warp accesses,
// wavefronts or sectors moved, the least there could be.
#include "proof.h"

namespace {

__global__ void traffic_kernel(float* y, const float* x) {
  __shared__ float tile[32][32], padded[32][33];
  __shared__ __align__(16) float4 vectors[32];
  const int lane = threadIdx.x;
  float sum = 0.0f;
  for (int r = 0; r < 32; ++r) {
    tile[r][lane] = x[32 * r + lane];
    padded[r][lane] = 0.0f;
  }
  __syncwarp();
  for (int r = 0; r < 32; ++r) sum += padded[lane][r];
  for (int r = 0; r < 4; ++r) sum += tile[lane][4 * r];  // banks 4 128 4
  vectors[lane] = make_float4(sum, sum, sum, sum);
  __syncwarp();
  sum += tile[2 * lane % 32][lane / 16];  // banks 1 16 1
  const float4 v = vectors[lane];
  sum += v.x + v.y + v.z + v.w;
  const float4 w = vectors[lane % 2];
  sum += w.x + w.y + w.z + w.w;
  sum += x[32 * lane];                                // sectors 1 32 4
  sum += x[lane + 1];                                 // sectors 1 5 4
  sum += reinterpret_cast<const float2*>(x)[lane].y;  // sectors 1 8 4
  const float4 g = reinterpret_cast<const float4*>(x)[lane];
  sum += g.x + g.y + g.z + g.w;
  y[lane] = sum;
  __syncwarp();
  cp_async<16>(&vectors[lane], x + 8 * lane);  // sectors 1 32 16
  cp_async_commit();
  cp_async_wait<0>();
}

}  // namespace

void traffic(float* y, const float* x) { LK_LAUNCH(traffic_kernel, 1, 32, 0, 0)(y, x); }
