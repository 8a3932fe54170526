// CUDA C++ on a CPU, for testing kernels where there is no GPU and no CUDA toolkit.
//
// A thread is a fiber with its own stack; the fibers of a block share one OS thread and run one after another. A thread
// gives way only where it has to wait: at a barrier or at a warp operation. Compile kernels with
//
//   g++ -std=c++20 -x c++ -g -O2 -fno-strict-aliasing -fno-omit-frame-pointer -fsanitize=thread
//
// and link without -fsanitize=thread: the compiler then calls host_cuda.cpp before every load and store, and the
// harness sees every access of an unmodified kernel. Without the flag the same source runs unchecked, several times
// faster.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One copy per OS thread, which runs one block at a time. The harness finds these arrays by name in the symbol table.
#define __shared__ static thread_local __attribute__((aligned(16)))
#define HOST_UNCHECKED __attribute__((no_sanitize("thread", "alignment", "bounds", "signed-integer-overflow")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

namespace host {

// ---- launch ---------------------------------------------------------------------------------------------------------

struct Grid {
  const char* kernel;
  dim3 blocks, threads;
  size_t shared_bytes;
  const void* parameters;
  size_t parameter_bytes;
  void (*call)(const void* kernel, const void* parameters);
  const void* function;
};
void run(const Grid&);  // throws std::runtime_error with the report of the first fault

template <typename... P>
struct Launch {
  const char* name;
  void (*kernel)(P...);
  dim3 blocks, threads;
  size_t shared_bytes;

  void operator()(std::type_identity_t<P>... p) const {
    const std::tuple<P...> parameters(p...);
    run({name, blocks, threads, shared_bytes, &parameters, sizeof parameters,
         [](const void* kernel, const void* parameters) HOST_UNCHECKED {
           std::apply(*reinterpret_cast<void (*)(P...)>(const_cast<void*>(kernel)),
                      *static_cast<const std::tuple<P...>*>(parameters));
         },
         reinterpret_cast<const void*>(kernel)});
  }
};
template <typename... P>
Launch<P...> launch(const char* name, void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared_bytes) {
  return {name, kernel, blocks, threads, shared_bytes};
}

// Global memory that kernels may touch while this object lives. With none registered, bounds are not checked.
void remember(const void* data, size_t bytes, const char* name);
void forget(const void* data);
struct Buffer {
  Buffer(const void* data, size_t bytes, const char* name);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  const void* data;
};

// ---- what a thread may ask ------------------------------------------------------------------------------------------

// Constant while a thread lives, so the compiler may ask once.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
void* dynamic_shared(size_t bytes);

// Accesses that instructions in ptx.cuh make on behalf of the thread. Plain C++ accesses report themselves.
void read(const void* from, unsigned bytes);
void write(void* to, unsigned bytes);
void update(void* to, unsigned bytes);  // atomically

constexpr int kWholeBlock = -1;
void barrier_sync(int id, int threads);    // bar.sync
void barrier_arrive(int id, int threads);  // bar.arrive

void cp_async(void* to, const void* from, unsigned bytes, unsigned source_bytes);
void cp_async_commit();
void cp_async_wait(int pending_groups);

// An mbarrier is 8 bytes of shared memory. A bulk copy lands as late as it can: when nobody can go on without it.
void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes);
void mbarrier_wait(uint64_t* barrier, int parity);
void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier);

// The lanes of `mask` meet here. The last one to arrive runs `meaning`, which sees what every lane brought and writes
// each lane's result in place; then all go on. Lanes that meet with different operations are an error.
using Meaning = void (*)(void* const* lane, unsigned mask);
void meet(const char* operation, unsigned mask, void* mine, Meaning meaning);

template <typename Lane>
void warp(const char* operation, unsigned mask, Lane& mine,
          std::type_identity_t<void (*)(Lane* const* lane, unsigned mask)> meaning) {
  meet(operation, mask, &mine, reinterpret_cast<Meaning>(meaning));
}
[[noreturn]] void fail(const char* format, ...);

template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int from) {
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

unsigned vote(unsigned mask, bool mine);  // one bit a lane
int lane_index();

}  // namespace host

// ---- CUDA's names ---------------------------------------------------------------------------------------------------

#define threadIdx (host::thread_index())
#define blockIdx (host::block_index())
#define blockDim (host::block_size())
#define gridDim (host::grid_size())
constexpr int warpSize = 32;
using std::max;
using std::min;

inline void __syncthreads() { host::barrier_sync(0, host::kWholeBlock); }
inline void __syncwarp(unsigned mask = ~0u) { host::meet("__syncwarp", mask, nullptr, nullptr); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = host::lane_index(), from = lane ^ bits;
  return host::shuffle("__shfl_xor_sync", mask, value, from / width > lane / width ? lane : from);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = host::lane_index(), from = lane - int(delta);
  return host::shuffle("__shfl_up_sync", mask, value, from < lane / width * width ? lane : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = host::lane_index(), from = lane + int(delta);
  return host::shuffle("__shfl_down_sync", mask, value, from >= (lane / width + 1) * width ? lane : from);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = host::lane_index();
  return host::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)));
}
inline unsigned __ballot_sync(unsigned mask, bool p) { return host::vote(mask, p); }
inline bool __any_sync(unsigned mask, bool p) { return host::vote(mask, p) != 0; }
inline bool __all_sync(unsigned mask, bool p) { return host::vote(mask, !p) == 0; }

float atomicAdd(float* to, float value);
int atomicAdd(int* to, int value);

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
