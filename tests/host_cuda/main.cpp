// Runs the proof kernels against float64, the seeded bugs against their reports, and the clock.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#include "proof.h"

namespace {
std::mt19937 random_bits(1);
float normal() { return std::normal_distribution<float>()(random_bits); }
template <typename T> T low(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) return narrow<bfloat16>(x); else return narrow<float16>(x);
}
template <typename T> std::vector<T> tensor(size_t n, float scale) {
  std::vector<T> x(n);
  for (T& e : x) e = low<T>(normal() * scale);
  return x;
}
double seconds(auto&& work, int times = 1) {  // the best of so many
  double best = INFINITY;
  for (int i = 0; i < times; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    best = std::fmin(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}
int failures = 0;
void expect(bool good, const char* what, double error) {
  std::printf("%s  %-40s error %.2e\n", good ? "ok  " : "FAIL", what, error);
  failures += !good;
}

template <typename T> void test_gemm(int M, int N, int K, bool timed = false) {
  const auto a = tensor<T>(size_t(M) * K, 1), b = tensor<T>(size_t(N) * K, 1);
  std::vector<float> c(size_t(M) * N, NAN);
  const host::Buffer ra(a.data(), a.size() * 2, "a"), rb(b.data(), b.size() * 2, "b"), rc(c.data(), c.size() * 4, "c");
  const double s = seconds([&] { gemm(Gemm<T>{c.data(), a.data(), b.data(), M, N, K}); }, timed ? 7 : 1);
  double worst = 0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += double(widen(a[size_t(m) * K + k])) * widen(b[size_t(n) * K + k]);
      worst = std::fmax(worst, std::abs(sum - c[size_t(m) * N + n]));
    }
  }
  char name[99];
  std::snprintf(name, sizeof name, "gemm %s %d x %d x %d", std::is_same_v<T, bfloat16> ? "bf16" : "f16", M, N, K);
  expect(worst < 1e-6 * K * 4, name, worst);
  if (timed) std::printf("      %.3f s, %.0f million multiply-adds a second\n", s, 1e-6 * M * N * K / s);
}

void test_attention(int H, int T, bool timed = false) {
  const size_t n = size_t(H) * T * 64;
  const auto q = tensor<bfloat16>(n, 1), k = tensor<bfloat16>(n, 1), v = tensor<bfloat16>(n, 1);
  std::vector<bfloat16> o(n, bfloat16{0x7fff});
  const host::Buffer ro(o.data(), n * 2, "o"), rq(q.data(), n * 2, "q"), rk(k.data(), n * 2, "k"), rv(v.data(), n * 2, "v");
  const double s = seconds([&] { attention({o.data(), q.data(), k.data(), v.data(), 0.125f, H, T}); }, timed ? 7 : 1);
  double worst = 0;
  for (int h = 0; h < H; ++h) {
    for (int t = 0; t < T; ++t) {
      const size_t row = (size_t(h) * T + t) * 64;
      std::vector<double> p(t + 1);
      double sum = 0, out[64] = {};
      for (int j = 0; j <= t; ++j) {
        double dot = 0;
        for (int d = 0; d < 64; ++d) dot += double(widen(q[row + d])) * widen(k[(size_t(h) * T + j) * 64 + d]);
        sum += p[j] = std::exp(dot * 0.125);
      }
      for (int j = 0; j <= t; ++j) {
        for (int d = 0; d < 64; ++d) out[d] += p[j] / sum * widen(v[(size_t(h) * T + j) * 64 + d]);
      }
      for (int d = 0; d < 64; ++d) worst = std::fmax(worst, std::abs(out[d] - widen(o[row + d])));
    }
  }
  char name[99];
  std::snprintf(name, sizeof name, "attention H%d T%d d64 causal", H, T);
  expect(worst < 2e-2, name, worst);
  const double tiles = H * ((T + 63) / 64) * ((T + 63) / 64 + 1) / 2.0;
  if (timed) std::printf("      %.3f s, %.0f million multiply-adds a second\n", s, 1e-6 * tiles * 2 * 64 * 64 * 64 / s);
}

void test_sums(int rows, int columns) {
  std::vector<float> x(rows * columns), y(rows, NAN), total(1, 0.0f);
  for (float& e : x) e = normal();
  const host::Buffer rx(x.data(), x.size() * 4, "x"), ry(y.data(), y.size() * 4, "y"), rt(total.data(), 4, "total");
  row_sum(y.data(), x.data(), rows, columns);
  sum(total.data(), x.data(), rows * columns);
  double worst = 0, all = 0;
  for (int r = 0; r < rows; ++r) {
    double s = 0;
    for (int c = 0; c < columns; ++c) s += x[r * columns + c];
    all += s;
    worst = std::fmax(worst, std::abs(s - y[r]));
  }
  expect(worst < 1e-4, "row_sum", worst);
  expect(std::abs(all - total[0]) < 1e-3, "sum with atomicAdd", std::abs(all - total[0]));
}

