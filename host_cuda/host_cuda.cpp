// The machine under host_cuda.h, in four parts: fibers, meetings and barriers, the shadow of memory, and reports.
// Compiled without -fsanitize=thread: it implements the calls which that flag plants into kernels.
#include "host_cuda.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#define HOST_SITE reinterpret_cast<uintptr_t>(__builtin_return_address(0))

// ---- fibers ---------------------------------------------------------------------------------------------------------

// Leaves the running stack with its callee-saved registers on top, notes the top in *from, and goes on where `to` was
// left.
extern "C" void host_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl host_switch
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
#endif

namespace host {
[[noreturn]] void fault(const char* format, ...);  // "kind: what happened"

namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kColour = 5 * 64;  // neighbouring stacks fall in different cache sets
constexpr int kMaxThreads = 1024, kMaxWarps = 32, kBarriers = 16;
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kStacks = kMaxThreads * (kStack + kColour) + 4096;

struct Copy {  // a cp.async under way
  unsigned char* to;
  unsigned bytes;
  int group;
  unsigned char data[16];
};

struct Fiber {
  void* top;  // of its stack, while it waits
  uint3 index;
  int number, warp, lane;
  const char* waits;  // for what; null while it runs
  unsigned mask;      // the lanes it waits for
  int group;          // of cp.async, the one being filled
  std::vector<Copy> copies;
};

struct Warp {
  unsigned exists, ready, meeting;  // a bit for each lane
  void* brought[32];
};

struct Mbarrier {  // what the 8 bytes in shared memory mean
  int count = 0, arrived = 0, phase = 0;
  int64_t bytes_due = 0;
  std::vector<Fiber*> waiting;
  uint32_t clock[kMaxWarps] = {};
};

struct BulkCopy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  uint64_t* barrier;
  Fiber* issuer;
};

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned waiting[kMaxWarps] = {};
  uint32_t clock[kMaxWarps] = {};
};

// What the shadow remembers of one byte. An access is (block serial, thread, clock of its warp); see `ordered`.
struct Cell {
  uint64_t write, reads[2];
  uint32_t write_site, read_site;  // return addresses, from the start of the image
};

struct Region {
  uintptr_t begin, end;
  std::string name;
  bool shared;
  Cell* shadow;
};

struct Machine {  // one for each OS thread
  const Grid* grid = nullptr;
  dim3 block;
  uint64_t serial = 0, first_serial = 0;  // of this block, and of the launch's first block
  int threads = 0, warps = 0, returned = 0;
  Fiber* now = nullptr;
  void* main_top = nullptr;
  char* stacks = nullptr;
  char* dynamic = nullptr;  // dynamic shared memory
  Cell* dynamic_shadow = nullptr;
  std::string fault;
  std::vector<Region> regions;  // static shared, dynamic shared, global
  size_t static_regions = 0;
  const Region* hot[64] = {};
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Warp warp[kMaxWarps];
  Barrier barrier[kBarriers];
  std::map<const uint64_t*, Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk;
  uint32_t clock[kMaxWarps][kMaxWarps];  // [w][v]: what warp w knows of the time of warp v

  ~Machine() {
    for (size_t i = 0; i < static_regions; ++i) std::free(regions[i].shadow);
    std::free(dynamic_shadow);
    std::free(dynamic);
    munmap(stacks, kStacks);
  }
  void run_block();
  void wait_for(const char* what);
  void finish();
  void release(Barrier&);
  void learn(int w, const uint32_t* clock);
  Mbarrier& find_mbarrier(const uint64_t*);
  void settle(Mbarrier&);
  bool land_bulk_copy();
  [[noreturn]] void stop(std::string what);
};

thread_local Machine* machine;
thread_local std::unique_ptr<Machine> own_machine;
std::atomic<uint64_t> next_serial{1};
bool checks = true;

[[noreturn]] void fiber_main() {
  Machine& m = *machine;
  m.grid->call(m.grid->function, m.grid->parameters);
  m.finish();
  __builtin_unreachable();
}

