// A stack of memory for each thread. What does not fit is allocated by itself, and the stack grows to the most that was
// in use at once, up to kKeep, when it is empty again.
#include "scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace llamakern {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kKeep = 0;  // each piece by itself and no longer than asked for: the sanitizer sees its end
constexpr size_t kLarge = size_t(-1);
size_t padded(size_t bytes) { return bytes; }
#else
constexpr size_t kKeep = size_t(64) << 20;
constexpr size_t kLarge = kHugePage;
size_t padded(size_t bytes) { return (bytes + 127) / 64 * 64; }
#endif

// What is large lies in pages of 2 MB where the system has them: fewer faults, fewer misses of translations.
void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (bytes < kLarge) return posix_memalign(&memory, 64, bytes) == 0 ? memory : nullptr;
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  memory = std::aligned_alloc(kHugePage, bytes);
#ifdef MADV_HUGEPAGE
  if (memory) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

struct Stack {
  char* base = nullptr;
  size_t size = 0, top = 0;     // bytes of the block, bytes handed out of it
  size_t in_use = 0, most = 0;  // bytes handed out in all, and the most of them at once
  ~Stack() { std::free(base); }
};
thread_local Stack stack;

}  // namespace

void* scratch_take(size_t bytes) {
  bytes = padded(bytes);
  Stack& s = stack;
  const bool inside = s.top + bytes <= s.size;
  void* piece = inside ? s.base + s.top : allocate(bytes);
  if (!piece) throw std::bad_alloc();
  s.in_use += bytes;
  if (s.in_use > s.most) s.most = s.in_use;
  if (inside) s.top += bytes;
  return piece;
}

void scratch_give(void* piece, size_t bytes) {
  bytes = padded(bytes);
  Stack& s = stack;
  s.in_use -= bytes;
  const bool inside = piece >= s.base && piece < s.base + s.size;
  if (inside)
    s.top -= bytes;
  else
    std::free(piece);
  if (s.in_use == 0 && s.most > s.size && s.size < kKeep) {
    std::free(s.base);
    const size_t size = s.most < kKeep ? s.most : kKeep;
    s.base = static_cast<char*>(allocate(size));
    s.size = s.base ? size : 0;
  }
}

}  // namespace llamakern
