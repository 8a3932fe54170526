// The right kernels against float64.
#include "checks.h"

#include <chrono>
#include <cstdio>
#include <random>
#include <vector>

#include "proof.h"

namespace {

thread_local std::mt19937 random_bits(1);
float normal() { return std::normal_distribution<float>()(random_bits); }

template <typename T>
std::vector<T> tensor(size_t n) {
  std::vector<T> x(n);
  for (T& e : x) e = narrow<T>(normal());
  return x;
}

template <typename T>
host::Buffer registered(const std::vector<T>& x, const char* name) {
  return {x.data(), x.size() * sizeof(T), name};
}

double seconds(auto&& work, int times) {  // the best of so many
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

template <typename T>
void check_gemm(int M, int N, int K, int times = 1) {
  const auto a = tensor<T>(size_t(M) * K), b = tensor<T>(size_t(N) * K);
  std::vector<float> c(size_t(M) * N, NAN);
  const auto ra = registered(a, "a"), rb = registered(b, "b"), rc = registered(c, "c");
  const double s = seconds([&] { gemm(Gemm<T>{c.data(), a.data(), b.data(), M, N, K}); }, times);
  double worst = 0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += double(widen(a[size_t(m) * K + k])) * widen(b[size_t(n) * K + k]);
      worst = std::fmax(worst, std::abs(sum - c[size_t(m) * N + n]));
    }
  }
  char name[99];
  std::snprintf(name, sizeof name, "gemm %d bytes, %d x %d x %d", int(sizeof(T)), M, N, K);
  expect(worst < 1e-6 * K * 4, name, worst);
  if (times > 1) std::printf("      %.3f s, %.0f million multiply-adds a second\n", s, 1e-6 * M * N * K / s);
}

void check_attention(int H, int T, int times = 1) {
  const size_t n = size_t(H) * T * 64;
  const auto q = tensor<bfloat16>(n), k = tensor<bfloat16>(n), v = tensor<bfloat16>(n);
  std::vector<bfloat16> o(n, bfloat16{0x7fff});
  const auto ro = registered(o, "o"), rq = registered(q, "q"), rk = registered(k, "k"), rv = registered(v, "v");
  const double s = seconds([&] { attention({o.data(), q.data(), k.data(), v.data(), 0.125f, H, T}); }, times);
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
  if (times > 1)
    std::printf("      %.3f s, %.0f million multiply-adds a second\n", s, 1e-6 * tiles * 2 * 64 * 64 * 64 / s);
}

void check_sums(int rows, int columns) {
  const auto x = tensor<float>(size_t(rows) * columns);
  std::vector<float> y(rows, NAN), total = {0.0f, NAN, NAN}, partial(x.size() / kSumBlock + 1, NAN);
  std::vector<unsigned> counter = {0};
  std::vector<int> locked = {0, 0}, handed = {0, 0};
  const auto rx = registered(x, "x"), ry = registered(y, "y"), rt = registered(total, "total");
  const auto rp = registered(partial, "partial"), rc = registered(counter, "counter"),
             rl = registered(locked, "locked");
  const auto rh = registered(handed, "handed");
  const int n = rows * columns;
  row_sum(y.data(), x.data(), rows, columns);
  sum(&total[0], x.data(), n);
  for (int i : {1, 2}) sum_by_last(&total[i], x.data(), n, partial.data(), counter.data());
  locked_sum(locked.data(), 5, 70);
  handed_on(handed.data(), 70);
  double worst = 0, all = 0;
  for (int r = 0; r < rows; ++r) {
    double s = 0;
    for (int c = 0; c < columns; ++c) s += x[size_t(r) * columns + c];
    all += s;
    worst = std::fmax(worst, std::abs(s - y[r]));
  }
  expect(worst < 1e-4, "row_sum", worst);
  expect(std::abs(all - total[0]) < 1e-3, "sum with atomicAdd", std::abs(all - total[0]));
  expect(std::abs(all - total[1]) < 1e-3 && total[1] == total[2], "sum by the last block", std::abs(all - total[1]));
  expect(handed[0] == 70 * 69 / 2, "sum handed on by a flag", std::abs(handed[0] - 70 * 69 / 2));
  expect(locked[0] == 350, "sum under a lock", std::abs(locked[0] - 350));
}

// With several OS threads, blocks that run at once come to each word at about the same time. Each launch reads new
// words.
void check_halves(int launches, int blocks, int n) {
  const auto x = tensor<bfloat16>(size_t(launches) * n);
  std::vector<float> y(blocks, NAN);
  const auto rx = registered(x, "x"), ry = registered(y, "y");
  double worst = 0;
  for (int l = 0; l < launches; ++l) {
    halves_sum(y.data(), x.data() + l * n, n, blocks);
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += widen(x[l * n + i]);
    for (const float e : y) worst = std::fmax(worst, std::abs(sum - e));
  }
  expect(worst < 1e-3, "elements of two bytes read by every block", worst);
}

void check_pipeline(int tiles) {
  const auto x = tensor<float>(size_t(tiles) * 128);
  std::vector<float> y(128, NAN);
  const auto rx = registered(x, "x"), ry = registered(y, "y");
  column_sum(y.data(), x.data(), tiles);
  double worst = 0;
  for (int i = 0; i < 128; ++i) {
    double s = 0;
    for (int t = 0; t < tiles; ++t) s += x[t * 128 + i];
    worst = std::fmax(worst, std::abs(s - y[i]));
  }
  expect(worst < 1e-4, "mbarrier and bulk copy pipeline", worst);
}

void check_products() {
  const auto a = tensor<float>(256), b = tensor<float>(128);
  std::vector<float> c(3 * 128, NAN);
  const auto ra = registered(a, "a"), rb = registered(b, "b"), rc = registered(c, "c");
  matrix_products(c.data(), a.data(), b.data());
  const char* const names[3] = {"mma bfloat16", "mma float16", "mma tf32"};
  for (int m = 0; m < 3; ++m) {
    const auto low = [m](float x) -> double {
      return m == 0 ? widen(narrow<bfloat16>(x)) : m == 1 ? widen(narrow<float16>(x)) : as_float(narrow_tf32(x));
    };
    double worst = 0;
    for (int i = 0; i < 128; ++i) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += low(a[i / 8 * 16 + k]) * low(b[k * 8 + i % 8]);
      worst = std::fmax(worst, std::abs(sum - c[m * 128 + i]));
    }
    expect(worst < 1e-5, names[m], worst);
  }
}

int check_instructions() {
  std::vector<int> y(32 * kInstructions, -1);
  const auto ry = registered(y, "y");
  instructions(y.data());
  return check_table(y.data());
}

}  // namespace

int check_all() {
  check_gemm<float16>(64, 64, 96);
  check_gemm<bfloat16>(77, 130, 72);
  check_attention(2, 64);
  check_attention(1, 200);
  check_sums(7, 1000);
  check_halves(100, 4, 4096);
  check_pipeline(10);
  check_products();
  failures += check_instructions() + check_registry();
  return failures;
}

int clock_all() {
  for (int threads : {32, 128, 1024}) {
    const int rounds = 20000000 / threads;
    switches(10, threads);
    std::printf("switch  %4d threads  %.2f ns\n", threads,
                seconds([&] { switches(rounds, threads); }, 2) * 1e9 / rounds / threads);
  }
  check_gemm<bfloat16>(256, 256, 256, 7);
  check_attention(4, 256, 7);
  return failures;
}
