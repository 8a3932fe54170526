// What happened before what: the clocks of warps, and how fences and atomics carry them to other threads and blocks.
//
// A warp's time goes on at each synchronisation. clock[w][v] is the time of warp v up to which warp w knows all that
// was done. Barriers join these clocks. Between blocks there is one way: a thread fences and then updates an atomic (a
// release), another thread updates or reads that atomic later and fences (an acquire), and now knows what the first one
// knew at its fence.
#include "machine.h"

namespace host {

struct Release {
  uint64_t serial;
  int thread;
  Fence fence;
  std::vector<Seen> learned;  // from others, before
};

struct Variable {                 // guarded by the launch's mutex
  std::vector<Release> releases;  // grows only; of atomics on it, in their order
  std::unordered_multimap<uint64_t, size_t> of_block;
};

void Machine::tick(int w) {
  if (++clock[w][w] == kLastTime) fail("a warp of this block synchronises more than four million times");
}

// The running thread's warp adds what it knows to `to`.
void Machine::arrive(Clocks to) {
  const int w = now->warp;
  for (int v = 0; v < warps; ++v) to[v] = std::max(to[v], clock[w][v]);
}

// Warp w now knows all that `known` does, and its own time goes on.
void Machine::learn(int w, const uint32_t* known) {
  for (int v = 0; v < warps; ++v) clock[w][v] = std::max(clock[w][v], known[v]);
  tick(w);
  warp[w].synced = std::max(warp[w].synced, known[w] + 1);  // of its own lanes too
}

void fence(FenceScope scope) {
  if (mutating && left_out("__threadfence", HOST_SITE)) return;
  Machine& m = *running();
  Fiber& f = *m.now;
  m.launch->fences = true;
  for (Seen& s : f.seen) {
    s.time = m.clock[f.warp][f.warp];
    const bool known = std::any_of(m.learned.begin(), m.learned.end(), [&](const Seen& other) {
      return other.variable == s.variable && other.count == s.count && other.thread == s.thread;
    });
    if (!known) m.learned.push_back(std::move(s));
  }
  f.seen.clear();
  static std::atomic<uint64_t> next{1};
  f.fence.set = true;
  f.fence.device = scope == kDevice;
  f.fence.number = next++;
  f.fence.synced = m.warp[f.warp].synced;
  f.fence.learned = m.learned.size();
  std::copy(m.clock[f.warp], m.clock[f.warp] + kMaxWarps, f.fence.clock);
  m.tick(f.warp);  // what follows is not covered
}

namespace {

bool is_shared(const Machine& m, uintptr_t p) {
  for (const Region& r : m.regions) {
    if (r.kind == Region::kShared && p >= r.begin && p < r.end) return true;
  }
  return false;
}

// Did the warp of the running thread see thread `thread` of its own block pass time `time` of that thread's warp?
bool passed(const Machine& m, int thread, uint32_t time) {
  const int w = m.now->warp, v = thread / 32;
  return thread == m.now->number || (v == w ? time < m.warp[w].synced : time <= m.clock[w][v]);
}

bool covers(const Fence& fence, int releaser, bool same_block, uint64_t access) {
  const int thread = thread_of(access), v = thread / 32;
  if (!same_block && !fence.device) return false;
  if (thread == releaser) return clock_of(access) <= fence.clock[v];
  return v == releaser / 32 ? clock_of(access) < fence.synced : clock_of(access) <= fence.clock[v];
}

using Visited = std::map<const Variable*, size_t>;

bool among(const Machine& m, const Seen& seen, uint64_t access, Visited& visited) {
  const Variable& v = *seen.variable;
  size_t& done = visited[&v];
  if (done >= seen.count) return false;
  done = seen.count;
  const auto [begin, end] = v.of_block.equal_range(serial_of(access));
  for (auto i = begin; i != end; ++i) {
    const Release& r = v.releases[i->second];
    if (i->second < seen.count && covers(r.fence, r.thread, r.serial == m.serial, access)) return true;
  }
  for (size_t i = 0; i < seen.count; ++i) {
    for (const Seen& earlier : v.releases[i].learned) {
      if (among(m, earlier, access, visited)) return true;
    }
  }
  return false;
}

}  // namespace

bool knows(const Machine& m, uint64_t access) {
  if (m.learned.empty()) return false;
  std::unique_lock<std::recursive_mutex> lock;
  if (m.launch->os_threads > 1) lock = std::unique_lock(m.launch->mutex);
  Visited visited;
  for (const Seen& s : m.learned) {
    if (passed(m, s.thread, s.time) && among(m, s, access, visited)) return true;
  }
  return false;
}

// With each atomic, and as one step with it: what the thread lets others know, and what it may learn at its next fence.
AtomicOrder::AtomicOrder(uintptr_t p) {
  Machine& m = *running();
  if (m.launch->os_threads > 1) m.ordering = std::unique_lock(m.launch->mutex);
  if (!m.launch->fences) return;
  Fiber& f = *m.now;
  std::shared_ptr<Variable>& variable = (is_shared(m, p) ? m.variables : m.launch->variables)[p];
  if (!variable) variable = std::make_shared<Variable>();
  std::vector<Release>& releases = variable->releases;
  if (f.fence.set && (releases.empty() || releases.back().fence.number != f.fence.number)) {
    variable->of_block.emplace(m.serial, releases.size());
    Release& r = releases.emplace_back(Release{m.serial, f.number, f.fence, {}});
    for (size_t i = 0; i < f.fence.learned; ++i) {
      if (passed(m, m.learned[i].thread, m.learned[i].time)) r.learned.push_back(m.learned[i]);
    }
  }
  if (releases.empty()) return;
  for (Seen& s : f.seen) {
    if (s.variable != variable) continue;
    s.count = releases.size();
    return;
  }
  f.seen.push_back({variable, releases.size(), f.number, 0});
}

AtomicOrder::~AtomicOrder() { running()->ordering = {}; }

}  // namespace host
