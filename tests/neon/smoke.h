// What the smoke checks share: random data, conversions, and the judgement of a kernel's output by plain loops in
// double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/common/isa.h"
#include "../../csrc/common/types.h"

namespace smoke {

using namespace llamakern;
using Doubles = std::vector<double>;

inline int failures = 0;

template <typename T>
inline constexpr const char* kName = "float32";
template <>
inline constexpr const char* kName<bfloat16> = "bfloat16";
template <>
inline constexpr const char* kName<float16> = "float16";

// The largest difference that may stand against the largest truth: what the output's own rounding makes, and sums.
template <typename T>
inline constexpr double kTolerance = 2e-5;
template <>
inline constexpr double kTolerance<bfloat16> = 1e-2;
template <>
inline constexpr double kTolerance<float16> = 2e-3;

inline double uniform() {  // (-1, 1), the same in every run
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state) >> 11) / double(int64_t(1) << 52);
}

template <typename T>
std::vector<T> random(int64_t n, double size = 1.0) {
  std::vector<T> x(n);
  for (T& one : x) one = from_float<T>(float(uniform() * size));
  return x;
}

template <typename T>
Doubles wide(const std::vector<T>& x) {
  Doubles y;
  for (const T& one : x) y.push_back(to_float(one));
  return y;
}

// What a kernel has written, against the truth.
template <typename T, typename U>
void judge(const std::string& what, const std::vector<U>& ours, const Doubles& truth, double slack = 1.0) {
  double worst = ours.size() == truth.size() ? 0.0 : INFINITY, largest = 1e-30;
  for (size_t i = 0; i < truth.size() && i < ours.size(); ++i) {
    const double difference = std::fabs(double(to_float(ours[i])) - truth[i]);
    worst = difference <= worst ? worst : difference;  // NaN is taken over
    largest = std::fmax(largest, std::fabs(truth[i]));
  }
  const bool good = worst <= slack * kTolerance<T> * largest;
  if (!good) ++failures;
  std::printf("%s %-8s %s: error %.1e of %.1e\n", good ? "ok  " : "FAIL", kName<T>, what.c_str(), worst / largest,
              slack * kTolerance<T>);
}

// y [M, N] = x [M, K] · wᵀ, w [N, K]
inline Doubles linear(const Doubles& x, const Doubles& w, int64_t M, int64_t N, int64_t K) {
  Doubles y(M * N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) y[m * N + n] += x[m * K + k] * w[n * K + k];
  return y;
}

// y [N, M] of x [M, N]
inline Doubles turned(const Doubles& x, int64_t M, int64_t N) {
  Doubles y(M * N);
  for (int64_t i = 0; i < M * N; ++i) y[i % N * M + i / N] = x[i];
  return y;
}

// x + factor·y
inline Doubles plus(Doubles x, const Doubles& y, double factor = 1.0) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += factor * y[i];
  return x;
}

inline double silu(double g) { return g / (1.0 + std::exp(-g)); }

// fn.operator()<T>() for the three storage types.
template <typename Fn>
void for_types(const Fn& fn) {
  fn.template operator()<float>();
  fn.template operator()<bfloat16>();
  fn.template operator()<float16>();
}

void check_rows();       // rope, norm, swiglu, scale
void check_attention();  // forward, backward, decoding, the cache
void check_linears();    // nf4, lora
void check_heads();      // loss, block
void check_moe();        // moe
void check_excitor();    // excitor

}  // namespace smoke
