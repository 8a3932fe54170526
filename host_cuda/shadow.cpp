// The shadow of memory: who touched each word last, and the checks that every access goes through.
// Compiled without -fsanitize=thread: it implements the calls which that flag plants into kernels.
#include "machine.h"
#include "traffic.h"

namespace host {

uintptr_t arena;
Machine* machines[kMaxMachines];
bool checks = true;

namespace {

constexpr bool reads(Kind kind) { return kind == Kind::kRead || kind == Kind::kAtomicRead; }
constexpr uint64_t marks(Kind kind) {
  if (kind == Kind::kCopyIssue) return kUnderWay;
  return kind == Kind::kAtomicRead || kind == Kind::kAtomicWrite || kind == Kind::kAtomicUpdate ? kAtomic : 0;
}
constexpr const char* verb(Kind kind) {
  if (reads(kind)) return "reads";
  if (kind == Kind::kAtomicUpdate) return "updates";
  return kind == Kind::kCopyIssue ? "copies to" : "writes";
}

struct Access {
  Machine& m;
  const Region& region;
  uint64_t mine;
  uint32_t site;
  uint64_t known[3];  // neighbours mostly carry the same marks: these were found in order
};

std::string place(const Access& a, uintptr_t p) { return a.region.name + " + " + std::to_string(p - a.region.data); }

[[noreturn, gnu::noinline]] void race(Kind kind, const Access& a, uintptr_t p, const char* theirs, uint64_t access,
                                      uint32_t their_site) {
  const bool other_block = serial_of(access) != a.m.serial;
  a.m.stop(std::string("race: ") + verb(kind) + " " + place(a, p) + ", which " + describe(access) + " " + theirs +
           "\n  there   " + where(image_base + their_site) +
           (other_block ? "\n  and nothing orders the two blocks" : "\n  and no barrier lies between"));
}

[[noreturn, gnu::noinline]] void unwritten(Kind kind, const Access& a, uintptr_t p) {
  a.m.stop(std::string("unwritten: ") + verb(kind) + " " + place(a, p) +
           ", which no thread of this block has written so far");
}

[[noreturn, gnu::noinline]] void too_early(Kind kind, const Access& a, uintptr_t p, const Cell& c) {
  a.m.stop(std::string("too early: ") + verb(kind) + " " + place(a, p) + ", where a copy by " + describe(c.write) +
           " has not been waited for\n  there   " + where(image_base + c.write_site));
}

uint64_t last_write(Cell& c) { return std::atomic_ref(c.write).load(std::memory_order_relaxed); }

// One cell, of a word or of a byte at p, whose last write was `write`: loaded once, for other OS threads may split a
// word in the meantime.
template <Kind kind>
__attribute__((always_inline)) inline void touch(Access& a, Cell& c, uint64_t write, uintptr_t p) {
  constexpr bool atomic = marks(kind) == kAtomic;
  const Machine& m = a.m;
  const bool shared = a.region.kind == Region::kShared;
  if (shared && serial_of(write) != m.serial) {
    if (reads(kind) || kind == Kind::kAtomicUpdate) unwritten(kind, a, p);
  } else if (write != a.known[0]) {
    if (write & kUnderWay && serial_of(write) == m.serial && kind != Kind::kCopyLand) too_early(kind, a, p, c);
    const bool fine = !write || (atomic && write & kAtomic) || ordered(m, write);
    if (!fine) race(kind, a, p, "wrote", write, c.write_site);
    a.known[0] = write;
  }
  if constexpr (reads(kind)) {
    if (thread_of(c.reads[0]) != m.now->number || serial_of(c.reads[0]) != m.serial) c.reads[1] = c.reads[0];
    c.reads[0] = a.mine;
    c.read_site = a.site;
  } else {
    for (int j = 0; j < 2; ++j) {
      const uint64_t read = c.reads[j];
      if (read == a.known[1 + j] || read == 0) continue;
      const bool fine = (shared && serial_of(read) != m.serial) || (atomic && read & kAtomic) || ordered(m, read);
      if (!fine) race(kind, a, p, "read", read, c.read_site);
      a.known[1 + j] = read;
    }
    c.write = a.mine;
    c.write_site = a.site;
  }
}

// Blocks on several OS threads may come to split the same word: one of them does, the others wait.
[[gnu::noinline]] void split(Cell& word, Cell* bytes) {
  const std::atomic_ref<uint64_t> state(word.write);
  for (uint64_t write = state; write != kSplit; write = state) {
    if (write == kSplitting || !state.compare_exchange_strong(write, kSplitting)) continue;
    Cell whole = word;
    whole.write = write;
    std::fill(bytes, bytes + 4, whole);
    state = kSplit;
  }
}

// The word whose bytes begin ... begin + 3 are touched from `first` on, up to `last`.
template <Kind kind>
__attribute__((always_inline)) inline void touch_word(Access& a, uintptr_t begin, uintptr_t first, uintptr_t last) {
  const size_t index = (begin - a.region.origin()) / 4;
  Cell& word = a.region.shadow.words[index];
  const bool whole = first == begin && last == begin + 4;
  const uint64_t write = last_write(word);
  if (whole && write < kSplitting) return touch<kind>(a, word, write, begin);
  Cell* const bytes = a.region.shadow.bytes + 4 * index;
  if (write != kSplit) split(word, bytes);
  for (uintptr_t p = first; p < last; ++p) touch<kind>(a, bytes[p - begin], last_write(bytes[p - begin]), p);
  if (whole && !reads(kind)) word = bytes[0];
}

const Region* find(Machine& m, uintptr_t p) {
  const Region*& hot = m.hot[(p >> 8) % 64];
  if (hot && p >= hot->begin && p < hot->end) return hot;
  const auto behind =
      std::upper_bound(m.regions.begin(), m.regions.end(), p, [](uintptr_t p, const Region& r) { return p < r.begin; });
  if (behind == m.regions.begin() || p >= behind[-1].end) return nullptr;
  hot = &behind[-1];
  hot->used = true;
  return hot;
}

[[noreturn]] void outside(Machine& m, uintptr_t p, unsigned bytes, const char* verb) {
  const Region* best = nullptr;
  uintptr_t distance = 4096;
  for (const Region& r : m.regions) {
    if (r.kind == Region::kConstant) continue;
    const uintptr_t d = p >= r.end ? p - r.end : p < r.begin ? r.begin - p : 0;
    if (d < distance) best = &r, distance = d;
  }
  std::string text = std::string("out of bounds: ") + verb + " " + std::to_string(bytes) + " bytes";
  if (best) {
    text += ", " + std::to_string(distance) + " bytes " + (p >= best->end ? "past the end of " : "before ") +
            best->name + " [" + std::to_string(best->bytes) + " bytes of " +
            (best->kind == Region::kShared ? "shared" : "global") + "]";
  } else {
    text += ", in no registered buffer";
  }
  m.stop(text);
}

// Memory outside all regions: fine if nothing global is registered, or if it is a constant of this program.
[[gnu::noinline]] bool excused(Machine& m, bool read, uintptr_t p) {
  bool global = false;
  for (const Region& r : m.regions) global |= r.kind == Region::kGlobal;
  if (!global) return true;
  Region constants;
  if (!read || !constant_region(p, constants)) return false;
  m.regions.push_back(constants);
  m.sort_regions();
  return true;
}

template <Kind kind>
__attribute__((always_inline)) inline void check(Machine& m, uintptr_t p, unsigned bytes, unsigned alignment,
                                                 uintptr_t site) {
  if (p - m.stacks < kStacks) return;  // a thread's own variables
  const auto parameters = reinterpret_cast<uintptr_t>(m.grid->parameters);
  if (reads(kind) && p - parameters < m.grid->parameter_bytes) return;
  const Region* r = find(m, p);
  if (!r) {
    if (!excused(m, reads(kind), p)) outside(m, p, bytes, verb(kind));
    return;
  }
  if (r->kind == Region::kConstant) {
    if (!reads(kind)) outside(m, p, bytes, verb(kind));
    return;
  }
  if (p & (alignment - 1)) {
    m.stop(std::string("misaligned: ") + verb(kind) + " " + std::to_string(bytes) + " bytes at " + r->name + " + " +
           std::to_string(p - r->data) + ", which is no multiple of " + std::to_string(alignment));
  }
  if (m.traffic && kind != Kind::kCopyLand) [[unlikely]] {
    m.traffic->note(m, r->kind == Region::kShared, p, bytes, site);
  }
  uintptr_t end = p + bytes;
  if (end > r->end) [[unlikely]] {  // into a neighbour that is known, or out of bounds
    const Region* neighbour = find(m, r->end);
    if (!neighbour || neighbour->kind != r->kind || r->kind != Region::kGlobal) {
      outside(m, r->end, unsigned(end - r->end), verb(kind));
    }
    check_access(kind, r->end, unsigned(end - r->end), 1, site);
    end = r->end;
  }
  const int warp = m.now->warp;
  const uint64_t mine = make_access(m.serial, m.now->number, m.clock[warp][warp], marks(kind));
  Access a{m, *r, mine, uint32_t(site - image_base), {mine, mine, mine}};
  for (uintptr_t word = p & ~uintptr_t{3}; word < end; word += 4) {
    touch_word<kind>(a, word, std::max(word, p), std::min(word + 4, end));
  }
}

template <Kind kind>
__attribute__((always_inline)) inline void hook(void* p, unsigned bytes, unsigned alignment, uintptr_t site) {
  Machine* const m = running();
  if (m && checks) check<kind>(*m, reinterpret_cast<uintptr_t>(p), bytes, alignment, site);
}

// Threads may wait for one another by volatile accesses.
void volatile_access(Kind kind, void* address, unsigned bytes, uintptr_t site) {
  Machine* const m = running();
  const auto p = reinterpret_cast<uintptr_t>(address);
  if (!m || p - m->stacks < kStacks) return;
  if (reads(kind)) m->give_way(false);
  const AtomicOrder order(p);
  check_access(kind, p, bytes, bytes, site);
}

void unaligned_access(Kind kind, void* p, unsigned bytes, uintptr_t site) {
  if (running()) check_access(kind, reinterpret_cast<uintptr_t>(p), bytes, 1, site);
}

}  // namespace

void check_access(Kind kind, uintptr_t p, unsigned bytes, unsigned alignment, uintptr_t site) {
  Machine& m = *running();
  if (!checks) return;
  switch (kind) {
    case Kind::kRead: return check<Kind::kRead>(m, p, bytes, alignment, site);
    case Kind::kWrite: return check<Kind::kWrite>(m, p, bytes, alignment, site);
    case Kind::kAtomicRead: return check<Kind::kAtomicRead>(m, p, bytes, alignment, site);
    case Kind::kAtomicWrite: return check<Kind::kAtomicWrite>(m, p, bytes, alignment, site);
    case Kind::kAtomicUpdate: return check<Kind::kAtomicUpdate>(m, p, bytes, alignment, site);
    case Kind::kCopyIssue: return check<Kind::kCopyIssue>(m, p, bytes, alignment, site);
    case Kind::kCopyLand: return check<Kind::kCopyLand>(m, p, bytes, alignment, site);
  }
}

void read(const void* from, unsigned bytes) {
  check_access(Kind::kRead, reinterpret_cast<uintptr_t>(from), bytes, bytes, HOST_SITE);
}
void write(void* to, unsigned bytes) {
  check_access(Kind::kWrite, reinterpret_cast<uintptr_t>(to), bytes, bytes, HOST_SITE);
}
void update(void* to, unsigned bytes) {
  check_access(Kind::kAtomicUpdate, reinterpret_cast<uintptr_t>(to), bytes, bytes, HOST_SITE);
}

}  // namespace host

