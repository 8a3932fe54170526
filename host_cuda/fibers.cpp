// Fibers: each CUDA thread has a stack of its own and gives way only where it has to wait.
#include <sys/mman.h>

#include <cstdlib>

#include "machine.h"

// Leaves the running stack with its callee-saved registers on top, notes the top in *from, and goes on where `to` was
// left.
extern "C" HOST_HIDDEN void host_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl host_switch
.hidden host_switch
.type host_switch, @function
host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rcx
  jmp *%rcx           # not ret: the return predictor knows another stack
.size host_switch, .-host_switch
)");
constexpr int kSavedWords = 7, kSavedFrame = 5, kSavedReturn = 6, kEntryWords = 1;  // as after a call
#elif defined(__aarch64__)
asm(R"(
.text
.globl host_switch
.hidden host_switch
.type host_switch, %function
host_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16];  stp x21, x22, [sp, #32];  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64];  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96];  stp d10, d11, [sp, #112];  stp d12, d13, [sp, #128];  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16];  ldp x21, x22, [sp, #32];  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64];  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96];  ldp d10, d11, [sp, #112];  ldp d12, d13, [sp, #128];  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size host_switch, .-host_switch
)");
constexpr int kSavedWords = 20, kSavedFrame = 0, kSavedReturn = 1, kEntryWords = 0;
#else
#error "host_cuda knows how to switch stacks on x86-64 and aarch64"
#endif

