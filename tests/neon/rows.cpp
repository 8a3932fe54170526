// rope, norm, swiglu and scale: what works row by row.
#include "../../csrc/norm/norm.h"
#include "../../csrc/rope/rope.h"
#include "../../csrc/scale/scale.h"
#include "../../csrc/swiglu/swiglu.h"
#include "smoke.h"

namespace smoke {
namespace {

template <typename T>
void check_rope(bool interleaved) {
  constexpr int64_t B = 2, Tn = 5, H = 3, D = 22, half = D / 2;
  const auto x = random<T>(B * Tn * H * D);
  std::vector<float> cos(Tn * half), sin(Tn * half);
  for (int64_t i = 0; i < Tn * half; ++i) cos[i] = float(std::cos(double(i))), sin[i] = float(std::sin(double(i)));
  std::vector<T> y(x.size());
  Rope<T> p{};
  p.y = y.data(), p.x = x.data(), p.x_batch = Tn * H * D, p.x_token = H * D, p.x_head = D;
  p.cos = cos.data(), p.sin = sin.data(), p.interleaved = interleaved, p.sign = -1.0f;
  p.B = B, p.T_ = Tn, p.H = H, p.D = D;
  run(p);
  Doubles truth = wide(x);
  for (int64_t row = 0; row < B * Tn * H; ++row)
    for (int64_t i = 0; i < half; ++i) {
      double &a = truth[row * D + (interleaved ? 2 * i : i)],
             &b = truth[row * D + (interleaved ? 2 * i + 1 : i + half)];
      const double c = cos[row / H % Tn * half + i], s = -sin[row / H % Tn * half + i], a0 = a;
      a = a0 * c - b * s;
      b = a0 * s + b * c;
    }
  judge<T>(interleaved ? "rope, interleaved" : "rope", y, truth);
}

template <typename T>
void check_norm() {
  constexpr int64_t M = 5, C = 37;
  const double eps = 1e-5;
  const auto x = random<T>(M * C), residual = random<T>(M * C), weight = random<T>(C), dy = random<T>(M * C),
             ds = random<T>(M * C);
  std::vector<T> y(M * C), s(M * C), dx(M * C), dweight(C);
  RmsNorm<T, T> p{};
  p.y = y.data(), p.s = s.data(), p.x = x.data(), p.residual = residual.data(), p.weight = weight.data();
  p.x_row = p.residual_row = C, p.eps = float(eps), p.M = M, p.C = C;
  run(p);
  judge<T>("rms_norm's sum", s, plus(wide(x), wide(residual)));
  RmsNormBackward<T, T> b{};
  b.dx = dx.data(), b.dweight = dweight.data(), b.dy = dy.data(), b.ds = ds.data(), b.s = s.data();
  b.weight = weight.data(), b.dy_row = b.ds_row = b.s_row = C, b.eps = float(eps), b.M = M, b.C = C;
  run(b);
  Doubles want(M * C), want_dx(M * C), want_dweight(C);
  for (int64_t m = 0; m < M; ++m) {
    double squares = 0.0, gs = 0.0;
    const auto at = [&](const std::vector<T>& t, int64_t c) { return double(to_float(t[m * C + c])); };
    const auto g = [&](int64_t c) { return at(dy, c) * to_float(weight[c]); };
    for (int64_t c = 0; c < C; ++c) squares += at(s, c) * at(s, c), gs += g(c) * at(s, c);
    const double r = 1.0 / std::sqrt(squares / C + eps);
    for (int64_t c = 0; c < C; ++c) {
      want[m * C + c] = at(s, c) * r * to_float(weight[c]);
      want_dx[m * C + c] = r * (g(c) - at(s, c) * r * r * gs / C) + at(ds, c);
      want_dweight[c] += at(dy, c) * at(s, c) * r;
    }
  }
  judge<T>("rms_norm", y, want);
  judge<T>("rms_norm's dx", dx, want_dx);
  judge<T>("rms_norm's dweight", dweight, want_dweight);
}

template <typename T>
void check_swiglu() {
  constexpr int64_t M = 5, F = 37;
  const auto gate = random<T>(M * F, 4.0), up = random<T>(M * F), dy = random<T>(M * F);
  std::vector<T> y(M * F), dgate(M * F), dup(M * F);
  Swiglu<T> p{};
  p.y = y.data(), p.gate = gate.data(), p.up = up.data(), p.gate_row = p.up_row = F, p.M = M, p.F = F;
  run(p);
  SwigluBackward<T> b{};
  b.dgate = dgate.data(), b.dup = dup.data(), b.dy = dy.data(), b.gate = gate.data(), b.up = up.data();
  b.dy_row = b.gate_row = b.up_row = F, b.M = M, b.F = F;
  run(b);
  Doubles want, want_dgate, want_dup;
  for (int64_t i = 0; i < M * F; ++i) {
    const double g = to_float(gate[i]), u = to_float(up[i]), d = to_float(dy[i]), sigma = 1.0 / (1.0 + std::exp(-g));
    want.push_back(silu(g) * u);
    want_dgate.push_back(d * u * sigma * (1.0 + g * (1.0 - sigma)));
    want_dup.push_back(d * silu(g));
  }
  judge<T>("swiglu", y, want);
  judge<T>("swiglu's dgate", dgate, want_dgate);
  judge<T>("swiglu's dup", dup, want_dup);
}

template <typename T>
void check_scale() {
  constexpr int64_t M = 5, C = 37;
  const auto x = random<T>(M * C), scale = random<T>(C), dy = random<T>(M * C);
  const auto shift = random<float>(C);
  std::vector<T> y(M * C), dx(M * C);
  std::vector<float> dscale(C), dshift(C);
  run(ScaleShift<T>{y.data(), x.data(), C, {scale.data(), nullptr}, {nullptr, shift.data()}, M, C});
  run(ScaleShiftBackward<T>{
      dx.data(), dscale.data(), dshift.data(), dy.data(), x.data(), {scale.data(), nullptr}, C, C, M, C});
  Doubles want, want_dx, want_dscale(C), want_dshift(C);
  for (int64_t i = 0; i < M * C; ++i) {
    const double s = to_float(scale[i % C]), d = to_float(dy[i]);
    want.push_back(to_float(x[i]) * s + shift[i % C]);
    want_dx.push_back(d * s);
    want_dscale[i % C] += d * to_float(x[i]);
    want_dshift[i % C] += d;
  }
  judge<T>("scale_shift", y, want);
  judge<T>("scale_shift's dx", dx, want_dx);
  judge<float>("scale_shift's dscale", dscale, want_dscale);
  judge<float>("scale_shift's dshift", dshift, want_dshift);
}

}  // namespace

void check_rows() {
  for_types([]<typename T>() {
    check_rope<T>(false);
    check_rope<T>(true);
    check_norm<T>();
    check_swiglu<T>();
    check_scale<T>();
  });
}

}  // namespace smoke
