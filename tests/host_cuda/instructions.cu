// Instructions on numbers whose answers can be written down.
#include "proof.h"

namespace {

__global__ void instructions_kernel(int* y) {
  __shared__ __align__(16) uint16_t tiles[4][8][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tiles[i / 64][i / 8 % 8][i % 8] = uint16_t(i);
  __syncwarp();
  int* out = y + lane * kInstructions;

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

  *out++ = int(__match_any_sync(~0u, lane / 5));
  *out++ = int(__reduce_add_sync(~0u, unsigned(lane)));
  *out++ = __reduce_min_sync(~0u, lane - 9);
  *out++ = __reduce_max_sync(lane < 16 ? 0xffffu : 0xffff0000u, lane);
  *out++ = int(__reduce_xor_sync(~0u, unsigned(lane * lane)));
  *out++ = __syncthreads_count(lane % 3 == 0);
  *out++ = __syncthreads_or(lane == 40);
  *out++ = __syncthreads_and(lane < 32);

  *out++ = __popc(0xf0f01u * lane), *out++ = __ffs(lane << 3), *out++ = __clz(lane);
  *out++ = int(__brev(unsigned(lane)));
  *out++ = int(__byte_perm(0x03020100u + lane, 0x87868584u, 0xd7a0));
  *out++ = int(__funnelshift_l(0x12345678u, 0x9abcdef0u, lane)), *out++ = int(__umulhi(1u << lane, 0xdeadbeefu));
  const float x = (lane - 13) * 0.5f;
  *out++ = __float2int_rn(x), *out++ = __float2int_rz(x), *out++ = __float2int_rd(x);
  *out++ = __float2int_rn(x * 1e9f), *out++ = int(__float2uint_rn(x));

  // Halfway cases, subnormals, infinity, NaN.
  const float hard[8] = {1.00390625f, 1.01171875f, 65520.0f, 1e-7f, -0.0f, 3.4e38f, __int_as_float(0x7fc00001),
                         2049.0f};
  const float h = hard[lane % 8];
  *out++ = narrow<bfloat16>(h).bits, *out++ = narrow<float16>(h).bits, *out++ = int(narrow_tf32(h));
  *out++ = int(narrow2<bfloat16>(h, float(lane))), *out++ = int(narrow2<float16>(h, float(lane)));
  const uint32_t three = narrow2<bfloat16>(3.0f, -1.5f), b = narrow2<bfloat16>(1.0078125f, float(lane));
  *out++ = int(fma2<bfloat16>(three, b, 0x3f803f80)), *out++ = int(multiply2<bfloat16>(three, b));
  *out++ = int(fma2<float16>(narrow2<float16>(3.0f, 0.1f), narrow2<float16>(1.1f, float(lane)), 0x3c003c00));
}

// Three products of the same 16x16 and 16x8 matrices: bfloat16, float16, tf32.
__global__ void products_kernel(float* c, const float* a, const float* b) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a16[2][4], b16[2][2];
  for (int i = 0; i < 4; ++i) {
    const float* pair = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    a16[0][i] = narrow2<bfloat16>(pair[0], pair[1]), a16[1][i] = narrow2<float16>(pair[0], pair[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* pair = b + (2 * t + 8 * i) * 8 + g;
    b16[0][i] = narrow2<bfloat16>(pair[0], pair[8]), b16[1][i] = narrow2<float16>(pair[0], pair[8]);
  }
  float product[3][4] = {};
  mma<bfloat16>(product[0], a16[0], b16[0]);
  mma<float16>(product[1], a16[1], b16[1]);
  for (int k = 0; k < 16; k += 8) {
    uint32_t a32[4], b32[2];
    for (int i = 0; i < 4; ++i) a32[i] = narrow_tf32(a[(g + i % 2 * 8) * 16 + k + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) b32[i] = narrow_tf32(b[(k + t + 4 * i) * 8 + g]);
    mma_tf32(product[2], a32, b32);
  }
  for (int m = 0; m < 3; ++m) {
    for (int i = 0; i < 4; ++i) c[m * 128 + (g + i / 2 * 8) * 8 + 2 * t + i % 2] = product[m][i];
  }
}

}  // namespace

void matrix_products(float* c, const float* a, const float* b) { LK_LAUNCH(products_kernel, 1, 32, 0, 0)(c, a, b); }
void instructions(int* y) { LK_LAUNCH(instructions_kernel, 1, 32, 0, 0)(y); }

namespace {
__global__ void switch_kernel(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncwarp();
}
}  // namespace
void switches(int rounds, int threads) { LK_LAUNCH(switch_kernel, 1, threads, 0, 0)(rounds); }
