// Every instruction that C++ cannot say, once. Each function has two bodies: the PTX, and what the PTX means. Over 400
// lines, as the one place to look an instruction up; those of sm_90 stand in ptx_hopper.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"
#ifndef __CUDACC__
#include "../../host_cuda/host_cuda.h"
#endif

#define LK_DEVICE __device__ __forceinline__

// ---- launch and dynamic shared memory -------------------------------------------------------------------------------

// LK_LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments);   LK_DYNAMIC_SHARED(Storage, s);  s.tile[...]
// LK_LAUNCH_AS("its name", kernel, ...) where `kernel` is a variable: what the harness calls it in its reports.
#define LK_LAUNCH(kernel, ...) LK_LAUNCH_AS(#kernel, kernel, __VA_ARGS__)
#ifdef __CUDACC__
#define LK_LAUNCH_AS(name, kernel, grid, block, shared_bytes, stream) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>
#define LK_DYNAMIC_SHARED(Type, name)                             \
  extern __shared__ __align__(128) unsigned char dynamic_bytes[]; \
  Type& name = *reinterpret_cast<Type*>(dynamic_bytes)
#else
#define LK_LAUNCH_AS(name, kernel, grid, block, shared_bytes, stream) \
  ((void)(stream), host::launch(name, kernel, grid, block, shared_bytes))
#define LK_DYNAMIC_SHARED(Type, name) Type& name = *static_cast<Type*>(host::dynamic_shared(sizeof(Type)))
#endif

namespace llamakern::cuda {

// ---- 16-bit floats --------------------------------------------------------------------------------------------------

LK_DEVICE float as_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

LK_DEVICE uint32_t as_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(uint32_t, x);
#endif
}

LK_DEVICE float widen(float x) { return x; }
LK_DEVICE float widen(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
LK_DEVICE float widen(float16 x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return to_float(x);
#endif
}

// Rounds to nearest, ties to even; every NaN becomes 0x7fff.
template <typename T>
LK_DEVICE T narrow(float x);
template <>
LK_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
LK_DEVICE bfloat16 narrow<bfloat16>(float x) {
#ifdef __CUDACC__
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return x != x ? bfloat16{0x7fff} : from_float<bfloat16>(x);
#endif
}
template <>
LK_DEVICE float16 narrow<float16>(float x) {
#ifdef __CUDACC__
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return x != x ? float16{0x7fff} : from_float<float16>(x);
#endif
}

// Two neighbours in one register, the first in the low half; narrow2 rounds and packs in one instruction.
LK_DEVICE uint32_t pack(bfloat16 first, bfloat16 second) { return first.bits | uint32_t(second.bits) << 16; }
LK_DEVICE uint32_t pack(float16 first, float16 second) { return first.bits | uint32_t(second.bits) << 16; }

template <typename T>
LK_DEVICE uint32_t narrow2(float first, float second) {
#ifdef __CUDACC__
  uint32_t y;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  }
  return y;
#else
  return pack(narrow<T>(first), narrow<T>(second));
#endif
}

// The nearest float with 10 bits of mantissa, ties away from zero: an operand of mma_tf32.
LK_DEVICE uint32_t narrow_tf32(float x) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return x != x ? 0x7fffffff : (__builtin_bit_cast(uint32_t, x) + 0x1000) & ~0x1fffu;
#endif
}

// ---- bytes ----------------------------------------------------------------------------------------------------------

// Byte i of the result is byte (selector >> 4i & 7) of the eight bytes a, b; with bit 3, that byte's sign in every bit.
LK_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
#else
  const uint64_t from = a | uint64_t(b) << 32;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = from >> (selector >> 4 * i & 7) * 8 & 255;
    bytes |= (selector >> 4 * i & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return bytes;
#endif
}

// ---- math -----------------------------------------------------------------------------------------------------------

// a·b, rounded even where a sum follows that could have become an fma.
LK_DEVICE float product(float a, float b) {
#ifdef __CUDACC__
  float y;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  float y = a * b;
  asm("" : "+m"(y));
  return y;
#endif
}

// 2^x to about 2 ulp; 2^-inf is 0.
LK_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// log2(x) to about 2 ulp away from 1; of 0 it is -inf.
LK_DEVICE float log2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

// 1 / x to 1 ulp.
LK_DEVICE float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// a b + c on each of two packed halves, rounded once.
template <typename T>
LK_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t y;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  }
  return y;
#else
  T y[2];
  for (int i = 0; i < 2; ++i) {
    const auto half = [i](uint32_t pair) { return double(widen(T{uint16_t(pair >> 16 * i)})); };
    const double exact = half(a) * half(b) + half(c);
    uint32_t bits = __builtin_bit_cast(uint32_t, float(exact));  // made odd where it is not exact: rounded only once
    if (const double error = exact - as_float(bits); error != 0 && !(bits & 1))
      bits += (error > 0) == (exact > 0) ? 1 : -1;
    y[i] = narrow<T>(as_float(bits));
  }
  return pack(y[0], y[1]);
#endif
}
// a b on each of two packed halves.
template <typename T>
LK_DEVICE uint32_t multiply2(uint32_t a, uint32_t b) {
  return fma2<T>(a, b, 0x80008000);  // -0 keeps the sign of a zero
}

// ---- global loads ---------------------------------------------------------------------------------------------------

// 16 bytes that nobody wants again, which no store of this launch touches: past the L1 cache, by the read-only path.
LK_DEVICE uint4 load_once(const void* from) {
#ifdef __CUDACC__
  uint4 y;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
               : "l"(from));
  return y;
#else
  host::read(from, 16);
  uint4 y;
  __builtin_memcpy(&y, from, 16);
  return y;
#endif
}

// ---- matrix fragments -----------------------------------------------------------------------------------------------

