// What each lane must find in instructions.cu. Run the same table on a GPU once: it says what the manual was taken to
// mean.
#include <cstdio>
#include <vector>

#include "checks.h"
#include "proof.h"

namespace {

void matrices(std::vector<int>& row, int l) {
  for (int n : {1, 2, 4}) {
    for (bool transpose : {false, true}) {
      for (int i = 0; i < n; ++i) {
        const int g = l / 4, t = l % 4 * 2;
        const auto at = [&](int r, int c) { return 64 * i + (transpose ? 8 * c + r : 8 * r + c); };
        row.push_back(at(g, t) | at(g, t + 1) << 16);
      }
    }
  }
}

void warp_operations(std::vector<int>& row, int l) {
  const int w = l / 8 * 8, in = l % 8;
  for (int e : {l ^ 5, l < 3 ? l : l - 3, l > 28 ? l : l + 3, 7, w + (in ^ 5), in < 3 ? l : l - 3, in > 4 ? l : l + 3,
                w + 3, 0x49249249, 1, 0, l < 16 ? 0xaaaa : int(0xaaaa0000)}) {
    row.push_back(e);
  }
  const unsigned alike = 31u << l / 5 * 5;
  for (int e : {int(alike), 496, -9, l < 16 ? 15 : 31, 0x380, 11, 0, 1}) row.push_back(e);
}

void bits(std::vector<int>& row, int l) {
  int count = 0, reversed = 0;
  for (int i = 0; i < 32; ++i) count += 0xf0f01u * unsigned(l) >> i & 1;
  for (int i = 0; i < 5; ++i) reversed |= int(unsigned(l >> i & 1) << (31 - i));
  int first = 0, leading = 32;
  for (int i = 4; i >= 0; --i) {
    if (l >> i & 1) first = i + 4, leading = std::min(leading, 31 - i);
  }
  row.insert(row.end(), {count, first, leading, reversed});
  // bytes 0, 10 (sign of byte 2), 7, 13 (sign of byte 5)
  row.push_back(int(uint32_t(l & 255) | (((0x03020100u + l) >> 16 & 128) ? 0xff00u : 0u) | 0x870000u | 0xff000000u));
  const uint64_t both = uint64_t(0x9abcdef0u) << 32 | 0x12345678u;
  row.push_back(int(uint32_t((both << l) >> 32)));
  row.push_back(int(uint32_t((uint64_t(0xdeadbeefu) << l) >> 32)));
  const int twice = l - 13;  // of x
  const int down = (twice - (twice & 1)) / 2, up = down + (twice & 1);
  const int even = twice & 1 ? (down & 1 ? up : down) : down;
  const double big = twice * 0.5 * 1e9;
  row.insert(row.end(), {even, twice / 2, down});
  row.push_back(big >= 2147483647.0    ? 2147483647
                : big <= -2147483648.0 ? -2147483647 - 1
                                       : int(float(twice * 0.5f) * 1e9f));
  row.push_back(std::max(even, 0));
}

void roundings(std::vector<int>& row, int l) {
  //             1 + 1/256  1 + 3/256  65520      1e-7       -0          3.4e38     NaN         2049
  const int bf[8] = {0x3f80, 0x3f82, 0x4780, 0x33d7, 0x8000, 0x7f80, 0x7fff, 0x4500};
  const int half[8] = {0x3c04, 0x3c0c, 0x7c00, 0x0002, 0x8000, 0x7c00, 0x7fff, 0x6800};
  const uint32_t tf32[8] = {0x3f808000, 0x3f818000, 0x47800000, 0x33d6c000,
                            0x80000000, 0x7f7fc000, 0x7fffffff, 0x45002000};
  const int i = l % 8;
  // The integers below 32 are short enough for both formats.
  int bf_lane = 0, half_lane = 0;
  if (l > 0) {
    const int e = 31 - __builtin_clz(l);
    bf_lane = (e + 127) << 7 | (l << (7 - e) & 127);
    half_lane = (e + 15) << 10 | (l << (10 - e) & 1023);
  }
  row.insert(row.end(), {bf[i], half[i], int(tf32[i])});
  row.push_back(int(uint32_t(bf[i]) | uint32_t(bf_lane) << 16));
  row.push_back(int(uint32_t(half[i]) | uint32_t(half_lane) << 16));
}

// x, a multiple of 2^-20 or so, to `mantissa` bits and back into the format's 16 bits; ties to even.
uint32_t pack_half(double x, int mantissa, int bias) {
  if (x == 0) return std::signbit(x) ? 0x8000 : 0;
  int e;
  const double m = std::frexp(std::abs(x), &e);  // in [1/2, 1)
  double whole = std::nearbyint(std::ldexp(m, mantissa + 1));
  if (whole == std::ldexp(1.0, mantissa + 1)) whole /= 2, ++e;
  return (x < 0 ? 0x8000u : 0u) | uint32_t(e - 1 + bias) << mantissa | (uint32_t(whole) & ((1u << mantissa) - 1));
}

void arithmetic(std::vector<int>& row, int l) {
  const double low = 3.0 * 1.0078125, high = -1.5 * l;
  row.push_back(int(pack_half(low + 1, 7, 127) | pack_half(high + 1, 7, 127) << 16));
  row.push_back(int(pack_half(low, 7, 127) | pack_half(l ? high : -0.0, 7, 127) << 16));
  const double tenth = 0.0999755859375, eleven = 1.099609375;  // as float16 holds 0.1 and 1.1
  row.push_back(int(pack_half(3 * eleven + 1, 10, 15) | pack_half(tenth * l + 1, 10, 15) << 16));
}

}  // namespace

int check_table(const int* y) {
  int wrong = 0;
  for (int l = 0; l < 32; ++l) {
    std::vector<int> row;
    matrices(row, l);
    warp_operations(row, l);
    bits(row, l);
    roundings(row, l);
    arithmetic(row, l);
    for (size_t i = 0; i < row.size(); ++i) {
      const int found = y[l * kInstructions + i];
      if (found == row[i]) continue;
      ++wrong;
      std::printf("lane %d, instruction %zu: 0x%08x, not 0x%08x\n", l, i, unsigned(found), unsigned(row[i]));
    }
    for (size_t i = row.size(); i < size_t(kInstructions); ++i) wrong += y[l * kInstructions + i] != -1;
  }
  std::printf("%s  instructions\n", wrong ? "FAIL" : "ok  ");
  return wrong;
}
