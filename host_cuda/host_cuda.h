// CUDA C++ on a CPU, for testing kernels where there is no GPU and no CUDA toolkit.
//
// A thread is a fiber with its own stack; the fibers of a block share one OS thread and run one after another. A thread
// gives way only where it has to wait. Compile kernels with g++ and the options in the file `flags` beside this one:
// -fsanitize=thread and its friends make the compiler call shadow.cpp before every load and store, so that the harness
// sees each access of an unmodified kernel. Link without them. Without the sanitizers the same source runs unchecked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda_vectors.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One copy for each OS thread, which runs one block at a time. The harness finds these arrays by name in the symbol
// table. The alignment leaves gaps between them, where running past an end shows.
#define __shared__ static thread_local __attribute__((aligned(128)))
#define HOST_UNCHECKED __attribute__((no_sanitize("thread", "alignment", "bounds", "signed-integer-overflow")))

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
// kernel<<<blocks, threads, shared_bytes>>>(parameters) is launch("kernel", kernel, blocks, threads,
// bytes)(parameters).
template <typename... P>
Launch<P...> launch(const char* name, void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared_bytes) {
  return {name, kernel, blocks, threads, shared_bytes};
}

// ---- memory that kernels may touch ----------------------------------------------------------------------------------

// While any buffer is registered, global memory outside the registered ones is out of bounds, except constants; while
// none is, global memory is not watched at all. Where ranges overlap, the later one counts. Any OS thread may call
// these.
struct Buffer {  // for as long as this object lives
  Buffer(const void* data, size_t bytes, const char* name);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  const void* data;
};
// A whole allocation, until it is forgotten, or until another one overlaps it: then it was freed meanwhile.
void remember(const void* data, size_t bytes, const char* name);
void forget(const void* data);

// What HOST_CUDA_REPORT=banks,coalescing asked for, so far; it is printed at the end of the process as well.
std::string traffic_report();

// ---- what a thread may ask ------------------------------------------------------------------------------------------

// Constant while a thread lives, so the compiler may ask once.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] int lane_index();
void* dynamic_shared(size_t bytes);  // `extern __shared__` cannot be said in C++
[[noreturn]] void fail(const char* format, ...);

// ---- what instructions do on behalf of a thread ---------------------------------------------------------------------

// Accesses; plain C++ ones report themselves.
void read(const void* from, unsigned bytes);
void write(void* to, unsigned bytes);
void update(void* to, unsigned bytes);  // atomically
uint32_t atomic_load(const uint32_t* from);
void atomic_store(uint32_t* to, uint32_t value);

enum FenceScope { kBlock, kDevice };
void fence(FenceScope);

constexpr int kWholeBlock = -1;
void barrier_sync(int id, int threads);    // bar.sync
void barrier_arrive(int id, int threads);  // bar.arrive
int barrier_count(bool predicate);         // bar.red.popc of the whole block

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
__attribute__((always_inline)) inline void warp(
    const char* operation, unsigned mask, Lane& mine,
    std::type_identity_t<void (*)(Lane* const* lane, unsigned mask)> meaning) {
  meet(operation, mask, &mine, reinterpret_cast<Meaning>(meaning));
}

}  // namespace host

#include "cuda_names.h"
