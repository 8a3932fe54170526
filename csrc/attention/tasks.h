// A list of tasks that belong to owners of uneven size: sequences of different lengths, say.
#pragma once
#include "../common/isa.h"
#include "../common/scratch.h"

namespace llamakern::LK_ISA {

class Tasks {
 public:
  struct Place {
    int64_t owner, part;
  };

  // Owner n has parts(n) tasks.
  template <typename Parts>
  Tasks(int64_t owners, const Parts& parts) : owners_(owners), starts_(owners + 1) {
    starts_[0] = 0;
    for (int64_t n = 0; n < owners; ++n) starts_[n + 1] = starts_[n] + parts(n);
  }
  int64_t count() const { return starts()[owners_]; }
  Place find(int64_t task) const {
    int64_t low = 0, high = owners_;  // starts[low] <= task < starts[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (starts()[middle] <= task ? low : high) = middle;
    }
    return {low, task - starts()[low]};
  }

 private:
  const int64_t* starts() const { return const_cast<Scratch<int64_t>&>(starts_); }
  int64_t owners_;
  Scratch<int64_t> starts_;
};

}  // namespace llamakern::LK_ISA
