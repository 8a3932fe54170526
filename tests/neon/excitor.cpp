// excitor: keys and gradients, one softmax for each head and one for all, turned and not.
#include "../../csrc/excitor/excitor.h"

#include "smoke.h"

namespace smoke {
namespace {

constexpr int64_t kB = 2, kC = 22, kH = 3, kD = 10, kP = 7, kR = 5;
int64_t T_ = 0, M = 0;  // tokens of a row, and of both
constexpr double kScale = 0.3;

struct Case {
  int64_t tokens;
  bool full_width, turned, own_values;
};

// Everything that the formula names, in double. Heads of tokens are [M, H, D].
struct Truth {
  Doubles x, k, a, b, prompts, values, gate, cos, sin;
  Doubles z, w, mixture;  // [M, R], [M, H, P], [M, H, D]

  // d [M, H, D] turned by the angles, or back.
  Doubles turn(Doubles d, double sign) const {
    for (int64_t i = 0; i < M * kH; ++i)
      for (int64_t j = 0; j < kD / 2; ++j) {
        const int64_t at = i / kH % T_ * (kD / 2) + j;
        double &p = d[i * kD + j], &q = d[i * kD + j + kD / 2];
        const double c = cos[at], s = sign * sin[at], first = p * c - q * s;
        q = p * s + q * c;
        p = first;
      }
    return d;
  }

  void forward(const Case& is) {
    z = linear(x, a, M, kR, kC);
    const Doubles e = linear(z, b, M, kH * kD, kR);
    w.assign(M * kH * kP, 0.0);
    mixture.assign(M * kH * kD, 0.0);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t h = 0; h < kH; ++h) {
        double u[kP] = {}, total = 0.0;
        for (int64_t p = 0; p < kP; ++p)
          for (int64_t g = is.full_width ? 0 : h; g < (is.full_width ? kH : h + 1); ++g)
            for (int64_t d = 0; d < kD; ++d) u[p] += kScale * e[(m * kH + g) * kD + d] * prompts[(p * kH + g) * kD + d];
        for (double one : u) total += std::exp(one);
        for (int64_t p = 0; p < kP; ++p) {
          w[(m * kH + h) * kP + p] = std::exp(u[p]) / total;
          for (int64_t d = 0; d < kD; ++d)
            mixture[(m * kH + h) * kD + d] += std::exp(u[p]) / total * values[(p * kH + h) * kD + d];
        }
      }
  }

