// loss: the cross-entropy of a linear head. block: a whole decoder block for one new token.
#include "../../csrc/block/block.h"
#include "../../csrc/loss/loss.h"
#include "nf4_weight.h"
#include "smoke.h"

namespace smoke {
namespace {

template <typename T>
void check_loss(Reduction reduction) {
  constexpr int64_t M = 21, C = 30, V = 77, kIgnored = -100;
  const auto h = random<T>(M * C), w = random<T>(V * C);
  std::vector<int64_t> labels(M);
  for (int64_t m = 0; m < M; ++m) labels[m] = m == 4 ? kIgnored : (m * 31) % V;
  const bool each = reduction == Reduction::kNone;
  std::vector<float> loss(each ? M : 1);
  std::vector<T> dh(M * C), dw(V * C);
  LinearCrossEntropy<T> p{};
  p.loss = loss.data(), p.dh = dh.data(), p.dw = dw.data(), p.h = h.data(), p.w = w.data(), p.labels = labels.data();
  p.ignore_index = kIgnored, p.reduction = reduction, p.h_row = p.w_row = C, p.M = M, p.C = C, p.V = V;
  run(p);
  const double weight = reduction == Reduction::kMean ? 1.0 / (M - 1) : 1.0;
  Doubles z = linear(wide(h), wide(w), M, V, C), want(each ? M : 1);
  for (int64_t m = 0; m < M; ++m) {
    double total = 0.0;
    for (int64_t v = 0; v < V; ++v) total += std::exp(z[m * V + v]);
    const bool counts = labels[m] != kIgnored;
    if (counts) want[each ? m : 0] += weight * (std::log(total) - z[m * V + labels[m]]);
    for (int64_t v = 0; v < V; ++v)
      z[m * V + v] = counts ? weight * (std::exp(z[m * V + v]) / total - (v == labels[m])) : 0.0;
  }
  const std::string name = each ? "linear_cross_entropy" : "linear_cross_entropy's mean";
  judge<float>(name, loss, want);
  judge<T>(name + ": dh", dh, linear(z, turned(wide(w), V, C), M, C, V));
  judge<T>(name + ": dw", dw, linear(turned(z, M, V), turned(wide(h), M, C), V, C, M));
}

Doubles normed(const Doubles& x, const Doubles& weight, double eps) {
  double squares = 0.0;
  for (double one : x) squares += one * one;
  Doubles y;
  for (size_t c = 0; c < x.size(); ++c) y.push_back(x[c] * weight[c] / std::sqrt(squares / double(x.size()) + eps));
  return y;
}

void turn(Doubles& x, int64_t D, const float* cos, const float* sin) {
  for (size_t head = 0; head < x.size(); head += size_t(D))
    for (int64_t i = 0; i < D / 2; ++i) {
      double &a = x[head + i], &b = x[head + i + D / 2];
      const double a0 = a;
      a = a0 * cos[i] - b * sin[i];
      b = a0 * sin[i] + b * cos[i];
    }
}

// One row that stands at position `at`.
template <typename T>
void check_block() {
  constexpr int64_t S = 11, H = 4, Hkv = 2, D = 16, C = H * D, F = 96, at = 9, half = D / 2;
  const auto x = random<T>(C), attention_norm = random<T>(C), ffn_norm = random<T>(C);
  auto k_cache = random<T>(S * Hkv * D), v_cache = random<T>(S * Hkv * D);
  const auto make = [](int64_t N, int64_t K) { return Nf4Weight(random<T>(N * K, 0.3), N, K, 64); };
  const Nf4Weight wq = make(C, C), wk = make(Hkv * D, C), wv = make(Hkv * D, C), wo = make(C, C), gate = make(F, C),
                  up = make(F, C), down = make(C, F);
  std::vector<float> cos, sin;
  for (int64_t i = 0; i < S * half; ++i) cos.push_back(float(std::cos(i))), sin.push_back(float(std::sin(i)));
  const int32_t lengths[1] = {at + 1};
  Doubles keys = wide(k_cache), values = wide(v_cache);

  std::vector<T> y(C);
  BlockDecode<T> p{};
  p.y = y.data(), p.x = x.data(), p.attention_norm.same = attention_norm.data(), p.ffn_norm.same = ffn_norm.data();
  p.q = wq.matrix(), p.k = wk.matrix(), p.v = wv.matrix(), p.o = wo.matrix();
  p.gate = gate.matrix(), p.up = up.matrix(), p.down = down.matrix(), p.cos = cos.data(), p.sin = sin.data();
  p.k_cache = {k_cache.data(), S * Hkv * D, Hkv * D, D}, p.v_cache = {v_cache.data(), S * Hkv * D, Hkv * D, D};
  p.lengths = lengths, p.x_row = C, p.eps = 1e-5f, p.B = 1, p.C = C, p.S = S, p.H = H, p.Hkv = Hkv, p.D = D, p.F = F;
  run(p);

  const Doubles h = normed(wide(x), wide(attention_norm), 1e-5);
  Doubles q = linear(h, wq.values(), 1, C, C), k = linear(h, wk.values(), 1, Hkv * D, C), mixed(C);
  const Doubles v = linear(h, wv.values(), 1, Hkv * D, C);
  turn(q, D, &cos[at * half], &sin[at * half]);
  turn(k, D, &cos[at * half], &sin[at * half]);
  for (int64_t i = 0; i < Hkv * D; ++i) keys[at * Hkv * D + i] = k[i], values[at * Hkv * D + i] = v[i];
  for (int64_t head = 0; head < H; ++head) {
    double total = 0.0;
    Doubles weights;
    const auto row = [&](int64_t j) { return (j * Hkv + head / (H / Hkv)) * D; };
    for (int64_t j = 0; j <= at; ++j) {
      double s = 0.0;
      for (int64_t d = 0; d < D; ++d) s += q[head * D + d] * keys[row(j) + d];
      weights.push_back(std::exp(s / std::sqrt(double(D))));
      total += weights.back();
    }
    for (int64_t j = 0; j <= at; ++j)
      for (int64_t d = 0; d < D; ++d) mixed[head * D + d] += weights[j] / total * values[row(j) + d];
  }
  const Doubles s = plus(wide(x), linear(mixed, wo.values(), 1, C, C));
  const Doubles g = normed(s, wide(ffn_norm), 1e-5);
  Doubles hidden = linear(g, gate.values(), 1, F, C);
  const Doubles ups = linear(g, up.values(), 1, F, C);
  for (int64_t i = 0; i < F; ++i) hidden[i] = silu(hidden[i]) * ups[i];
  judge<T>("block_decode", y, plus(s, linear(hidden, down.values(), 1, C, F)), 4.0);  // a dozen roundings
}

}  // namespace

void check_heads() {
  for_types([]<typename T>() {
    check_loss<T>(Reduction::kNone);
    check_loss<T>(Reduction::kMean);
    check_block<T>();
  });
}

}  // namespace smoke