void test_pipeline(int tiles) {
  std::vector<float> x(tiles * 128), y(128, NAN);
  for (float& e : x) e = normal();
  const host::Buffer rx(x.data(), x.size() * 4, "x"), ry(y.data(), y.size() * 4, "y");
  column_sum(y.data(), x.data(), tiles);
  double worst = 0;
  for (int i = 0; i < 128; ++i) {
    double s = 0;
    for (int t = 0; t < tiles; ++t) s += x[t * 128 + i];
    worst = std::fmax(worst, std::abs(s - y[i]));
  }
  expect(worst < 1e-4, "mbarrier and bulk copy pipeline", worst);
}

void test_instructions() {
  std::vector<int> y(32 * 32, -1);
  const host::Buffer ry(y.data(), y.size() * 4, "y");
  instructions(y.data());
  int wrong = 0;
  for (int l = 0; l < 32; ++l) {
    std::vector<int> expected;
    const auto tile = [&](int i, bool transpose) {
      const int g = l / 4, t = l % 4 * 2;
      const auto at = [&](int r, int c) { return 64 * i + (transpose ? 8 * c + r : 8 * r + c); };
      expected.push_back(at(g, t) | at(g, t + 1) << 16);
    };
    for (int n : {1, 2, 4}) {
      for (bool transpose : {false, true}) {
        for (int i = 0; i < n; ++i) tile(i, transpose);
      }
    }
    const int w = l / 8 * 8, in = l % 8;
    for (int e : {l ^ 5, l < 3 ? l : l - 3, l > 28 ? l : l + 3, 7, w + (in ^ 5), in < 3 ? l : l - 3, in > 4 ? l : l + 3, w + 3,
                  0x49249249, 1, 0, l < 16 ? 0xaaaa : int(0xaaaa0000)}) {
      expected.push_back(e);
    }
    for (size_t i = 0; i < expected.size(); ++i) wrong += y[l * 32 + i] != expected[i];
  }
  expect(wrong == 0, "ldmatrix, shuffles, votes", wrong);
}

void test_bugs() {
  struct Case { Bug bug; const char* name; const char* says; };
  for (const Case c : {Case{kNone, "no bug", ""}, Case{kMissingBarrier, "missing __syncthreads", "race"},
                       Case{kDivergentBarrier, "divergent barrier", "deadlock"},
                       Case{kReadPastEnd, "global read past the end", "out of bounds"},
                       Case{kSharedWritePastEnd, "shared write past the end", "out of bounds"},
                       Case{kMissingWait, "missing cp.async wait", "too early"},
                       Case{kUnwritten, "unwritten shared memory", "unwritten"},
                       Case{kMisaligned, "misaligned float4", "misaligned"},
                       Case{kBlocksCollide, "blocks write the same place", "race"},
                       Case{kMissingWarpSync, "missing __syncwarp", "race"},
                       Case{kDivergentWarp, "lanes at different operations", "divergent warp"},
                       Case{kNamedBarrierCount, "named barrier waits for too many", "deadlock"},
                       Case{kOverflow, "32-bit index overflow", "overflow"}}) {
    std::vector<float> x(160, 1.0f), y(160, NAN);
    const host::Buffer rx(x.data(), x.size() * 4, "x"), ry(y.data(), y.size() * 4, "y");
    std::string report;
    try {
      buggy(y.data(), x.data(), int(x.size()), c.bug);
    } catch (const std::runtime_error& e) {
      report = e.what();
    }
    const bool good = c.says[0] ? report.rfind(c.says, 0) == 0 : report.empty();
    std::printf("\n%s  %s\n%s\n", good ? "ok  " : "FAIL", c.name, report.c_str());
    failures += !good;
  }
}
}  // namespace

int main(int argc, char** argv) {
  const bool clock_only = argc > 1 && std::string(argv[1]) == "clock";
  for (int threads : {32, 128, 1024}) {
    const int rounds = 20000000 / threads;
    switches(10, threads);
    const double s = seconds([&] { switches(rounds, threads); });
    std::printf("switch  %4d threads  %.2f ns\n", threads, s / rounds / threads * 1e9);
  }
  test_gemm<bfloat16>(256, 256, 256, true);
  test_attention(4, 256, true);
  if (clock_only) return failures;
  test_gemm<float16>(64, 64, 64);
  test_gemm<bfloat16>(77, 130, 72);
  test_attention(2, 64);
  test_attention(1, 100);
  test_sums(7, 1000);
  test_pipeline(10);
  test_instructions();
  test_bugs();
  std::printf("\n%d failures\n", failures);
  return failures;
}