void Machine::run_block() {
  returned = 0;
  mbarriers.clear();
  bulk.clear();
  std::fill(barrier, barrier + kBarriers, Barrier{});
  for (int w = 0; w < warps; ++w) {
    const int lanes = std::min(32, threads - 32 * w);
    warp[w].exists = warp[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp[w].meeting = 0;
    std::fill(clock[w], clock[w] + kMaxWarps, 0);
    clock[w][w] = 1;
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    const dim3 size = grid->threads;
    f.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    f.number = i, f.warp = i / 32, f.lane = i % 32, f.waits = nullptr, f.group = 0;
    f.copies.clear();
    auto** top = reinterpret_cast<void**>(stacks + (i + 1) * (kStack + kColour) - 64);
    top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63}) - kEntryWords;
    *top = nullptr;
    f.top = top - kSavedWords;
    std::fill(top - kSavedWords, top, nullptr);
    top[kSavedReturn - kSavedWords] = reinterpret_cast<void*>(fiber_main);
  }
  for (const Region& r : regions) {
    if (r.shared) std::memset(reinterpret_cast<void*>(r.begin), 0xff, r.end - r.begin);  // NaN in every float format
  }
  now = &fibers[0];
  host_switch(&main_top, now->top);
}

// The running fiber may not go on: another one does. Lanes of the same warp first.
void Machine::wait_for(const char* what) {
  Fiber& self = *now;
  self.waits = what;
  warp[self.warp].ready &= ~(1u << self.lane);
  do {
    for (int i = 0; i < warps; ++i) {
      const int w = self.warp + i < warps ? self.warp + i : self.warp + i - warps;
      const unsigned ready = warp[w].ready;
      if (!ready) continue;
      const unsigned later = ready & ~0u << self.lane;  // in turn, so that no lane always comes first
      now = &fibers[32 * w + __builtin_ctz(later ? later : ready)];
      now->waits = nullptr;
      return now == &self ? void()
                          : host_switch(&self.top, now->top);  // a tail call, as each return would be mispredicted
    }
  } while (land_bulk_copy());  // they take as long as they may: until nobody can go on without them
  if (returned == threads) host_switch(&self.top, main_top);
  stop("deadlock: no thread can go on");
}

void Machine::finish() {
  ++returned;
  wait_for("returned");
}

}  // namespace

uint3 thread_index() { return machine->now->index; }
uint3 block_index() { return machine->block; }
dim3 block_size() { return machine->grid->threads; }
dim3 grid_size() { return machine->grid->blocks; }
int lane_index() { return machine->now->lane; }

void* dynamic_shared(size_t bytes) {
  if (bytes > machine->grid->shared_bytes) {
    fail("the kernel uses %zu bytes of dynamic shared memory, the launch gave %zu", bytes, machine->grid->shared_bytes);
  }
  return machine->dynamic;
}

// ---- meetings and barriers ------------------------------------------------------------------------------------------

void meet(const char* operation, unsigned mask, void* mine, Meaning meaning) {
  Machine& m = *machine;
  Fiber& f = *m.now;
  Warp& w = m.warp[f.warp];
  const unsigned bit = 1u << f.lane;
  if (!(mask & bit)) fail("%s: mask 0x%08x does not name the calling lane %d", operation, mask, f.lane);
  mask &= w.exists;
  f.mask = mask;
  w.brought[f.lane] = mine;
  if (const unsigned others = w.meeting & mask) {
    const Fiber& other = m.fibers[32 * f.warp + __builtin_ctz(others)];
    if (other.mask != mask || (other.waits != operation && std::strcmp(other.waits, operation) != 0)) {
      fault("divergent warp: lane %d is at %s with mask 0x%08x, lane %d at %s with mask 0x%08x", f.lane, operation,
            mask, other.lane, other.waits, other.mask);
    }
  }
  w.meeting |= bit;
  if ((w.meeting & mask) != mask) return m.wait_for(operation);
  w.meeting &= ~mask;
  if (meaning) {
    meaning(w.brought, mask);
  } else {
    ++m.clock[f.warp][f.warp];  // __syncwarp orders memory; shuffles, votes and mma do not
  }
  w.ready |= mask;
}

unsigned vote(unsigned mask, bool mine) {
  struct Lane {
    bool mine;
    unsigned result;
  } post{mine, 0};
  warp<Lane>("vote", mask, post, [](Lane* const* lane, unsigned mask) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= unsigned(mask >> i & 1 && lane[i]->mine) << i;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) lane[i]->result = result;
    }
  });
  return post.result;
}

