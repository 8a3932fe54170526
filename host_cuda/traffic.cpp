#include "traffic.h"

#include <cstdio>
#include <cstdlib>
#include <set>

namespace host {
namespace {

struct Tally {                    // of one kind of memory, at one place
  uint64_t accesses = 0;          // of whole warps
  uint64_t moved = 0;             // wavefronts or sectors
  uint64_t needed = 0;            // the least there could be
  unsigned worst = 0, least = 1;  // of one access: moved, and needed there
  void add(unsigned m, unsigned n) {
    ++accesses;
    moved += m;
    needed += n;
    if (uint64_t(m) * least > uint64_t(worst) * n) worst = m, least = n;
  }
  void add(const Tally& t) {
    accesses += t.accesses, moved += t.moved, needed += t.needed;
    if (uint64_t(t.worst) * least > uint64_t(worst) * t.least) worst = t.worst, least = t.least;
  }
};

struct Chain {  // accesses to neighbouring bytes by instructions one after another
  bool shared;
  std::vector<uintptr_t> sites;
  bool operator<(const Chain& o) const { return std::tie(shared, sites) < std::tie(o.shared, o.sites); }
};
struct Tallies {
  Tally joined;  // as one instruction, if they stand in one line
  std::vector<Tally> apart;
};

auto& all = *new std::map<Chain, Tallies>;
std::mutex all_mutex;

// Shared memory has 32 banks of 4 bytes. Accesses of 8 bytes go by half warps, of 16 by quarters. In each of these
// phases, the bank of which most different words are wanted sets the time.
void count_banks(const std::array<Range, 32>& lane, Tally& tally) {
  unsigned width = 0, moved = 0, needed = 0;
  for (const Range& r : lane) width = std::max(width, r.bytes);
  const int lanes = width > 8 ? 8 : width > 4 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes) {
    std::set<uintptr_t> words;
    for (int l = first; l < first + lanes; ++l) {
      for (uintptr_t w = lane[l].p / 4; lane[l].bytes && w <= (lane[l].p + lane[l].bytes - 1) / 4; ++w) words.insert(w);
    }
    unsigned in_bank[32] = {}, most = 0;
    for (const uintptr_t w : words) most = std::max(most, ++in_bank[w % 32]);
    moved += most;
    needed += !words.empty();
  }
  tally.add(moved, needed);
}

// Global memory moves in sectors of 32 bytes.
void count_sectors(const std::array<Range, 32>& lane, Tally& tally) {
  std::set<uintptr_t> sectors, bytes;
  for (const Range& r : lane) {
    for (unsigned i = 0; i < r.bytes; ++i) {
      sectors.insert((r.p + i) / 32);
      bytes.insert(r.p + i);
    }
  }
  tally.add(unsigned(sectors.size()), unsigned(bytes.size() + 31) / 32);
}

void count(bool shared, const std::array<Range, 32>& lane, Tally& tally) {
  shared ? count_banks(lane, tally) : count_sectors(lane, tally);
}

bool wants(const char* word) {
  const char* list = std::getenv("HOST_CUDA_REPORT");
  return list && std::strstr(list, word);
}

struct Line {
  bool shared;
  std::string place;
  bool operator<(const Line& o) const { return std::tie(shared, place) < std::tie(o.shared, o.place); }
};

// The tallies by source line. A chain within one line is one instruction.
std::map<Line, Tally> by_line() {
  std::vector<uintptr_t> sites;
  for (const auto& [chain, tallies] : all) sites.insert(sites.end(), chain.sites.begin(), chain.sites.end());
  const std::vector<std::string> texts = where(sites);
  std::map<Line, Tally> lines;
  size_t i = 0;
  for (const auto& [chain, tallies] : all) {
    const auto first = texts.begin() + i, end = first + chain.sites.size();
    i += chain.sites.size();
    if (std::all_of(first, end, [&](const std::string& t) { return t == *first; })) {
      lines[{chain.shared, *first}].add(tallies.joined);
    } else {
      for (size_t j = 0; j < chain.sites.size(); ++j) lines[{chain.shared, first[j]}].add(tallies.apart[j]);
    }
  }
  return lines;
}

void print() { std::fputs(traffic_report().c_str(), stderr); }

}  // namespace

