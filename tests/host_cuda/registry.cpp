// Which memory kernels may touch, as buffers come, overlap and go.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "proof.h"

namespace {

// One letter for each of x[0 ... 15]: 'r' where a kernel may read.
std::string readable(const float* x) {
  float y = 0;
  const host::Buffer ry(&y, 4, "y");
  std::string text;
  for (int i = 0; i < 16; ++i) {
    try {
      peek(&y, x + i);
      text += 'r';
    } catch (const std::runtime_error&) {
      text += '.';
    }
  }
  return text;
}

int wrong = 0;
void expect(const std::string& found, const char* expected, const char* what) {
  if (found == expected) return;
  ++wrong;
  std::printf("FAIL  registry: %s: %s, not %s\n", what, found.c_str(), expected);
}

}  // namespace

int check_registry() {
  const std::vector<float> memory(16);  // not static: the memory of programs may be read, as constants are
  const float* const x = memory.data();
  wrong = 0;
  host::remember(x + 2, 8 * 4, "first");
  expect(readable(x), "..rrrrrrrr......", "remembered");
  host::remember(x + 6, 8 * 4, "second");
  expect(readable(x), "......rrrrrrrr..", "the memory of the first one was freed and used again");
  {
    const host::Buffer third(x, 8 * 4, "third"), view(x + 3, 2 * 4, "view");
    expect(readable(x), "rrrrrrrr........", "a buffer in place of the second one, and a view of it");
  }
  expect(readable(x), "................", "buffers gone");
  host::remember(x, 16 * 4, "fourth");
  {
    const host::Buffer same(x, 16 * 4, "the same");
    expect(readable(x), "rrrrrrrrrrrrrrrr", "remembered and a buffer");
  }
  expect(readable(x), "rrrrrrrrrrrrrrrr", "still remembered");
  host::forget(x);
  expect(readable(x), "................", "forgotten");
  std::printf("%s  registry\n", wrong ? "FAIL" : "ok  ");
  return wrong;
}