namespace {
constexpr const char* kBarrierName[kBarriers] = {
    "__syncthreads", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
    "barrier 8",     "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};

Barrier& arrive(int id, int threads) {
  Machine& m = *machine;
  Barrier& b = m.barrier[id];
  if (threads == kWholeBlock) threads = m.threads;
  if (b.arrived && b.expected != threads) {
    fail("%s: this thread expects %d threads, others expect %d", kBarrierName[id], threads, b.expected);
  }
  b.expected = threads;
  ++b.arrived;
  const int w = m.now->warp;
  for (int v = 0; v < m.warps; ++v) b.clock[v] = std::max(b.clock[v], m.clock[w][v]);
  return b;
}
}  // namespace

// Warp w now knows all that `known` does, and its own time goes on.
void Machine::learn(int w, const uint32_t* known) {
  for (int v = 0; v < warps; ++v) clock[w][v] = std::max(clock[w][v], known[v]);
  ++clock[w][w];
}

// Everyone who waited has now seen all that everyone who arrived had done.
void Machine::release(Barrier& b) {
  for (int w = 0; w < warps; ++w) {
    if (!b.waiting[w]) continue;
    learn(w, b.clock);
    warp[w].ready |= b.waiting[w];
  }
  b = Barrier{};
}

void barrier_sync(int id, int threads) {
  Machine& m = *machine;
  Barrier& b = arrive(id, threads);
  b.waiting[m.now->warp] |= 1u << m.now->lane;
  if (b.arrived < b.expected) return m.wait_for(kBarrierName[id]);
  m.release(b);
}

void barrier_arrive(int id, int threads) {
  Machine& m = *machine;
  Barrier& b = arrive(id, threads);
  ++m.clock[m.now->warp][m.now->warp];  // what follows is not covered
  if (b.arrived == b.expected) m.release(b);
}

// Using an mbarrier is like an atomic update: no race with other uses, but one with an mbarrier_init before no barrier.
Mbarrier& Machine::find_mbarrier(const uint64_t* p) {
  const auto found = mbarriers.find(p);
  if (found == mbarriers.end()) fail("an mbarrier is used before mbarrier_init");
  return found->second;
}

// Ends the phase if all have arrived and all bytes are there.
void Machine::settle(Mbarrier& b) {
  if (b.arrived > b.count) fail("an mbarrier of count %d has %d arrivals in one phase", b.count, b.arrived);
  if (b.arrived < b.count || b.bytes_due != 0) return;
  b.arrived = 0;
  b.phase ^= 1;
  for (const Fiber* f : b.waiting) warp[f->warp].ready |= 1u << f->lane;
  b.waiting.clear();
}

void mbarrier_init(uint64_t* p, int count) {
  write(p, 8);
  Mbarrier& b = machine->mbarriers[p] = Mbarrier{};
  b.count = count;
}

void mbarrier_arrive(uint64_t* p, unsigned expected_bytes) {
  Machine& m = *machine;
  update(p, 8);
  Mbarrier& b = m.find_mbarrier(p);
  const int w = m.now->warp;
  for (int v = 0; v < m.warps; ++v) b.clock[v] = std::max(b.clock[v], m.clock[w][v]);
  ++m.clock[w][w];
  b.bytes_due += expected_bytes;
  ++b.arrived;
  m.settle(b);
}

void mbarrier_wait(uint64_t* p, int parity) {
  Machine& m = *machine;
  update(p, 8);
  Mbarrier& b = m.find_mbarrier(p);
  if (b.phase == parity) {
    b.waiting.push_back(m.now);
    m.wait_for("mbarrier_wait");
  }
  m.learn(m.now->warp, b.clock);
}

// ---- the shadow of memory -------------------------------------------------------------------------------------------

namespace {

// Bits of an access: serial of the block 32, thread 10, clock of its warp 20, and two marks.
constexpr uint64_t kUnderWay = 2, kAtomic = 1;
constexpr uint64_t make_access(uint64_t serial, int thread, uint32_t clock, uint64_t marks) {
  return serial << 32 | uint64_t(thread) << 22 | uint64_t(clock & 0xfffff) << 2 | marks;
}
constexpr uint64_t serial_of(uint64_t a) { return a >> 32; }
constexpr int thread_of(uint64_t a) { return a >> 22 & 1023; }
constexpr uint32_t clock_of(uint64_t a) { return a >> 2 & 0xfffff; }

enum class Kind { kRead, kWrite, kAtomicUpdate, kCopyIssue, kCopyLand };

const uintptr_t image_base = [] {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(fiber_main), &info);
  return reinterpret_cast<uintptr_t>(info.dli_fbase);
}();

std::vector<Region> buffers;
Cell* new_shadow(size_t bytes) { return static_cast<Cell*>(std::calloc(bytes, sizeof(Cell))); }

std::string describe(uint64_t access);
std::string where(uintptr_t pc);

// Did the access `a` happen before what this thread does now, by barriers alone?
bool ordered(const Machine& m, uint64_t a) {
  if (serial_of(a) != m.serial) return serial_of(a) < m.first_serial;  // another launch, or else another block
  const int thread = thread_of(a), w = m.now->warp, v = thread / 32;
  if (thread == m.now->number) return true;
  return v == w ? clock_of(a) < m.clock[w][w] : clock_of(a) <= m.clock[w][v];
}

const Region* find(Machine& m, uintptr_t p) {
  const Region*& hot = m.hot[(p >> 8) % 64];
  if (hot && p >= hot->begin && p < hot->end) return hot;
  for (const Region& r : m.regions) {
    if (p >= r.begin && p < r.end) return hot = &r;
  }
  return nullptr;
}

[[noreturn]] void outside(Machine& m, uintptr_t p, unsigned bytes, const char* verb) {
  const Region* best = nullptr;
  uintptr_t distance = 4096;
  for (const Region& r : m.regions) {
    const uintptr_t d = p >= r.end ? p - r.end : p < r.begin ? r.begin - p : 0;
    if (d < distance) best = &r, distance = d;
  }
  std::string text = std::string("out of bounds: ") + verb + " " + std::to_string(bytes) + " bytes";
  if (best) {
    text += ", " + std::to_string(distance) + " bytes " + (p >= best->end ? "past the end of " : "before ") +
            best->name + " [" + std::to_string(best->end - best->begin) + " bytes of " +
            (best->shared ? "shared" : "global") + "]";
  } else {
    text += ", in no registered buffer";
  }
  m.stop(text);
}

bool in_image(uintptr_t p) {  // tables of constants; kernel parameters are on the fiber's stack
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(p), &info) != 0;
}