#ifdef __CUDACC__
LK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#else
// Loads kTiles 8x8 tiles of 16-bit elements. Lane 8i + r brings the address of row r of tile i, 16 bytes.
// Lane l receives, of each tile, elements (l/4, 2(l%4)) and the next one; of the transpose if kTranspose.
template <int kTiles, bool kTranspose>
LK_DEVICE void ldmatrix_meaning(uint32_t (&r)[kTiles], const void* row) {
  struct Lane {
    const uint16_t* row;
    uint32_t* r;
  } mine{static_cast<const uint16_t*>(row), r};
  if (host::lane_index() < 8 * kTiles) host::read(row, 16);
  host::warp<Lane>("ldmatrix", ~0u, mine, [](Lane* const* lane, unsigned) HOST_UNCHECKED {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < kTiles; ++i) {
        const int y = l / 4, x = l % 4 * 2;
        const uint16_t first = kTranspose ? lane[8 * i + x]->row[y] : lane[8 * i + y]->row[x];
        const uint16_t second = kTranspose ? lane[8 * i + x + 1]->row[y] : lane[8 * i + y]->row[x + 1];
        lane[l]->r[i] = first | uint32_t(second) << 16;
      }
    }
  });
}
#endif

template <bool kTranspose = false, int kTiles>
LK_DEVICE void ldmatrix(uint32_t (&r)[kTiles], const void* row) {
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4);
#ifdef __CUDACC__
  const uint32_t at = shared_address(row);
#define LK_LDMATRIX(shape, operands, ...)                                          \
  if constexpr (kTranspose)                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16 " operands \
                 : __VA_ARGS__                                                     \
                 : "r"(at)                                                         \
                 : "memory");                                                      \
  else                                                                             \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".shared.b16 " operands : __VA_ARGS__ : "r"(at) : "memory")
  if constexpr (kTiles == 1) {
    LK_LDMATRIX("x1", "{%0}, [%1];", "=r"(r[0]));
  } else if constexpr (kTiles == 2) {
    LK_LDMATRIX("x2", "{%0, %1}, [%2];", "=r"(r[0]), "=r"(r[1]));
  } else {
    LK_LDMATRIX("x4", "{%0, %1, %2, %3}, [%4];", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
  }
#undef LK_LDMATRIX
#else
  ldmatrix_meaning<kTiles, kTranspose>(r, row);
#endif
}

// C += A B with A 16x16, B 16x8, C 16x8 in float.  Lane l = 4g + t holds, as pairs of columns of A and C, of rows of B:
//   a[0] (g, 2t)   a[1] (g+8, 2t)   a[2] (g, 2t+8)   a[3] (g+8, 2t+8)     b[0] (2t, g)   b[1] (2t+8, g)
//   c[0..1] (g, 2t)   c[2..3] (g+8, 2t)
#ifndef __CUDACC__
template <typename T>
LK_DEVICE void mma_meaning(const char* name, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  host::warp<Lane>(name, ~0u, mine, [](Lane* const* lane, unsigned) HOST_UNCHECKED {
    const auto half = [](uint32_t pair, int i) HOST_UNCHECKED { return widen(T{uint16_t(pair >> 16 * i)}); };
    float A[16][16], B[16][8], C[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i) {
        C[g + i / 2 * 8][2 * t + i % 2] = lane[l]->c[i];
        for (int j = 0; j < 2; ++j) A[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = half(lane[l]->a[i], j);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) B[2 * t + i * 8 + j][g] = half(lane[l]->b[i], j);
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) lane[l]->c[i] = C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
  });
}
#endif

template <typename T>
LK_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifndef __CUDACC__
  mma_meaning<T>("mma", c, a, b);
#else
#define LK_MMA(type)                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type            \
               ".f32 "                                                           \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, bfloat16>) {
    LK_MMA("bf16");
  } else {
    LK_MMA("f16");
  }
#undef LK_MMA
#endif
}

// The same with A 16x8, B 8x8 of tf32 (narrow_tf32). Lane l = 4g + t holds
//   a[0] (g, t)   a[1] (g+8, t)   a[2] (g, t+4)   a[3] (g+8, t+4)     b[0] (t, g)   b[1] (t+4, g)     c as above
LK_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  struct Lane {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  host::warp<Lane>("mma_tf32", ~0u, mine, [](Lane* const* lane, unsigned) HOST_UNCHECKED {
    const auto tf32 = [](uint32_t bits) HOST_UNCHECKED { return as_float(bits & ~0x1fffu); };
    float A[16][8], B[8][8], C[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i) {
        C[g + i / 2 * 8][2 * t + i % 2] = lane[l]->c[i];
        A[g + i % 2 * 8][t + i / 2 * 4] = tf32(lane[l]->a[i]);
      }
      for (int i = 0; i < 2; ++i) B[t + i * 4][g] = tf32(lane[l]->b[i]);
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 8; ++k) {
        for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) lane[l]->c[i] = C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
  });
#endif
}

// ---- copies that land later -----------------------------------------------------------------------------------------

// Global to shared, kBytes of 4, 8 or 16. Only source_bytes are read; the rest is filled with zeros.
template <int kBytes>
LK_DEVICE void cp_async(void* to, const void* from, unsigned source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
#else
  host::cp_async(to, from, kBytes, source_bytes);
#endif
}

LK_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::cp_async_commit();
#endif
}

// Until at most kPending of the newest groups of this thread are still under way.
template <int kPending>
LK_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  host::cp_async_wait(kPending);
#endif
}

// ---- named barriers -------------------------------------------------------------------------------------------------

LK_DEVICE void barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  host::barrier_sync(id, threads);
#endif
}

LK_DEVICE void barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  host::barrier_arrive(id, threads);
#endif
}

}  // namespace llamakern::cuda
