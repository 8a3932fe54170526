// The one way to use several cores. Compiled per instruction set, like everything that a kernel inlines.
//
// fn(task) runs once for each task in [0, tasks). Tasks are cut by shape, never by thread count, and write disjoint
// memory, so 1, 2 and 7 threads give equal bits.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>

#include "isa.h"
#include "types.h"

namespace llamakern::LK_ISA {

template <typename Fn>
void parallel_for(int64_t tasks, const Fn& fn) {
  if (tasks <= 1 || omp_get_max_threads() == 1 || omp_in_parallel()) {
    for (int64_t task = 0; task < tasks; ++task) fn(task);
    return;
  }
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) {
    try {
      fn(task);
    } catch (...) {  // std::bad_alloc; an exception that leaves the region would end the process
#pragma omp critical(llamakern_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// The same for tasks whose memory follows one another: a thread takes neighbours, so that what it fetches ahead is its
// own, and helps with the shares of others when its share is done.
template <typename Fn>
void parallel_neighbours(int64_t tasks, const Fn& fn) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int kMost = 256;  // threads
  const int shares = omp_in_parallel() ? 1 : int(min64(min64(omp_get_max_threads(), kMost), tasks));
  if (shares <= 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(task);
    return;
  }
  Share share[kMost];
  for (int i = 0; i < shares; ++i) {
    share[i].next = tasks * i / shares;
    share[i].end = tasks * (i + 1) / shares;
  }
  parallel_for(shares, [&](int64_t me) {
    for (int i = 0; i < shares; ++i) {
      Share& from = share[(me + i) % shares];
      for (int64_t task; (task = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) fn(task);
    }
  });
}

// The same for cheap items: fn(begin, end) over pieces of at most `grain` items.
template <typename Fn>
void parallel_ranges(int64_t items, int64_t grain, const Fn& fn) {
  parallel_for((items + grain - 1) / grain, [&](int64_t piece) {
    const int64_t begin = piece * grain;
    fn(begin, begin + grain < items ? begin + grain : items);
  });
}

}  // namespace llamakern::LK_ISA