template <Kind kind>
void check(uintptr_t p, unsigned bytes, unsigned alignment, uintptr_t site) {
  constexpr bool reads = kind == Kind::kRead;
  constexpr const char* verb = reads                         ? "reads"
                               : kind == Kind::kAtomicUpdate ? "updates"
                               : kind == Kind::kCopyIssue    ? "copies (cp.async) to"
                                                             : "writes";
  Machine& m = *machine;
  const auto stack = reinterpret_cast<uintptr_t>(m.stacks);
  if (p - stack < m.threads * (kStack + kColour)) return;  // a thread's own variables
  const auto parameters = reinterpret_cast<uintptr_t>(m.grid->parameters);
  if (reads && p - parameters < m.grid->parameter_bytes) return;
  const Region* r = find(m, p);
  if (!r || p + bytes > r->end) {
    if (!r && (buffers.empty() || (reads && in_image(p)))) return;
    outside(m, r ? r->end : p, r ? unsigned(p + bytes - r->end) : bytes, verb);
  }
  if (p % alignment) {
    m.stop(std::string("misaligned: ") + verb + " " + std::to_string(bytes) + " bytes at " + r->name + " + " +
           std::to_string(p - r->begin));
  }
  const uint64_t marks = kind == Kind::kCopyIssue ? kUnderWay : kind == Kind::kAtomicUpdate ? kAtomic : 0;
  const uint64_t mine = make_access(m.serial, m.now->number, m.clock[m.now->warp][m.now->warp], marks);
  const auto short_site = uint32_t(site - image_base);
  uint64_t known[3] = {mine, mine, mine};  // neighbouring bytes mostly carry the same marks
  for (unsigned i = 0; i < bytes; ++i) {
    Cell& c = r->shadow[p - r->begin + i];
    const auto at = [&] { return r->name + " + " + std::to_string(p - r->begin + i); };
    const auto race = [&](const char* theirs, uint64_t access, uint32_t their_site) {
      m.stop(std::string("race: ") + verb + " " + at() + ", which " + describe(access) + " " + theirs + "\n  there   " +
             where(image_base + their_site) + "\n  and no barrier lies between");
    };
    if (r->shared && serial_of(c.write) != m.serial) {
      if (reads || kind == Kind::kAtomicUpdate)
        m.stop(std::string("unwritten: ") + verb + " " + at() + ", which no thread of this block has written so far");
    } else if (c.write != known[0]) {
      if (c.write & kUnderWay && serial_of(c.write) == m.serial && kind != Kind::kCopyLand) {
        m.stop(std::string("too early: ") + verb + " " + at() + ", where a cp.async of " + describe(c.write) +
               " has not been waited for\n  there   " + where(image_base + c.write_site));
      }
      const bool both_atomic = kind == Kind::kAtomicUpdate && c.write & kAtomic;
      if (c.write && !both_atomic && !ordered(m, c.write)) race("wrote", c.write, c.write_site);
      known[0] = c.write;
    }
    if (reads) {
      if (thread_of(c.reads[0]) != m.now->number || serial_of(c.reads[0]) != m.serial) c.reads[1] = c.reads[0];
      c.reads[0] = mine;
      c.read_site = short_site;
    } else {
      for (int j = 0; j < 2; ++j) {
        if (c.reads[j] == known[1 + j] || c.reads[j] == 0) continue;
        if ((!r->shared || serial_of(c.reads[j]) == m.serial) && !ordered(m, c.reads[j])) {
          race("read", c.reads[j], c.read_site);
        }
        known[1 + j] = c.reads[j];
      }
      c.write = mine;
      c.write_site = short_site;
    }
  }
}