  // Gradients of Σ dy ⊙ K', in the order dx, da, db, dprompts, dvalues, dgate.
  std::vector<Doubles> backward(const Case& is, const Doubles& dy) const {
    const Doubles d = is.turned ? turn(dy, -1.0) : dy, e = linear(z, b, M, kH * kD, kR);
    Doubles de(M * kH * kD), dp(prompts.size()), dv(prompts.size()), dg(kH);
    for (int64_t m = 0; m < M; ++m) {
      double dw[kH][kP] = {};
      for (int64_t h = 0; h < kH; ++h)
        for (int64_t p = 0; p < kP; ++p)
          for (int64_t i = 0; i < kD; ++i) {
            const double one = d[(m * kH + h) * kD + i], weight = w[(m * kH + h) * kP + p];
            const int64_t at = (p * kH + h) * kD + i;
            dv[at] += gate[h] * weight * one;
            dg[h] += weight * one * values[at];
            for (int64_t g = is.full_width ? 0 : h; g < (is.full_width ? kH : h + 1); ++g)
              dw[g][p] += gate[h] * one * values[at];
          }
      for (int64_t h = 0; h < kH; ++h) {
        double along = 0.0;
        for (int64_t p = 0; p < kP; ++p) along += dw[h][p] * w[(m * kH + h) * kP + p];
        for (int64_t p = 0; p < kP; ++p) {
          const double du = kScale * w[(m * kH + h) * kP + p] * (dw[h][p] - along);
          for (int64_t i = 0; i < kD; ++i) {
            de[(m * kH + h) * kD + i] += du * prompts[(p * kH + h) * kD + i];
            dp[(p * kH + h) * kD + i] += du * e[(m * kH + h) * kD + i];
          }
        }
      }
    }
    const Doubles dz = linear(de, turned(b, kH * kD, kR), M, kR, kH * kD);
    return {linear(dz, turned(a, kR, kC), M, kC, kR),
            linear(turned(dz, M, kR), turned(x, M, kC), kR, kC, M),
            linear(turned(de, M, kH * kD), turned(z, M, kR), kH * kD, kR, M),
            is.own_values ? dp : plus(dp, dv),
            dv,
            dg};
  }
};

template <typename T>
void check_excitor(const Case& is) {
  T_ = is.tokens, M = kB * T_;
  const auto x = random<T>(M * kC), k = random<T>(M * kH * kD), dy = random<T>(M * kH * kD);
  const auto a = random<float>(kR * kC, 0.5), b = random<float>(kH * kD * kR), prompts = random<float>(kP * kH * kD);
  const auto values = is.own_values ? random<float>(kP * kH * kD) : prompts, gate = random<float>(kH);
  std::vector<float> cos, sin;
  for (int64_t i = 0; i < T_ * kD / 2; ++i) cos.push_back(std::cos(float(i))), sin.push_back(std::sin(float(i)));
  Truth truth{wide(x),   wide(k), wide(a), wide(b), wide(prompts), wide(values), wide(gate), wide(cos),
              wide(sin), {},      {},      {}};
  truth.forward(is);
  const Excitor in{.a = a.data(),
                   .b = b.data(),
                   .prompts = prompts.data(),
                   .values = is.own_values ? values.data() : prompts.data(),
                   .gate = gate.data(),
                   .gate_head = 1,
                   .cos = is.turned ? cos.data() : nullptr,
                   .sin = is.turned ? sin.data() : nullptr,
                   .angle_batch = 0,
                   .interleaved = false,
                   .scale = float(kScale),
                   .full_width = is.full_width,
                   .N = 1,
                   .B = kB,
                   .T_ = T_,
                   .C = kC,
                   .H = kH,
                   .D = kD,
                   .P = kP,
                   .R = kR};
  std::vector<T> y(M * kH * kD), dx(M * kC);
  std::vector<float> z(M * kR), da(kR * kC), db(kH * kD * kR), dp(kP * kH * kD), dv(kP * kH * kD), dg(kH);
  const auto strides = [](auto* data) { return TokenHeads{data, T_ * kH * kD, kH * kD, kD}; };
  run(ExcitorKeys<T>{in, strides(y.data()), z.data(), x.data(), kC, strides(k.data()), false});
  Doubles want = is.turned ? truth.turn(truth.mixture, 1.0) : truth.mixture;
  for (int64_t i = 0; i < M * kH * kD; ++i) want[i] = truth.k[i] + truth.gate[i / kD % kH] * want[i];
  const std::string name = "excitor_keys of " + std::to_string(M) + " tokens" + (is.full_width ? ", one softmax" : "") +
                           (is.turned ? ", turned" : "") + (is.own_values ? ", values of their own" : "");
  judge<T>(name, y, want);
  run(ExcitorKeysBackward<T>{in, dx.data(), da.data(), db.data(), dp.data(), is.own_values ? dv.data() : nullptr,
                             dg.data(), strides(dy.data()), x.data(), kC, z.data()});
  const auto grads = truth.backward(is, wide(dy));
  const std::vector<float>* ours[] = {&da, &db, &dp, &dv, &dg};
  const char* names[] = {"da", "db", "dprompts", "dprompts_v", "dgate"};
  judge<T>(name + "'s dx", dx, grads[0], 2.0);
  for (int i = 0; i < 5; ++i)
    if (i != 3 || is.own_values) judge<T>(name + "'s " + names[i], *ours[i], grads[i + 1], 2.0);
}

}  // namespace

void check_excitor() {
  for (const Case is :
       {Case{21, false, false, false}, {21, false, true, true}, {21, true, true, false}, {2, true, true, true}})
    for_types([&]<typename T>() { check_excitor<T>(is); });
}

}  // namespace smoke
