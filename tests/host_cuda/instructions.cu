// Every warp instruction once, on numbers whose answers can be written down.
#include "proof.h"

namespace {

__global__ void instructions_kernel(int* y) {
  __shared__ __align__(16) uint16_t tiles[4][8][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tiles[i / 64][i / 8 % 8][i % 8] = uint16_t(i);
  __syncwarp();
  int* out = y + lane * 32;

  uint32_t one[1], two[2], four[4];
  const uint16_t* row = tiles[lane / 8][lane % 8];
  ldmatrix(one, tiles[0][lane % 8]);
  *out++ = int(one[0]);
  ldmatrix<true>(one, tiles[0][lane % 8]);
  *out++ = int(one[0]);
  ldmatrix(two, tiles[lane / 8 % 2][lane % 8]);
  *out++ = int(two[0]), *out++ = int(two[1]);
  ldmatrix<true>(two, tiles[lane / 8 % 2][lane % 8]);
  *out++ = int(two[0]), *out++ = int(two[1]);
  ldmatrix(four, row);
  for (int i = 0; i < 4; ++i) *out++ = int(four[i]);
  ldmatrix<true>(four, row);
  for (int i = 0; i < 4; ++i) *out++ = int(four[i]);

  *out++ = __shfl_xor_sync(~0u, lane, 5);
  *out++ = __shfl_up_sync(~0u, lane, 3);
  *out++ = __shfl_down_sync(~0u, lane, 3);
  *out++ = __shfl_sync(~0u, lane, 7);
  *out++ = __shfl_xor_sync(~0u, lane, 5, 8);
  *out++ = __shfl_up_sync(~0u, lane, 3, 8);
  *out++ = __shfl_down_sync(~0u, lane, 3, 8);
  *out++ = __shfl_sync(~0u, lane, 11, 8);
  *out++ = int(__ballot_sync(~0u, lane % 3 == 0));
  *out++ = __any_sync(~0u, lane == 31);
  *out++ = __all_sync(~0u, lane < 31);
  *out++ = int(__ballot_sync(lane < 16 ? 0xffffu : 0xffff0000u, lane % 2));  // half warps apart
}

}  // namespace

void instructions(int* y) { LK_LAUNCH(instructions_kernel, 1, 32, 0, 0)(y); }
