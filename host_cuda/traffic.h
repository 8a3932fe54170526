// How well warps use memory: bank conflicts in shared memory, sectors moved for global memory, by source line.
#pragma once
#include <array>
#include <deque>

#include "machine.h"

namespace host {

struct Range {
  uintptr_t p;
  unsigned bytes;
};

// Collects the accesses of a machine's warps. The n-th access of a lane at an instruction since the warp's lanes last
// met goes with the n-th of the other lanes.
class Traffic {
 public:
  void note(Machine& m, bool shared, uintptr_t p, unsigned bytes, uintptr_t site);
  void flush(int warp);  // its lanes have met: what they did is complete
  void flush_all();

 private:
  struct Group {  // one access of a warp
    bool shared;
    uintptr_t site;
    std::array<Range, 32> lane = {};
    std::array<Group*, 32> before = {};  // what the lane did just before, if to the bytes just before
    Group* next = nullptr;               // what all its lanes do to the bytes just behind
    bool follows = false;
  };
  struct Site {
    std::array<uint32_t, 32> times = {};
    std::vector<Group*> groups;
  };
  struct Warp {
    std::deque<Group> groups;
    std::unordered_map<uintptr_t, Site> sites;
    std::array<Group*, 32> last = {};
  };
  Warp warps[kMaxWarps];

  static void link(Group& group);
  static const Group* count(const Group* group);
};

bool traffic_wanted();  // HOST_CUDA_REPORT names banks or coalescing

}  // namespace host
