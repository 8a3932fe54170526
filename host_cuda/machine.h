// What the parts of the harness share: fibers, warps, barriers, the shadow's cells, and the machine that holds them.
#pragma once
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "host_cuda.h"

#define HOST_SITE reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define HOST_HIDDEN __attribute__((visibility("hidden")))

namespace host {

constexpr size_t kStack = 128 << 10, kGuard = 64 << 10;  // below each stack lie bytes that nobody may touch
constexpr int kMaxThreads = 1024, kMaxWarps = 32, kBarriers = 16, kMaxMachines = 64;
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kStacks = size_t{256} << 20;  // address space for the stacks of a machine
static_assert(kMaxThreads * (kStack + kGuard) < kStacks);

struct Copy {  // a cp.async under way
  unsigned char* to;
  unsigned bytes;
  int group;
  uintptr_t site;
  unsigned char data[16];
};

using Clocks = uint32_t[kMaxWarps];

// What a thread knew at its last fence: an atomic after it lets others know as much.
struct Fence {
  bool set = false, device = false;
  uint64_t number = 0;
  uint32_t synced = 0;
  size_t learned = 0;  // so many entries of Machine::learned
  Clocks clock;
};

struct Variable;  // an atomic's address, and what was released to it
struct Seen {     // the first `count` releases to it
  std::shared_ptr<Variable> variable;
  size_t count;
  int thread;
  uint32_t time;  // of the thread's warp, when it fenced after its atomic
};

struct alignas(64) Fiber {  // what a switch needs comes first
  void* top;                // of its stack, while it waits
  uint3 index;
  int number, warp, lane;
  const char* waits;  // for what; null while it runs
  int group;          // of cp.async, the one being filled
  std::vector<Copy> copies;
  Fence fence;
  std::vector<Seen> seen;  // by atomics after the last fence
};

struct Meeting {
  const char* operation;
  unsigned mask, arrived;
};

struct alignas(64) Warp {
  unsigned exists, ready;  // a bit for each lane
  uint32_t synced;         // what the lanes did before this time of the warp, they all know
  int open;                // so many meetings have begun
  Meeting meetings[32];
  void* brought[32];
};

struct Mbarrier {  // what the 8 bytes in shared memory mean
  int count = 0, arrived = 0, phase = 0;
  int64_t bytes_due = 0;
  std::vector<Fiber*> waiting;
  Clocks clock = {};
};

struct BulkCopy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  uint64_t* barrier;
  Fiber* issuer;
  uintptr_t site;
};

struct Barrier {
  int expected = 0, arrived = 0, round = 0;
  int count[2] = {};  // of predicates that hold, by round
  unsigned waiting[kMaxWarps] = {};
  Clocks clock = {};
};

// What the shadow remembers of four bytes, or of one. An access is (block serial, thread, clock of its warp, marks).
struct Cell {
  uint64_t write, reads[2];
  uint32_t write_site, read_site;  // return addresses, from the start of the image
};
struct Shadow {
  Cell* words;
  Cell* bytes;  // four for each word, in use where a part of it was touched alone
  std::shared_ptr<void> owner;
};

constexpr uint64_t kUnderWay = 2, kAtomic = 1;
constexpr uint64_t kSplit = ~uint64_t{0};    // as a word's write: see its bytes
constexpr uint64_t kSplitting = kSplit - 1;  // and: its bytes are being filled
constexpr int kSerialShift = 34, kThreadShift = 24;
constexpr uint32_t kLastTime = (1u << 22) - 1;
constexpr uint64_t make_access(uint64_t serial, int thread, uint32_t clock, uint64_t marks) {
  return serial << kSerialShift | uint64_t(thread) << kThreadShift | uint64_t(clock) << 2 | marks;
}
constexpr uint64_t serial_of(uint64_t a) { return a >> kSerialShift; }
constexpr int thread_of(uint64_t a) { return a >> kThreadShift & 1023; }
constexpr uint32_t clock_of(uint64_t a) { return a >> 2 & kLastTime; }

struct Region {
  enum Kind { kShared, kGlobal, kConstant };
  uintptr_t begin, end;
  std::string name;
  Kind kind;
  Shadow shadow;
  uintptr_t data;                                            // of the buffer it is a part of
  size_t bytes;                                              // of that buffer
  mutable bool used = false;                                 // by this block
  uintptr_t origin() const { return data & ~uintptr_t{3}; }  // where the shadow begins
};

using Variables = std::unordered_map<uintptr_t, std::shared_ptr<Variable>>;