std::string traffic_report() {
  const std::lock_guard lock(all_mutex);
  std::string text;
  char row[160];
  for (const bool shared : {true, false}) {
    if (!wants(shared ? "banks" : "coalescing")) continue;
    text += shared ? "bank conflicts: warp accesses, wavefronts (least), worst access, line\n"
                   : "uncoalesced global access: warp accesses, sectors (least), worst access, line\n";
    for (const auto& [line, t] : by_line()) {
      if (line.shared != shared || t.moved == t.needed) continue;
      std::snprintf(row, sizeof row, "  %10zu  %12zu (%zu)  %u for %u  ", size_t(t.accesses), size_t(t.moved),
                    size_t(t.needed), t.worst, t.least);
      text += row + line.place + "\n";
    }
  }
  return text;
}

bool traffic_wanted() {
  static const bool wanted = [] {
    const bool any = wants("banks") || wants("coalescing");
    if (any) std::atexit(print);
    return any;
  }();
  return wanted;
}

void Traffic::note(Machine& m, bool shared, uintptr_t p, unsigned bytes, uintptr_t site) {
  Warp& w = warps[m.now->warp];
  const int l = m.now->lane;
  Site& s = w.sites[site];
  const uint32_t time = s.times[l]++;
  if (s.groups.size() <= time) s.groups.push_back(&w.groups.emplace_back(Group{shared, site}));
  Group* const g = s.groups[time];
  Group* const before = w.last[l];
  g->lane[l] = {p, bytes};
  const bool adjacent = before && before->site != site && before->shared == shared;
  if (adjacent && before->lane[l].p + before->lane[l].bytes == p) g->before[l] = before;
  w.last[l] = g;
}

// The compiler takes the load of a float4 apart: all lanes then go on, at another instruction, where they have just
// been.
void Traffic::link(Group& group) {
  Group* before = nullptr;
  for (int l = 0; l < 32; ++l) {
    if (group.lane[l].bytes && !before) before = group.before[l];
  }
  if (!before || before->next) return;
  for (int l = 0; l < 32; ++l) {
    if (bool(group.lane[l].bytes) != bool(before->lane[l].bytes)) return;
    if (group.lane[l].bytes && group.before[l] != before) return;
  }
  before->next = &group;
  group.follows = true;
}

// Counts the access with those that follow it, as far as they make one vector; returns the first one not counted.
const Traffic::Group* Traffic::count(const Group* group) {
  std::vector<const Group*> chain;
  std::array<Range, 32> lanes = {};
  size_t length = 1;
  for (const Group* g = group; g && chain.size() < 16; g = g->next) {
    chain.push_back(g);
    unsigned widest = 0;
    uintptr_t all = 0;
    for (int l = 0; l < 32; ++l) {
      lanes[l] = {group->lane[l].p, lanes[l].bytes + g->lane[l].bytes};
      widest = std::max(widest, lanes[l].bytes);
      if (lanes[l].bytes) all |= lanes[l].p;
    }
    if ((widest == 4 || widest == 8 || widest == 16) && all % widest == 0) length = chain.size();
  }
  std::vector<uintptr_t> sites;
  for (size_t i = 0; i < length; ++i) sites.push_back(chain[i]->site);
  lanes = {};
  for (size_t i = 0; i < length; ++i) {
    for (int l = 0; l < 32; ++l) lanes[l] = {group->lane[l].p, lanes[l].bytes + chain[i]->lane[l].bytes};
  }
  Tallies& t = all[{group->shared, sites}];
  t.apart.resize(length);
  host::count(group->shared, lanes, t.joined);
  for (size_t i = 0; i < length; ++i) host::count(group->shared, chain[i]->lane, t.apart[i]);
  return chain[length - 1]->next;
}

void Traffic::flush(int warp) {
  Warp& w = warps[warp];
  const std::lock_guard lock(all_mutex);
  for (Group& g : w.groups) link(g);
  for (const Group& g : w.groups) {
    for (const Group* rest = g.follows ? nullptr : &g; rest;) rest = count(rest);
  }
  w.groups.clear();
  w.sites.clear();
  w.last = {};
}

void Traffic::flush_all() {
  for (int w = 0; w < kMaxWarps; ++w) flush(w);
}

}  // namespace host
