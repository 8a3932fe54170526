// moe: routing, dispatch, gather and combine, and the grouped linears with few and many tokens of an expert.
#include "../../csrc/moe/moe.h"

#include "smoke.h"

namespace smoke {
namespace {

constexpr int64_t kE = 4, kN = 38, kK = 70, kR = 3;

void check_routing() {
  const int64_t M = 9, top_k = 2, C = 21;
  const auto logits = random<float>(M * kE);
  std::vector<float> weights(M * top_k);
  std::vector<int32_t> experts(M * top_k), offsets(kE + 1), order(M * top_k), position(M * top_k);
  run(MoeRoute{weights.data(), experts.data(), {logits.data(), M, kE, top_k, Score::kSoftmax, true}});
  run(MoeDispatch{offsets.data(), order.data(), position.data(), experts.data(), M, kE, top_k});
  Doubles sums, chosen;
  for (int64_t m = 0; m < M; ++m) {
    const float *z = logits.data() + m * kE, *w = weights.data() + m * top_k;
    const int32_t* e = experts.data() + m * top_k;
    chosen.push_back(1.0 / (1.0 + std::exp(double(z[e[1]]) - z[e[0]])));
    sums.push_back(w[0]);
  }
  judge<float>("moe_route", std::vector<float>(sums.begin(), sums.end()), chosen);
  const auto x = random<float>(M * C);
  std::vector<float> slots(M * top_k * C), y(M * C);
  run(MoeGather<float>{slots.data(), x.data(), weights.data(), order.data(), C, M, C, top_k});
  run(MoeCombine<float>{y.data(), slots.data(), nullptr, position.data(), C, M, C, top_k});
  judge<float>("moe_gather and moe_combine", y, wide(x));  // the weights of a token add up to 1
}

template <typename T>
void check_grouped() {
  const std::vector<int32_t> offsets{0, 3, 3, 60, 61};
  const int64_t S = offsets[kE];
  const auto x = random<T>(S * kK), w = random<T>(kE * kN * kK), dy = random<T>(S * kN);
  const auto a = random<float>(kE * kR * kK), b = random<float>(kE * kN * kR);
  std::vector<T> y(S * kN), dx(S * kK);
  std::vector<float> h(S * kR), da(a.size()), db(b.size());
  GroupedLinear<T, DenseExperts<T>, float> p{};
  p.y = y.data(), p.h = h.data(), p.x = x.data(), p.x_row = kK, p.offsets = offsets.data(), p.w = {w.data(), false};
  p.lora = {a.data(), b.data(), kR, 0.5f}, p.S = S, p.E = kE, p.N = kN, p.K = kK;
  run(p);
  GroupedLinearBackward<T, DenseExperts<T>, float> back{};
  back.dx = dx.data(), back.da = da.data(), back.db = db.data(), back.dy = dy.data(), back.x = x.data();
  back.dy_row = kN, back.x_row = kK, back.h = h.data(), back.offsets = offsets.data(), back.w = p.w;
  back.lora = p.lora, back.S = S, back.E = kE, back.N = kN, back.K = kK;
  run(back);
  Doubles want, want_dx;
  for (int64_t e = 0; e < kE; ++e) {
    const auto part = [&](const auto& t, int64_t each) {
      const Doubles all = wide(t);
      return Doubles(all.begin() + e * each, all.begin() + (e + 1) * each);
    };
    const auto rows = [&](const auto& t, int64_t width) {
      const Doubles all = wide(t);
      return Doubles(all.begin() + offsets[e] * width, all.begin() + offsets[e + 1] * width);
    };
    const int64_t M = offsets[e + 1] - offsets[e];
    const Doubles w_e = plus(
        part(w, kN * kK), turned(linear(turned(part(a, kR * kK), kR, kK), part(b, kN * kR), kK, kN, kR), kK, kN), 0.5);
    const Doubles y_e = linear(rows(x, kK), w_e, M, kN, kK),
                  dx_e = linear(rows(dy, kN), turned(w_e, kN, kK), M, kK, kN);
    want.insert(want.end(), y_e.begin(), y_e.end());
    want_dx.insert(want_dx.end(), dx_e.begin(), dx_e.end());
  }
  judge<T>("grouped_linear", y, want);
  judge<T>("grouped_linear's dx", dx, want_dx);
}

}  // namespace

void check_moe() {
  check_routing();
  check_grouped<float>();
  check_grouped<bfloat16>();
}

}  // namespace smoke
