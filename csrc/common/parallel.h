// The one way to use several cores. Compiled per instruction set, like everything that a kernel inlines.
//
// fn(task) runs once for each task in [0, tasks). Tasks are cut by shape, never by thread count, and write disjoint
// memory, so 1, 2 and 7 threads give equal bits.
#pragma once
#include <omp.h>

#include <cstdint>
#include <exception>

#include "isa.h"

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

// The same for cheap items: fn(begin, end) over pieces of at most `grain` items.
template <typename Fn>
void parallel_ranges(int64_t items, int64_t grain, const Fn& fn) {
  parallel_for((items + grain - 1) / grain, [&](int64_t piece) {
    const int64_t begin = piece * grain;
    fn(begin, begin + grain < items ? begin + grain : items);
  });
}

}  // namespace llamakern::LK_ISA
