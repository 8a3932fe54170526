// Where threads wait for one another: warp operations, barriers, mbarriers.
#include "machine.h"
#include "traffic.h"

namespace host {

// ---- warp operations ------------------------------------------------------------------------------------------------

namespace {

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

// The meeting that the lane joins, or a new one. If a lane that it waits for waits for it elsewhere, neither gets on.
Meeting& join(Warp& w, const char* operation, unsigned mask, int lane) {
  for (int i = 0; i < w.open; ++i) {
    Meeting& m = w.meetings[i];
    if (m.mask == mask && same(m.operation, operation)) return m;
    if (m.mask >> lane & 1 && m.arrived & mask) {
      fault("divergent warp: lane %d is at %s with mask 0x%08x, lane %d at %s with mask 0x%08x", lane, operation, mask,
            __builtin_ctz(m.arrived & mask), m.operation, m.mask);
    }
  }
  return w.meetings[w.open++] = {operation, mask, 0};
}

}  // namespace

static void meet_first_or_last(const char* operation, unsigned mask, void* mine, Meaning meaning) {
  Machine& m = *running();
  Fiber& f = *m.now;
  Warp& w = m.warp[f.warp];
  const unsigned bit = 1u << f.lane;
  if (!(mask & bit)) fail("%s: mask 0x%08x does not name the calling lane %d", operation, mask, f.lane);
  mask &= w.exists;
  w.brought[f.lane] = mine;
  Meeting& meeting = join(w, operation, mask, f.lane);
  meeting.arrived |= bit;
  if (meeting.arrived != mask) return m.wait_for(operation);
  meeting = w.meetings[--w.open];
  if (meaning) {
    meaning(w.brought, mask);
  } else {  // __syncwarp orders memory; shuffles, votes and mma do not
    m.tick(f.warp);
    w.synced = m.clock[f.warp][f.warp];
  }
  w.ready |= mask;
  if (m.traffic && mask == w.exists) m.traffic->flush(f.warp);
}

// Most lanes find the meeting begun and leave it open: a short way for them, which saves no registers.
void meet(const char* operation, unsigned mask, void* mine, Meaning meaning) {
  if (!meaning && mutating && left_out(operation, HOST_SITE)) return;
  Machine& m = *running();
  Fiber& f = *m.now;
  Warp& w = m.warp[f.warp];
  Meeting& meeting = w.meetings[0];
  const unsigned arrived = meeting.arrived | 1u << f.lane;
  const bool between = w.open == 1 && meeting.operation == operation && meeting.mask == mask && mask >> f.lane & 1;
  if (!between || arrived == mask) return meet_first_or_last(operation, mask, mine, meaning);
  meeting.arrived = arrived;
  w.brought[f.lane] = mine;
  return m.wait_for(operation);
}

// ---- barriers -------------------------------------------------------------------------------------------------------

namespace {
constexpr const char* kBarrierName[kBarriers] = {
    "__syncthreads", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
    "barrier 8",     "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};

Barrier& arrive_at(int id, int threads) {
  Machine& m = *running();
  if (id < 0 || id >= kBarriers) fail("barrier %d: a block has barriers 0 to 15", id);
  Barrier& b = m.barrier[id];
  if (threads == kWholeBlock) {
    threads = m.threads;
  } else if (threads % 32 || threads < 32 || threads > kMaxThreads) {
    fail("%s: the number of threads must be a multiple of 32, got %d", kBarrierName[id], threads);
  }
  if (b.arrived && b.expected != threads) {
    fail("%s: this thread expects %d threads, others expect %d", kBarrierName[id], threads, b.expected);
  }
  b.expected = threads;
  ++b.arrived;
  m.arrive(b.clock);
  return b;
}
}  // namespace

// Everyone who waited has now seen all that everyone who arrived had done.
void Machine::release(Barrier& b) {
  for (int w = 0; w < warps; ++w) {
    if (!b.waiting[w]) continue;
    learn(w, b.clock);
    warp[w].ready |= b.waiting[w];
    if (traffic) traffic->flush(w);
  }
  b.expected = b.arrived = 0;
  ++b.round;
  std::fill(b.waiting, b.waiting + warps, 0);
  std::fill(b.clock, b.clock + warps, 0);
}

static void sync(int id, int threads) {
  Barrier& b = arrive_at(id, threads);
  Machine& m = *running();
  b.waiting[m.now->warp] |= 1u << m.now->lane;
  if (b.arrived < b.expected) return m.wait_for(kBarrierName[id]);
  m.release(b);
}

void barrier_sync(int id, int threads) {
  if (mutating && left_out(id == 0 ? "__syncthreads" : "barrier_sync", HOST_SITE)) return;
  return sync(id, threads);
}

// How many threads of the block bring a predicate that holds.
int barrier_count(bool predicate) {
  Barrier& b = running()->barrier[0];
  int& count = b.count[b.round % 2];  // nobody starts the round after the next one before all have read this one
  if (b.arrived == 0) count = 0;
  count += predicate;
  sync(0, kWholeBlock);
  return count;
}

void barrier_arrive(int id, int threads) {
  if (mutating && left_out("barrier_arrive", HOST_SITE)) return;
  Machine& m = *running();
  Barrier& b = arrive_at(id, threads);
  m.tick(m.now->warp);  // what follows is not covered
  if (b.arrived == b.expected) m.release(b);
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

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
  check_access(Kind::kWrite, reinterpret_cast<uintptr_t>(p), 8, 8, HOST_SITE);
  Mbarrier& b = running()->mbarriers[p] = Mbarrier{};
  b.count = count;
}

void mbarrier_arrive(uint64_t* p, unsigned expected_bytes) {
  if (mutating && left_out("mbarrier_arrive", HOST_SITE)) return;
  Machine& m = *running();
  check_access(Kind::kAtomicUpdate, reinterpret_cast<uintptr_t>(p), 8, 8, HOST_SITE);
  Mbarrier& b = m.find_mbarrier(p);
  m.arrive(b.clock);
  m.tick(m.now->warp);
  b.bytes_due += expected_bytes;
  ++b.arrived;
  m.settle(b);
}

void mbarrier_wait(uint64_t* p, int parity) {
  if (mutating && left_out("mbarrier_wait", HOST_SITE)) return;
  Machine& m = *running();
  check_access(Kind::kAtomicUpdate, reinterpret_cast<uintptr_t>(p), 8, 8, HOST_SITE);
  Mbarrier& b = m.find_mbarrier(p);
  if (b.phase == parity) {
    b.waiting.push_back(m.now);
    m.wait_for("mbarrier_wait");
  }
  m.learn(m.now->warp, b.clock);
}

}  // namespace host
