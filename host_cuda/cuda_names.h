// CUDA's own functions and variables, as far as kernels here use them.
#pragma once

#include <limits>

#define threadIdx (host::thread_index())
#define blockIdx (host::block_index())
#define blockDim (host::block_size())
#define gridDim (host::grid_size())
constexpr int warpSize = 32;
using std::max;
using std::min;

#define HOST_INLINE inline __attribute__((always_inline))

// ---- barriers and fences --------------------------------------------------------------------------------------------

HOST_INLINE void __syncthreads() { host::barrier_sync(0, host::kWholeBlock); }
HOST_INLINE int __syncthreads_count(int p) { return host::barrier_count(p != 0); }
HOST_INLINE int __syncthreads_or(int p) { return host::barrier_count(p != 0) != 0; }
HOST_INLINE int __syncthreads_and(int p) { return host::barrier_count(p == 0) == 0; }
HOST_INLINE void __syncwarp(unsigned mask = ~0u) { host::meet("__syncwarp", mask, nullptr, nullptr); }
HOST_INLINE void __threadfence_block() { host::fence(host::kBlock); }
HOST_INLINE void __threadfence() { host::fence(host::kDevice); }
HOST_INLINE void __threadfence_system() { host::fence(host::kDevice); }

// ---- warp operations ------------------------------------------------------------------------------------------------

namespace host {

template <typename T>
HOST_INLINE T shuffle(const char* operation, unsigned mask, T value, int from) {
  struct Lane {
    T value;
    int from;
    T result;
  } mine{value, from, value};
  warp<Lane>(operation, mask, mine, [](Lane* const* lane, unsigned mask) HOST_UNCHECKED {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      const int from = lane[i]->from;
      if (!(mask >> from & 1)) fail("a shuffle asks lane %d, which is not in mask 0x%08x", from, mask);
      lane[i]->result = lane[from]->value;
    }
  });
  return mine.result;
}

// Every lane of the mask receives f(the lanes' values in turn).
template <typename T, typename F>
HOST_INLINE T reduce(const char* operation, unsigned mask, T value, F) {
  struct Lane {
    T value, result;
  } mine{value, value};
  warp<Lane>(operation, mask, mine, [](Lane* const* lane, unsigned mask) HOST_UNCHECKED {
    T all = lane[__builtin_ctz(mask)]->value;
    for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1) all = F()(all, lane[__builtin_ctz(rest)]->value);
    for (unsigned rest = mask; rest; rest &= rest - 1) lane[__builtin_ctz(rest)]->result = all;
  });
  return mine.result;
}

HOST_INLINE unsigned vote(const char* operation, unsigned mask, bool mine) {
  return reduce(operation, mask, unsigned(mine) << lane_index(),
                [](unsigned a, unsigned b) HOST_UNCHECKED { return a | b; });
}

}  // namespace host

template <typename T>
HOST_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = host::lane_index(), from = lane ^ bits;
  return host::shuffle("__shfl_xor_sync", mask, value, from / width > lane / width ? lane : from);
}
template <typename T>
HOST_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = host::lane_index(), from = lane - int(delta);
  return host::shuffle("__shfl_up_sync", mask, value, from < lane / width * width ? lane : from);
}
template <typename T>
HOST_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = host::lane_index(), from = lane + int(delta);
  return host::shuffle("__shfl_down_sync", mask, value, from >= (lane / width + 1) * width ? lane : from);
}
template <typename T>
HOST_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = host::lane_index();
  return host::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)));
}
HOST_INLINE unsigned __ballot_sync(unsigned mask, int p) { return host::vote("__ballot_sync", mask, p != 0); }
HOST_INLINE int __any_sync(unsigned mask, int p) { return host::vote("__any_sync", mask, p != 0) != 0; }
HOST_INLINE int __all_sync(unsigned mask, int p) { return host::vote("__all_sync", mask, p == 0) == 0; }

// The lanes that bring the same value.
template <typename T>
HOST_INLINE unsigned __match_any_sync(unsigned mask, T value) {
  struct Lane {
    T value;
    unsigned result;
  } mine{value, 0};
  host::warp<Lane>("__match_any_sync", mask, mine, [](Lane* const* lane, unsigned mask) HOST_UNCHECKED {
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 32; ++j) {
        if (!(mask >> i & 1) || !(mask >> j & 1)) continue;
        lane[i]->result |= unsigned(lane[i]->value == lane[j]->value) << j;
      }
    }
  });
  return mine.result;
}

