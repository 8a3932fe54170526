// Copies from global to shared memory that land later: cp.async, and bulk copies that complete on an mbarrier.
#include "machine.h"

namespace host {

// The source is read when the copy is issued, the target written when it is waited for.
void cp_async(void* to, const void* from, unsigned bytes, unsigned source_bytes) {
  const auto target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  Fiber& f = *running()->now;
  if (source_bytes > bytes) fail("cp.async with %u source bytes for a copy of %u", source_bytes, bytes);
  if (checks) {
    if (source % bytes) fault("misaligned: cp.async of %u bytes from %p", bytes, from);
    if (source_bytes) check_access(Kind::kRead, source, source_bytes, 1, HOST_SITE);
    check_access(Kind::kCopyIssue, target, bytes, bytes, HOST_SITE);
  }
  Copy& c = f.copies.emplace_back(Copy{static_cast<unsigned char*>(to), bytes, f.group, HOST_SITE, {}});
  std::memcpy(c.data, from, source_bytes);
}

void cp_async_commit() {
  if (mutating && left_out("cp_async_commit", HOST_SITE)) return;
  ++running()->now->group;
}

void cp_async_wait(int pending_groups) {
  if (mutating && left_out("cp_async_wait", HOST_SITE)) return;
  Fiber& f = *running()->now;
  size_t landed = 0;
  for (; landed < f.copies.size() && f.copies[landed].group < f.group - pending_groups; ++landed) {
    const Copy& c = f.copies[landed];
    check_access(Kind::kCopyLand, reinterpret_cast<uintptr_t>(c.to), c.bytes, c.bytes, c.site);
    std::memcpy(c.to, c.data, c.bytes);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + landed);
}

void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  Machine& m = *running();
  m.find_mbarrier(barrier);
  if (bytes % 16) fail("a bulk copy of %u bytes, which is no multiple of 16", bytes);
  check_access(Kind::kRead, reinterpret_cast<uintptr_t>(from), bytes, 16, HOST_SITE);
  check_access(Kind::kCopyIssue, reinterpret_cast<uintptr_t>(to), bytes, 16, HOST_SITE);
  m.bulk.push_back({static_cast<unsigned char*>(to), from, bytes, barrier, m.now, HOST_SITE});
}

bool Machine::land_bulk_copy() {
  if (bulk.empty()) return false;
  const BulkCopy c = bulk.front();
  bulk.erase(bulk.begin());
  Fiber* const self = now;
  now = c.issuer;  // the copy counts as the issuer's write
  check_access(Kind::kCopyLand, reinterpret_cast<uintptr_t>(c.to), c.bytes, 16, c.site);
  std::memcpy(c.to, c.from, c.bytes);
  now = self;
  Mbarrier& b = find_mbarrier(c.barrier);
  const int w = c.issuer->warp;
  b.clock[w] = std::max(b.clock[w], clock[w][w]);
  tick(w);
  b.bytes_due -= c.bytes;
  settle(b);
  return true;
}

}  // namespace host