bool Machine::land_bulk_copy() {
  if (bulk.empty()) return false;
  const BulkCopy c = bulk.front();
  bulk.erase(bulk.begin());
  Fiber* const self = now;
  now = c.issuer;  // the copy counts as the issuer's write
  if (checks) check<Kind::kCopyLand>(reinterpret_cast<uintptr_t>(c.to), c.bytes, 16, HOST_SITE);
  std::memcpy(c.to, c.from, c.bytes);
  now = self;
  Mbarrier& b = find_mbarrier(c.barrier);
  const int w = c.issuer->warp;
  b.clock[w] = std::max(b.clock[w], clock[w][w]++);
  b.bytes_due -= c.bytes;
  settle(b);
  return true;
}

bool off() { return !machine || !machine->now || !checks; }

}  // namespace

void read(const void* from, unsigned bytes) {
  if (!off()) check<Kind::kRead>(reinterpret_cast<uintptr_t>(from), bytes, bytes, HOST_SITE);
}
void write(void* to, unsigned bytes) {
  if (!off()) check<Kind::kWrite>(reinterpret_cast<uintptr_t>(to), bytes, bytes, HOST_SITE);
}

void update(void* to, unsigned bytes) {
  if (!off()) check<Kind::kAtomicUpdate>(reinterpret_cast<uintptr_t>(to), bytes, bytes, HOST_SITE);
}

void cp_async(void* to, const void* from, unsigned bytes, unsigned source_bytes) {
  Fiber& f = *machine->now;
  if (source_bytes > bytes) fail("cp.async with %u source bytes for a copy of %u", source_bytes, bytes);
  if (!off()) {
    if (source_bytes) check<Kind::kRead>(reinterpret_cast<uintptr_t>(from), source_bytes, 1, HOST_SITE);
    if (reinterpret_cast<uintptr_t>(from) % bytes) fault("misaligned: cp.async of %u bytes from %p", bytes, from);
    check<Kind::kCopyIssue>(reinterpret_cast<uintptr_t>(to), bytes, bytes, HOST_SITE);
  }
  Copy& c = f.copies.emplace_back(Copy{static_cast<unsigned char*>(to), bytes, f.group, {}});
  std::memcpy(c.data, from, source_bytes);
}
void cp_async_commit() { ++machine->now->group; }
void cp_async_wait(int pending_groups) {
  Fiber& f = *machine->now;
  size_t landed = 0;
  for (; landed < f.copies.size() && f.copies[landed].group < f.group - pending_groups; ++landed) {
    const Copy& c = f.copies[landed];
    if (!off()) check<Kind::kCopyLand>(reinterpret_cast<uintptr_t>(c.to), c.bytes, c.bytes, HOST_SITE);
    std::memcpy(c.to, c.data, c.bytes);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + landed);
}

void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  Machine& m = *machine;
  m.find_mbarrier(barrier);
  if (bytes % 16) fail("a bulk copy of %u bytes, which is no multiple of 16", bytes);
  if (!off()) {
    check<Kind::kRead>(reinterpret_cast<uintptr_t>(from), bytes, 16, HOST_SITE);
    check<Kind::kCopyIssue>(reinterpret_cast<uintptr_t>(to), bytes, 16, HOST_SITE);
  }
  m.bulk.push_back({static_cast<unsigned char*>(to), from, bytes, barrier, m.now});
}

template <typename T>
T atomic_add(T* to, T value, uintptr_t site) {
  if (!off()) check<Kind::kAtomicUpdate>(reinterpret_cast<uintptr_t>(to), sizeof(T), sizeof(T), site);
  return std::atomic_ref<T>(*to).fetch_add(value);
}
}  // namespace host
float atomicAdd(float* to, float value) { return host::atomic_add(to, value, HOST_SITE); }
int atomicAdd(int* to, int value) { return host::atomic_add(to, value, HOST_SITE); }

