// How well warps use memory: bank conflicts in shared memory, sectors moved for global memory, by source line.
#pragma once
#include <array>

#include "machine.h"

namespace host {

// Collects the accesses of a machine's warps. The n-th access of a lane at an instruction since the warp's lanes last
// met goes with the n-th of the other lanes.
class Traffic {
 public:
  void note(Machine& m, bool shared, uintptr_t p, unsigned bytes, uintptr_t site);
  void flush(int warp);  // its lanes have met: what they did is complete
  void flush_all();

 private:
  static constexpr int kMaxPieces = 16;  // of an access of 16 bytes that the compiler took apart

  struct Vector {  // what one lane did: neighbouring accesses in a row, which may be one instruction on a GPU
    uintptr_t p = 0;
    unsigned bytes = 0;
    uint8_t pieces = 0;
    std::array<uint8_t, kMaxPieces> sizes = {};
  };
  struct Group {
    std::array<Vector, 32> lane;
    bool shared = false;
    std::array<uintptr_t, kMaxPieces> sites = {};
  };
  struct Site {
    std::array<uint32_t, 32> times = {};
    std::vector<Group> groups;
  };
  struct Last {
    uintptr_t first_site = 0;
    uint32_t group = 0;
  };
  std::unordered_map<uintptr_t, Site> sites[kMaxWarps];
  std::array<Last, 32> last[kMaxWarps] = {};
};

bool traffic_wanted();  // HOST_CUDA_REPORT names banks or coalescing

}  // namespace host