struct LaunchState {  // what the OS threads that run one launch share
  const Grid* grid;
  uint64_t first_serial;
  int os_threads;
  std::atomic<bool> fences{false};  // was there any?
  std::recursive_mutex mutex;
  Variables variables;
};

class Traffic;

struct Machine {  // one for each OS thread
  LaunchState* launch = nullptr;
  const Grid* grid = nullptr;
  dim3 block;
  uint64_t serial = 0, first_serial = 0;  // of this block, and of the launch's first block
  int threads = 0, warps = 0, returned = 0, slot = -1;
  Fiber* now = nullptr;
  void* main_top = nullptr;
  uintptr_t stacks = 0;
  char* dynamic = nullptr;  // dynamic shared memory
  Shadow dynamic_shadow = {};
  std::string fault;
  std::vector<Region> regions;  // by address
  const Region* hot[64] = {};
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Warp warp[kMaxWarps];
  Barrier barrier[kBarriers];
  std::map<const uint64_t*, Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk;
  Clocks clock[kMaxWarps];  // [w][v]: what warp w knows of the time of warp v
  std::vector<Seen> learned;
  Variables variables;                              // in shared memory
  std::unique_lock<std::recursive_mutex> ordering;  // of the launch's mutex, while an AtomicOrder lives
  uint64_t random = 0;                              // 0: threads take turns
  uint64_t idle = 0;                                // how often threads gave way since anything changed
  std::chrono::steady_clock::time_point idle_since;
  Traffic* traffic = nullptr;

  void run_block();
  void sort_regions();
  void clear_shared();
  void wait_for(const char* what);
  void give_way(bool changed);
  void finish();
  void arrive(Clocks clock);
  void learn(int w, const uint32_t* clock);
  void tick(int w);
  void release(Barrier&);
  Mbarrier& find_mbarrier(const uint64_t*);
  void settle(Mbarrier&);
  bool land_bulk_copy();
  [[noreturn]] void stop(std::string what);

 private:
  Fiber* next(const Fiber& self, bool waits);
  Fiber* any();
  void wait_for_others();
};

// The machine whose fiber is running, from the address of its stack: no thread_local, whose address costs a call in a
// .so.
HOST_HIDDEN extern uintptr_t arena;
HOST_HIDDEN extern Machine* machines[kMaxMachines];
HOST_HIDDEN extern bool checks;

__attribute__((always_inline)) inline Machine* running() {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) - arena;
  return offset < kMaxMachines * kStacks ? machines[offset / kStacks] : nullptr;
}

// fibers.cpp
Machine& take_machine();
void give_back(Machine&);
std::string stack_text(void* frame);
std::string stack_text(const Fiber& waiting);

// order.cpp
bool knows(const Machine&, uint64_t access);  // through fences and atomics
struct AtomicOrder {                          // lives around an atomic at p, its check included
  explicit AtomicOrder(uintptr_t p);
  ~AtomicOrder();
};

// Did the access `a` happen before what the running thread does now?
inline bool ordered(const Machine& m, uint64_t a) {
  if (serial_of(a) == m.serial) {
    const int thread = thread_of(a), w = m.now->warp, v = thread / 32;
    if (thread == m.now->number || (v == w ? clock_of(a) < m.warp[w].synced : clock_of(a) <= m.clock[w][v]))
      return true;
  } else if (serial_of(a) < m.first_serial) {  // an earlier launch
    return true;
  }
  return knows(m, a);
}

// shadow.cpp
enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite, kAtomicUpdate, kCopyIssue, kCopyLand };
void check_access(Kind, uintptr_t p, unsigned bytes, unsigned alignment, uintptr_t site);

// regions.cpp
HOST_HIDDEN extern const uintptr_t image_base;  // what to add to addresses in our file
uintptr_t bias_of(uintptr_t pc);
Shadow new_shadow(uintptr_t data, size_t bytes);
std::vector<Region> registered();
std::vector<Region> static_shared();  // of the calling OS thread
bool constant_region(uintptr_t p, Region&);

// report.cpp
[[noreturn]] void fail_launch(const std::string& what);  // throws
[[noreturn]] void fault(const char* format, ...);        // "kind: what happened"
std::string describe(uint64_t access);
std::string where(uintptr_t pc);
std::vector<std::string> where(const std::vector<uintptr_t>& pcs);
std::string format(const uint3&);

// mutants.cpp: is this synchronisation left out on purpose?
HOST_HIDDEN extern bool mutating;
bool left_out(const char* what, uintptr_t site);

}  // namespace host