#define HOST_REDUCE(name, T, formula)                                                              \
  HOST_INLINE T name(unsigned mask, T value) {                                                     \
    return host::reduce(#name, mask, value, [](T a, T b) HOST_UNCHECKED -> T { return formula; }); \
  }
HOST_REDUCE(__reduce_add_sync, unsigned, a + b)
HOST_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
HOST_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
HOST_REDUCE(__reduce_and_sync, unsigned, a& b)
HOST_REDUCE(__reduce_or_sync, unsigned, a | b)
HOST_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
HOST_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
HOST_REDUCE(__reduce_min_sync, int, a < b ? a : b)
HOST_REDUCE(__reduce_max_sync, int, a > b ? a : b)

// ---- atomics --------------------------------------------------------------------------------------------------------

#define HOST_ATOMIC(name, T) T name(T* to, T value);
#define HOST_ATOMIC_OF(name) \
  HOST_ATOMIC(name, int) HOST_ATOMIC(name, unsigned) HOST_ATOMIC(name, long long) HOST_ATOMIC(name, unsigned long long)
HOST_ATOMIC_OF(atomicMin)
HOST_ATOMIC_OF(atomicMax)
HOST_ATOMIC_OF(atomicAnd)
HOST_ATOMIC_OF(atomicOr)
HOST_ATOMIC_OF(atomicXor)
HOST_ATOMIC(atomicExch, int)
HOST_ATOMIC(atomicExch, unsigned)
HOST_ATOMIC(atomicExch, unsigned long long)
HOST_ATOMIC(atomicExch, float)
HOST_ATOMIC(atomicAdd, int)
HOST_ATOMIC(atomicAdd, unsigned)
HOST_ATOMIC(atomicAdd, unsigned long long)
HOST_ATOMIC(atomicAdd, float)
HOST_ATOMIC(atomicAdd, double)
HOST_ATOMIC(atomicSub, int)
HOST_ATOMIC(atomicSub, unsigned)
HOST_ATOMIC(atomicInc, unsigned)
HOST_ATOMIC(atomicDec, unsigned)
int atomicCAS(int* to, int expected, int value);
unsigned atomicCAS(unsigned* to, unsigned expected, unsigned value);
unsigned long long atomicCAS(unsigned long long* to, unsigned long long expected, unsigned long long value);
unsigned short atomicCAS(unsigned short* to, unsigned short expected, unsigned short value);
#undef HOST_ATOMIC
#undef HOST_ATOMIC_OF

// ---- bits -----------------------------------------------------------------------------------------------------------

HOST_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
HOST_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
HOST_INLINE int __ffs(int x) { return __builtin_ffs(x); }
HOST_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
HOST_INLINE int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
HOST_INLINE int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
HOST_INLINE unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
// Four of the eight bytes of b:a, each chosen by four bits of `select`; bit 3 of these spreads the sign.
HOST_INLINE unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = select >> 4 * i, byte = bytes >> 8 * (s & 7) & 255;
    y |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return y;
}
HOST_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}
HOST_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
HOST_INLINE int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
HOST_INLINE unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
HOST_INLINE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
HOST_INLINE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
HOST_INLINE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
HOST_INLINE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }

// ---- float ----------------------------------------------------------------------------------------------------------

// The fast ones of a GPU are less exact than these: compare with a tolerance.
HOST_INLINE float __expf(float x) { return std::exp(x); }
HOST_INLINE float __logf(float x) { return std::log(x); }
HOST_INLINE float __log2f(float x) { return std::log2(x); }
HOST_INLINE float __sinf(float x) { return std::sin(x); }
HOST_INLINE float __cosf(float x) { return std::cos(x); }
HOST_INLINE float __fdividef(float x, float y) { return x / y; }
HOST_INLINE float __frcp_rn(float x) { return 1.0f / x; }
HOST_INLINE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
HOST_INLINE float __fadd_rn(float a, float b) {
  const volatile float sum = a + b;  // never part of a fused operation
  return sum;
}
HOST_INLINE float __fmul_rn(float a, float b) {
  const volatile float product = a * b;
  return product;
}
HOST_INLINE float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
HOST_INLINE float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }

// To integers: rounded, NaN becomes 0, the rest is clamped.
namespace host {
template <typename T>
HOST_INLINE T to_integer(float rounded) {
  constexpr float least = float(std::numeric_limits<T>::min()), past = -2.0f * float(std::numeric_limits<T>::min() / 2);
  if (rounded != rounded) return 0;
  if (rounded <= least) return std::numeric_limits<T>::min();
  return rounded >= (past > 0 ? past : 0x1p32f) ? std::numeric_limits<T>::max() : T(rounded);
}
}  // namespace host
HOST_INLINE int __float2int_rn(float x) { return host::to_integer<int>(std::nearbyint(x)); }
HOST_INLINE int __float2int_rz(float x) { return host::to_integer<int>(std::trunc(x)); }
HOST_INLINE int __float2int_rd(float x) { return host::to_integer<int>(std::floor(x)); }
HOST_INLINE int __float2int_ru(float x) { return host::to_integer<int>(std::ceil(x)); }
HOST_INLINE unsigned __float2uint_rn(float x) { return host::to_integer<unsigned>(std::nearbyint(x)); }
HOST_INLINE unsigned __float2uint_rz(float x) { return host::to_integer<unsigned>(std::trunc(x)); }
HOST_INLINE float __int2float_rn(int x) { return float(x); }
HOST_INLINE float __uint2float_rn(unsigned x) { return float(x); }

// ---- loads and stores with a hint -----------------------------------------------------------------------------------

// Which cache keeps what is nothing that this harness could tell.
#define HOST_LOAD(name)               \
  template <typename T>               \
  HOST_INLINE T name(const T* from) { \
    return *from;                     \
  }
#define HOST_STORE(name)                         \
  template <typename T>                          \
  HOST_INLINE void name(T* to, const T& value) { \
    *to = value;                                 \
  }
HOST_LOAD(__ldg)
HOST_LOAD(__ldca)
HOST_LOAD(__ldcg)
HOST_LOAD(__ldcs)
HOST_LOAD(__ldlu)
HOST_STORE(__stwb)
HOST_STORE(__stcg)
HOST_STORE(__stcs)
#undef HOST_LOAD
#undef HOST_STORE

[[noreturn]] HOST_INLINE void __trap() { host::fail("__trap"); }
