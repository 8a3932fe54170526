// CUDA's short vectors, with CUDA's alignments, and their make_ functions.
#pragma once

#define HOST_VECTOR2(name, T, alignment)            \
  struct __attribute__((aligned(alignment))) name { \
    T x, y;                                         \
  };                                                \
  inline name make_##name(T x, T y) { return {x, y}; }
#define HOST_VECTOR3(name, T) \
  struct name {               \
    T x, y, z;                \
  };                          \
  inline name make_##name(T x, T y, T z) { return {x, y, z}; }
#define HOST_VECTOR4(name, T, alignment)            \
  struct __attribute__((aligned(alignment))) name { \
    T x, y, z, w;                                   \
  };                                                \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

HOST_VECTOR2(char2, signed char, 2)
HOST_VECTOR2(uchar2, unsigned char, 2)
HOST_VECTOR2(short2, short, 4)
HOST_VECTOR2(ushort2, unsigned short, 4)
HOST_VECTOR2(int2, int, 8)
HOST_VECTOR2(uint2, unsigned, 8)
HOST_VECTOR2(float2, float, 8)
HOST_VECTOR2(longlong2, long long, 16)
HOST_VECTOR2(ulonglong2, unsigned long long, 16)
HOST_VECTOR2(double2, double, 16)
HOST_VECTOR3(int3, int)
HOST_VECTOR3(uint3, unsigned)
HOST_VECTOR3(float3, float)
HOST_VECTOR4(char4, signed char, 4)
HOST_VECTOR4(uchar4, unsigned char, 4)
HOST_VECTOR4(short4, short, 8)
HOST_VECTOR4(ushort4, unsigned short, 8)
HOST_VECTOR4(int4, int, 16)
HOST_VECTOR4(uint4, unsigned, 16)
HOST_VECTOR4(float4, float, 16)

struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
