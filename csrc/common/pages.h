// Memory in large pages: a read of all of it then waits for far fewer address translations.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace llamakern {

// Asks for such pages where memory is written for the first time: one fault for 2 MB in place of 512. Less than 32 MB
// the C library mostly takes from what was written before.
inline void expect_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLarge = uintptr_t(1) << 21;
  if (bytes < size_t(32) << 20) return;
  const uintptr_t begin = (uintptr_t(data) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (uintptr_t(data) + bytes) / kLarge * kLarge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Asks the system to move the whole 2 MB pieces of [data, data + bytes) into one page each. What they hold stays; a
// system that cannot do it does nothing.
inline void use_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLarge = uintptr_t(1) << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1, at once instead of some time
  const uintptr_t begin = (uintptr_t(data) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (uintptr_t(data) + bytes) / kLarge * kLarge;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

}  // namespace llamakern