// What -fsanitize=thread calls before each access.
#define HOST_HOOK(name, call) \
  extern "C" HOST_HIDDEN void __tsan_##name(void* p) { host::call; }
#define HOST_HOOKS(bytes)                                                                             \
  HOST_HOOK(read##bytes, hook<host::Kind::kRead>(p, bytes, bytes, HOST_SITE))                         \
  HOST_HOOK(write##bytes, hook<host::Kind::kWrite>(p, bytes, bytes, HOST_SITE))                       \
  HOST_HOOK(unaligned_read##bytes, unaligned_access(host::Kind::kRead, p, bytes, HOST_SITE))          \
  HOST_HOOK(unaligned_write##bytes, unaligned_access(host::Kind::kWrite, p, bytes, HOST_SITE))        \
  HOST_HOOK(volatile_read##bytes, volatile_access(host::Kind::kAtomicRead, p, bytes, HOST_SITE))      \
  HOST_HOOK(volatile_write##bytes, volatile_access(host::Kind::kAtomicWrite, p, bytes, HOST_SITE))    \
  HOST_HOOK(unaligned_volatile_read##bytes, unaligned_access(host::Kind::kRead, p, bytes, HOST_SITE)) \
  HOST_HOOK(unaligned_volatile_write##bytes, unaligned_access(host::Kind::kWrite, p, bytes, HOST_SITE))
HOST_HOOKS(1)
HOST_HOOKS(2)
HOST_HOOKS(4)
HOST_HOOKS(8)
HOST_HOOKS(16)

extern "C" {
HOST_HIDDEN void __tsan_read_range(void* p, size_t bytes) {
  host::unaligned_access(host::Kind::kRead, p, unsigned(bytes), HOST_SITE);
}
HOST_HIDDEN void __tsan_write_range(void* p, size_t bytes) {
  host::unaligned_access(host::Kind::kWrite, p, unsigned(bytes), HOST_SITE);
}
// The guard of a function's static in host code beside the kernels: a byte on x86, a word on Arm.
HOST_HIDDEN uint8_t __tsan_atomic8_load(const uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
HOST_HIDDEN uint64_t __tsan_atomic64_load(const uint64_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
HOST_HIDDEN void __tsan_init() {}
HOST_HIDDEN void __tsan_func_entry(void*) {}
HOST_HIDDEN void __tsan_func_exit() {}
HOST_HIDDEN void __tsan_vptr_update(void*, void*) {}
HOST_HIDDEN void __tsan_vptr_read(void*) {}
}