// What -fsanitize=thread calls before each access.
#define HOST_HOOK(name, kind, bytes, alignment)                                                                   \
  extern "C" void __tsan_##name(void* p) {                                                                        \
    if (!host::off()) host::check<host::Kind::kind>(reinterpret_cast<uintptr_t>(p), bytes, alignment, HOST_SITE); \
  }
HOST_HOOK(read1, kRead, 1, 1)
HOST_HOOK(write1, kWrite, 1, 1) HOST_HOOK(read2, kRead, 2, 2) HOST_HOOK(write2, kWrite, 2, 2)
    HOST_HOOK(read4, kRead, 4, 4) HOST_HOOK(write4, kWrite, 4, 4) HOST_HOOK(read8, kRead, 8, 8)
        HOST_HOOK(write8, kWrite, 8, 8) HOST_HOOK(read16, kRead, 16, 16) HOST_HOOK(write16, kWrite, 16, 16)
            HOST_HOOK(unaligned_read2, kRead, 2, 1) HOST_HOOK(unaligned_write2, kWrite, 2, 1)
                HOST_HOOK(unaligned_read4, kRead, 4, 1) HOST_HOOK(unaligned_write4, kWrite, 4, 1)
                    HOST_HOOK(unaligned_read8, kRead, 8, 1) HOST_HOOK(unaligned_write8, kWrite, 8, 1)
                        HOST_HOOK(unaligned_read16, kRead, 16, 1)
                            HOST_HOOK(unaligned_write16, kWrite, 16, 1) extern "C" {
  void __tsan_read_range(void* p, size_t bytes) {
    if (!host::off()) host::check<host::Kind::kRead>(reinterpret_cast<uintptr_t>(p), unsigned(bytes), 1, HOST_SITE);
  }
  void __tsan_write_range(void* p, size_t bytes) {
    if (!host::off()) host::check<host::Kind::kWrite>(reinterpret_cast<uintptr_t>(p), unsigned(bytes), 1, HOST_SITE);
  }

  // What -fsanitize=alignment,bounds,signed-integer-overflow calls where the language forbids what follows.
  struct HostPlace {
    const char* file;
    uint32_t line, column;
  };
  struct HostType {
    uint16_t kind, info;
    char name[1];
  };
  struct HostMismatch {
    HostPlace place;
    const HostType* type;
    uint8_t log_alignment, kind;
  };
  struct HostIndex {
    HostPlace place;
    const HostType *array, *index;
  };
  struct HostOverflow {
    HostPlace place;
    const HostType* type;
  };

  void __ubsan_handle_type_mismatch_v1(HostMismatch * m, uintptr_t p) {
    if (!host::off())
      host::fault("misaligned: %s at address %#zx, which is no multiple of %d", m->type->name, p,
                  1 << m->log_alignment);
  }
  void __ubsan_handle_out_of_bounds(HostIndex * i, intptr_t index) {
    if (!host::off()) host::fault("out of bounds: index %zd of an array %s", index, i->array->name);
  }
#define HOST_OVERFLOW(op, sign)                                                                       \
  void __ubsan_handle_##op##_overflow(HostOverflow* o, intptr_t a, intptr_t b) {                      \
    if (!host::off()) host::fault("overflow: %zd " sign " %zd does not fit %s", a, b, o->type->name); \
  }
  HOST_OVERFLOW(add, "+")
  HOST_OVERFLOW(sub, "-") HOST_OVERFLOW(mul, "*") HOST_OVERFLOW(divrem, "/") void __ubsan_handle_negate_overflow(
      HostOverflow * o, intptr_t a) {
    if (!host::off()) host::fault("overflow: -(%zd) does not fit %s", a, o->type->name);
  }

  void __tsan_init() {}
  void __tsan_func_entry(void*) {}
  void __tsan_func_exit() {}
  void __tsan_vptr_update(void*, void*) {}
}

// ---- reports --------------------------------------------------------------------------------------------------------