namespace host {
namespace {

constexpr uintptr_t kSlot = kStack + kGuard;

[[noreturn]] void fiber_main() {
  Machine& m = *running();
  m.grid->call(m.grid->function, m.grid->parameters);
  m.finish();
  __builtin_unreachable();
}

std::mutex machines_mutex;
std::vector<Machine*> idle_machines;

char* map(size_t bytes, int access) {
  void* p = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail_launch("no address space for the stacks of threads");
  return static_cast<char*>(p);
}

}  // namespace

// Machines are kept for the next launch: their stacks and shadows are warm.
Machine& take_machine() {
  const std::lock_guard lock(machines_mutex);
  if (!arena) arena = reinterpret_cast<uintptr_t>(map(kMaxMachines * kStacks, PROT_NONE));
  if (idle_machines.empty()) {
    int slot = 0;
    while (slot < kMaxMachines && machines[slot]) ++slot;
    if (slot == kMaxMachines) fail_launch("more than 64 OS threads run kernels");
    auto* m = new Machine;
    m->slot = slot;
    m->stacks = arena + slot * kStacks;
    for (int i = 0; i < kMaxThreads; ++i) {
      mprotect(reinterpret_cast<void*>(m->stacks + i * kSlot + kGuard), kStack, PROT_READ | PROT_WRITE);
    }
    m->dynamic = static_cast<char*>(std::aligned_alloc(1024, kMaxShared));
    m->dynamic_shadow = new_shadow(reinterpret_cast<uintptr_t>(m->dynamic), kMaxShared);
    machines[slot] = m;
    idle_machines.push_back(m);
  }
  Machine& m = *idle_machines.back();
  idle_machines.pop_back();
  return m;
}

void give_back(Machine& m) {
  const std::lock_guard lock(machines_mutex);
  idle_machines.push_back(&m);
}

void Machine::sort_regions() {
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  std::fill(hot, hot + 64, nullptr);
}

// Fills what the last block used of shared memory with NaN, which is 0xff in every float format; or all of it where its
// accesses are not seen.
void Machine::clear_shared() {
  const bool seen = std::any_of(regions.begin(), regions.end(), [](const Region& r) { return r.used; });
  for (const Region& r : regions) {
    if (r.kind == Region::kShared && (r.used || !seen)) {
      std::memset(reinterpret_cast<void*>(r.begin), 0xff, r.end - r.begin);
    }
    r.used = false;
  }
  std::fill(hot, hot + 64, nullptr);  // so that the first use is seen
}

void Machine::run_block() {
  returned = 0;
  idle = 0;
  mbarriers.clear();
  bulk.clear();
  learned.clear();
  variables.clear();
  std::fill(barrier, barrier + kBarriers, Barrier{});
  for (int w = 0; w < warps; ++w) {
    const int lanes = std::min(32, threads - 32 * w);
    warp[w].exists = warp[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp[w].open = 0;
    warp[w].synced = 1;
    std::fill(clock[w], clock[w] + kMaxWarps, 0);
    clock[w][w] = 1;
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    const dim3 size = grid->threads;
    f.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    f.number = i, f.warp = i / 32, f.lane = i % 32, f.waits = nullptr, f.group = 0;
    f.copies.clear();
    f.fence.set = false;
    f.seen.clear();
    const uintptr_t colour = i * 5 * 64 % 4096;  // neighbouring stacks fall in different cache sets
    auto** top = reinterpret_cast<void**>(stacks + (i + 1) * kSlot - 64 - colour) - kEntryWords;
    *top = nullptr;
    f.top = top - kSavedWords;
    std::fill(top - kSavedWords, top, nullptr);
    top[kSavedReturn - kSavedWords] = reinterpret_cast<void*>(fiber_main);
  }
  clear_shared();
  now = &fibers[0];
  if (random) now = any();
  host_switch(&main_top, now->top);
  now = nullptr;
}

namespace {
uint64_t step(uint64_t& x) {  // xorshift64
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}
}  // namespace

// Any fiber that can go on; the shuffled order of HOST_CUDA_SEED.
Fiber* Machine::any() {
  const int start = step(random) % warps, lane = step(random) % 32;
  for (int i = 0; i < warps; ++i) {
    const int w = (start + i) % warps;
    if (const unsigned ready = warp[w].ready) {
      const unsigned later = ready & ~0u << lane;
      return &fibers[32 * w + __builtin_ctz(later ? later : ready)];
    }
  }
  return nullptr;
}

// The fiber whose turn it is. If `self` waits, its warp goes on first; if it gives way, everyone else does.
inline Fiber* Machine::next(const Fiber& self, bool waits) {
  if (random) return any();
  const unsigned own = warp[self.warp].ready, later = own & ~1u << self.lane;
  if (later) return &fibers[32 * self.warp + __builtin_ctz(later)];
  if (waits && own) return &fibers[32 * self.warp + __builtin_ctz(own)];
  for (int i = 1; i < warps; ++i) {
    const int w = self.warp + i < warps ? self.warp + i : self.warp + i - warps;
    if (warp[w].ready) return &fibers[32 * w + __builtin_ctz(warp[w].ready)];
  }
  return own ? &fibers[32 * self.warp + __builtin_ctz(own)] : nullptr;
}

// The running fiber may not go on: another one does. Mostly a lane of the same warp, by a short way.
void Machine::wait_for(const char* what) {
  Fiber& self = *now;
  self.waits = what;
  idle = 0;
  const unsigned own = warp[self.warp].ready &= ~(1u << self.lane), later = own & ~1u << self.lane;
  if (!later || random) return wait_for_others();
  now = &fibers[32 * self.warp + __builtin_ctz(later)];
  now->waits = nullptr;
  return host_switch(&self.top, now->top);  // a tail call: each return would be mispredicted
}

void Machine::wait_for_others() {
  Fiber& self = *now;
  do {
    if (Fiber* const other = next(self, true)) {
      now = other;
      now->waits = nullptr;
      return now == &self ? void() : host_switch(&self.top, now->top);
    }
  } while (land_bulk_copy());  // they take as long as they may: until nobody can go on without them
  if (returned == threads) host_switch(&self.top, main_top);
  stop("deadlock: no thread can go on");
}

// The running fiber may go on, yet it may be waiting for another one in a loop.
void Machine::give_way(bool changed) {
  Fiber& self = *now;
  idle = changed ? 0 : idle + 1;
  if (idle > uint64_t(100000) * threads) {
    const auto time = std::chrono::steady_clock::now();
    if (idle == uint64_t(100000) * threads + 1) idle_since = time;
    if (launch->os_threads == 1 || time - idle_since > std::chrono::seconds(20)) {
      stop("deadlock: threads wait in loops for what no thread writes");
    }
  }
  now = next(self, false);
  now->waits = nullptr;
  if (now != &self) host_switch(&self.top, now->top);
}

void Machine::finish() {
  ++returned;
  wait_for("returned");
}

std::string stack_text(const Fiber& waiting) {
  auto** saved = static_cast<void**>(waiting.top);
  void* frame[2] = {saved[kSavedFrame], saved[kSavedReturn]};
  return stack_text(frame);
}

uint3 thread_index() { return running()->now->index; }
uint3 block_index() { return running()->block; }
dim3 block_size() { return running()->grid->threads; }
dim3 grid_size() { return running()->grid->blocks; }
int lane_index() { return running()->now->lane; }

void* dynamic_shared(size_t bytes) {
  Machine& m = *running();
  if (bytes > m.grid->shared_bytes) {
    fail("the kernel uses %zu bytes of dynamic shared memory, the launch gave %zu", bytes, m.grid->shared_bytes);
  }
  return m.dynamic;
}

// Ends the launch: the block's fibers are left where they stand.
[[noreturn]] HOST_HIDDEN void leave(Machine& m) {
  void* abandoned;
  host_switch(&abandoned, m.main_top);
  __builtin_unreachable();
}

}  // namespace host
