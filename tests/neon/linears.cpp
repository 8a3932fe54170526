// nf4 and lora: the codec, and the linears with their gradients for few, some and many tokens.
#include "../../csrc/lora/lora.h"
#include "nf4_weight.h"
#include "smoke.h"

namespace smoke {
namespace {

constexpr int64_t kN = 38, kK = 86, kBlock = 64;  // blocks that cross rows, and no whole number of anything

template <typename T>
void check_codec() {
  const auto w = random<T>(kN * kK);
  Nf4Weight packed(w, kN, kK, kBlock);
  Doubles largest(packed.absmax.size()), nearest, taken;
  for (int64_t i = 0; i < kN * kK; ++i) {
    double& top = largest[i / kBlock];
    top = std::fmax(top, std::fabs(double(to_float(w[i]))));
  }
  judge<float>(std::string("nf4_quantize's absmax of ") + kName<T>, packed.absmax, largest);
  const Doubles values = packed.values();
  for (int64_t i = 0; i < kN * kK; ++i) {
    const double scale = largest[i / kBlock], x = to_float(w[i]);
    double best = INFINITY;
    for (float level : kNf4Codebook) best = std::fmin(best, std::fabs(level * scale - x));
    nearest.push_back(best);
    taken.push_back(std::fabs(values[i] - x));
  }
  judge<float>(std::string("nf4_quantize's codes of ") + kName<T>, std::vector<float>(taken.begin(), taken.end()),
               nearest);
  std::vector<T> back(kN * kK);
  run(Nf4Dequantize<T>{back.data(), packed.matrix()});
  judge<T>("nf4_dequantize", back, values);
  packed.quantize_twice();
  std::vector<float> scales;
  for (size_t i = 0; i < packed.absmax.size(); ++i) scales.push_back(float(packed.scale(i)));
  judge<float>("nf4_double_quantize", scales, wide(packed.absmax), 500.0);  // 8 bits
  run(Nf4Dequantize<T>{back.data(), packed.matrix()});
  judge<T>("nf4_dequantize of double quantised", back, packed.values());
}

template <typename T>
void check_nf4(int64_t M, bool twice) {
  Nf4Weight w(random<T>(kN * kK), kN, kK, kBlock);
  if (twice) w.quantize_twice();
  const auto x = random<T>(M * kK), dy = random<T>(M * kN), bias = random<T>(kN);
  std::vector<T> y(M * kN), dx(M * kK);
  Nf4Linear<T> p{};
  p.y = y.data(), p.x = x.data(), p.x_row = kK, p.w = w.matrix(), p.bias.same = bias.data(), p.M = M;
  run(p);
  Doubles want = linear(wide(x), w.values(), M, kN, kK);
  for (int64_t i = 0; i < M * kN; ++i) want[i] += to_float(bias[i % kN]);
  const std::string name = "nf4_linear M=" + std::to_string(M) + (twice ? ", double quantised" : "");
  judge<T>(name, y, want);
  Nf4LinearBackward<T> b{};
  b.dx = dx.data(), b.dy = dy.data(), b.dy_row = kN, b.w = w.matrix(), b.M = M;
  run(b);
  judge<T>(name + "'s dx", dx, linear(wide(dy), turned(w.values(), kN, kK), M, kK, kN));
}

// lora_linear over a dense weight and over NF4, with adapters in P.
template <typename T, typename P>
void check_lora(int64_t M) {
  constexpr int64_t R = 5;
  const float scale = 0.75f;
  const auto x = random<T>(M * kK), dy = random<T>(M * kN), dense = random<T>(kN * kK);
  const auto a = random<P>(R * kK), b = random<P>(kN * R);
  const Nf4Weight packed(dense, kN, kK, kBlock);
  const Doubles h = linear(wide(x), wide(a), M, R, kK);
  const Doubles g = linear(wide(dy), turned(wide(b), kN, R), M, R, kN);
  Lora<P> lora{};
  lora.a = a.data(), lora.b = b.data(), lora.R = R, lora.scale = scale;
  const std::string name = "lora_linear M=" + std::to_string(M) + ", adapters in " + kName<P>;
  for (bool nf4 : {false, true}) {
    const std::string what = (nf4 ? "nf4_" : "") + name;
    const Doubles w = nf4 ? packed.values() : wide(dense), base = linear(wide(x), w, M, kN, kK);
    std::vector<T> y(M * kN), dx(M * kK), base_t;
    std::vector<float> h_out(M * R);
    std::vector<P> da(R * kK), db(kN * R);
    for (double one : base) base_t.push_back(from_float<T>(float(one)));
    if (nf4) {
      Nf4LoraLinear<T, P> p{};
      p.y = y.data(), p.h = h_out.data(), p.x = x.data(), p.x_row = kK, p.w = packed.matrix(), p.lora = lora, p.M = M;
      run(p);
    } else {
      LoraLinear<T, P> p{};
      p.y = y.data(), p.h = h_out.data(), p.base = base_t.data(), p.x = x.data(), p.x_row = kK, p.w = dense.data();
      p.lora = lora, p.M = M, p.N = kN, p.K = kK;
      run(p);
    }
    AdapterBackward<T, P> back{};
    back.da = da.data(), back.db = db.data(), back.dy = dy.data(), back.dy_row = kN, back.x = x.data();
    back.x_row = kK, back.h = h_out.data(), back.lora = lora, back.M = M, back.N = kN, back.K = kK;
    if (nf4)
      run(Nf4LoraLinearBackward<T, P>{dx.data(), packed.matrix(), back});
    else
      run(LoraLinearBackward<T, P>{dx.data(), dense.data(), back});
    judge<T>(what, y, plus(base, linear(h, wide(b), M, kN, R), scale), 2.0);  // the dense base comes rounded
    judge<float>(what + "'s h", h_out, h);
    const Doubles through = linear(g, turned(wide(a), R, kK), M, kK, R);
    judge<T>(what + "'s dx", dx, plus(linear(wide(dy), turned(w, kN, kK), M, kK, kN), through, scale));
    const Doubles none_a(R * kK), none_b(kN * R);
    judge<P>(what + "'s da", da, plus(none_a, linear(turned(g, M, R), turned(wide(x), M, kK), R, kK, M), scale));
    judge<P>(what + "'s db", db, plus(none_b, linear(turned(wide(dy), M, kN), turned(h, M, R), kN, R, M), scale));
  }
}

}  // namespace

void check_linears() {
  for_types([]<typename T>() {
    check_codec<T>();
    for (int64_t M : {1, 3, 19, 70}) check_nf4<T>(M, M == 3);
    for (int64_t M : {1, 19, 70}) check_lora<T, T>(M);
  });
  check_lora<bfloat16, float>(19);
  check_lora<float16, float>(19);
}

}  // namespace smoke