namespace host {
namespace {

std::string format(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string describe(uint64_t access) {
  Machine& m = *machine;
  const std::string thread = "thread " + format(m.fibers[thread_of(access)].index);
  if (serial_of(access) == m.serial) return thread;
  const uint64_t b = serial_of(access) - m.first_serial;
  const dim3 g = m.grid->blocks;
  return "block " + format({unsigned(b % g.x), unsigned(b / g.x % g.y), unsigned(b / g.x / g.y)}) + " " + thread;
}

// "void (anonymous namespace)::f<int>(float*)" -> "f<int>"
std::string plain_name(std::string f) {
  const std::string hidden = "(anonymous namespace)::";
  for (size_t at; (at = f.find(hidden)) != f.npos;) f.erase(at, hidden.size());
  f = f.substr(0, f.find_first_of("(\n"));
  const size_t space = f.substr(0, f.find('<')).rfind(' ');
  return space == f.npos ? f : f.substr(space + 1);
}

// "inner file:line < outer file:line", innermost inlined function first, the harness itself left out.
std::string where(uintptr_t pc) {
  static std::map<uintptr_t, std::string> cache;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (const auto known = cache.find(pc); known != cache.end()) return known->second;
  Dl_info info;
  std::string& text = cache[pc];
  if (!dladdr(reinterpret_cast<void*>(pc), &info)) return text;
  char command[512], function[512], line[512];
  std::snprintf(command, sizeof command, "addr2line -Cfie '%s' 0x%zx 2>/dev/null", info.dli_fname,
                size_t(pc - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  FILE* pipe = popen(command, "r");
  if (!pipe) return text;
  while (std::fgets(function, sizeof function, pipe) && std::fgets(line, sizeof line, pipe)) {
    std::string f = function, l = line;
    l = l.substr(l.rfind('/') + 1);
    l = l.substr(0, l.find_first_of(" \n"));
    f = plain_name(f);
    if (l[0] == '?' || l.rfind("host_cuda.", 0) == 0 || f.rfind("std::", 0) == 0 || f == "decltype") continue;
    text += (text.empty() ? "" : " < ") + f + " " + l;
  }
  pclose(pipe);
  return text;
}

std::string stack_text(void* frame) {
  std::string text;
  for (auto** f = static_cast<void**>(frame); f && f[0] && f[1]; f = static_cast<void**>(f[0])) {
    const std::string step = where(reinterpret_cast<uintptr_t>(f[1]));
    if (!step.empty()) text += (text.empty() ? "" : " < ") + step;
  }
  return text;
}

std::string stack_text(const Fiber& waiting) {
  auto** saved = static_cast<void**>(waiting.top);
  void* frame[2] = {saved[kSavedFrame], saved[kSavedReturn]};
  return stack_text(frame);
}

// Ends the launch: the block's fibers are left where they stand.
void Machine::stop(std::string what) {
  void* const frame = __builtin_frame_address(0);  // never one passed in: a tail call would have popped it
  fault = what.substr(0, what.find(':')) + " in " + grid->kernel + "\n  block   " + format(block);
  if (what.rfind("deadlock", 0) != 0) {
    fault += "  thread " + format(now->index) + "\n  what    " + what.substr(what.find(':') + 2) + "\n  at      " +
             stack_text(frame);
  } else {
    std::map<std::string, std::vector<int>> groups;
    for (int i = 0; i < threads; ++i) {
      const Fiber& f = fibers[i];
      const auto at = [&] { return &f == now ? stack_text(frame) : stack_text(f); };
      const bool returned = std::strcmp(f.waits, "returned") == 0;
      groups[returned ? "returned" : std::string("wait at ") + f.waits + ", " + at()].push_back(i);
    }
    fault += "\n  what    " + what.substr(what.find(':') + 2);
    for (const auto& [state, who] : groups) {
      fault += "\n  " + std::to_string(who.size()) + " threads from " + format(fibers[who[0]].index) + " to " +
               format(fibers[who.back()].index) + " " + state;
    }
  }
  void* abandoned;
  host_switch(&abandoned, main_top);
  __builtin_unreachable();
}

// The shared arrays of all kernels: function-local thread_locals (_ZZ...) in the symbol table of this very image.
struct StaticShared {
  std::string name;
  size_t offset, bytes;
};
std::vector<StaticShared> read_static_shared() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(fiber_main), &info);
  std::vector<StaticShared> found;
  FILE* file = std::fopen(info.dli_fname, "rb");
  if (!file) return found;
  std::vector<char> image;
  char chunk[1 << 16];
  while (const size_t n = std::fread(chunk, 1, sizeof chunk, file)) image.insert(image.end(), chunk, chunk + n);
  std::fclose(file);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image.data());
  const auto* section = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (section[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbol = reinterpret_cast<const ElfW(Sym)*>(image.data() + section[s].sh_offset);
    const char* names = image.data() + section[section[s].sh_link].sh_offset;
    for (size_t i = 0; i < section[s].sh_size / sizeof *symbol; ++i) {
      const char* name = names + symbol[i].st_name;
      if ((symbol[i].st_info & 15) != STT_TLS || std::strncmp(name, "_ZZ", 3) != 0) continue;
      int status = 0;
      const std::unique_ptr<char, void (*)(void*)> plain(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                                         std::free);
      std::string text = status == 0 ? plain.get() : name;
      found.push_back({text.substr(text.rfind(':') + 1), symbol[i].st_value, symbol[i].st_size});
    }
  }
  return found;
}

uintptr_t thread_local_begin() {  // of this image, for the calling thread
  uintptr_t begin = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        if (info->dlpi_addr != image_base) return 0;
        *static_cast<uintptr_t*>(result) = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
        return 1;
      },
      &begin);
  return begin;
}

// Makes this OS thread ready to run blocks of the grid.
Machine& prepare(const Grid& grid, uint64_t first_serial) {
  if (!own_machine) {
    own_machine = std::make_unique<Machine>();
    own_machine->stacks = static_cast<char*>(
        mmap(nullptr, kStacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    static const std::vector<StaticShared> arrays = read_static_shared();
    own_machine->dynamic = static_cast<char*>(std::aligned_alloc(1024, kMaxShared));
    own_machine->dynamic_shadow = new_shadow(kMaxShared);
    const uintptr_t begin = thread_local_begin();
    for (const StaticShared& a : arrays) {
      own_machine->regions.push_back({begin + a.offset, begin + a.offset + a.bytes, a.name, true, new_shadow(a.bytes)});
    }
    own_machine->static_regions = own_machine->regions.size();
  }
  machine = own_machine.get();
  Machine& m = *machine;
  m.regions.resize(m.static_regions);
  std::fill(m.hot, m.hot + 64, nullptr);
  if (grid.shared_bytes > kMaxShared) throw std::runtime_error("launch: a block has at most 227 KiB of shared memory");
  const auto dynamic = reinterpret_cast<uintptr_t>(m.dynamic);
  m.regions.push_back({dynamic, dynamic + grid.shared_bytes, "dynamic shared memory", true, m.dynamic_shadow});
  m.regions.insert(m.regions.end(), buffers.begin(), buffers.end());
  m.grid = &grid;
  m.first_serial = first_serial;
  m.threads = grid.threads.x * grid.threads.y * grid.threads.z;
  m.warps = (m.threads + 31) / 32;
  m.fault.clear();
  return m;
}

}  // namespace

#define HOST_FORMAT(text)                               \
  char text[512];                                       \
  va_list arguments;                                    \
  va_start(arguments, format);                          \
  std::vsnprintf(text, sizeof text, format, arguments); \
  va_end(arguments)

void fail(const char* format, ...) {
  HOST_FORMAT(text);
  machine->stop(std::string("misuse: ") + text);
}
void fault(const char* format, ...) {
  HOST_FORMAT(text);
  machine->stop(text);
}

Buffer::Buffer(const void* p, size_t bytes, const char* name) : data(p) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  buffers.push_back({begin, begin + bytes, name, false, new_shadow(bytes)});
}
Buffer::~Buffer() {
  std::erase_if(buffers, [&](const Region& r) {
    const bool mine = r.begin == reinterpret_cast<uintptr_t>(data);
    if (mine) std::free(r.shadow);
    return mine;
  });
}

void run(const Grid& grid) {
  const int threads = grid.threads.x * grid.threads.y * grid.threads.z;
  if (threads < 1 || threads > kMaxThreads) throw std::runtime_error("launch: a block has 1 to 1024 threads");
  const uint64_t blocks = uint64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
  const uint64_t first = next_serial.fetch_add(blocks);
  std::atomic<uint64_t> next{0};
  std::string fault;
  std::mutex mutex;
  const auto work = [&] {
    Machine& m = prepare(grid, first);
    for (uint64_t b; (b = next++) < blocks && m.fault.empty();) {
      m.block = dim3(b % grid.blocks.x, b / grid.blocks.x % grid.blocks.y, b / grid.blocks.x / grid.blocks.y);
      m.serial = first + b;
      m.run_block();
    }
    m.now = nullptr;
    if (m.fault.empty()) return;
    next = blocks;
    const std::lock_guard lock(mutex);
    if (fault.empty()) fault = m.fault;
  };
  const char* setting = std::getenv("HOST_CUDA_THREADS");
  const char* off = std::getenv("HOST_CUDA_CHECKS");
  checks = !(off && off[0] == '0');
  std::vector<std::thread> helpers;
  for (int i = 1; i < (setting ? std::atoi(setting) : 1); ++i) helpers.emplace_back(work);
  work();
  for (std::thread& t : helpers) t.join();
  if (!fault.empty()) throw std::runtime_error(fault);
}

}  // namespace host
