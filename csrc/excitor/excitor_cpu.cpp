// Excitor's keys on the CPU: z for all tokens, then each head's mixture of prompts, a strip of tokens at a time.
#include "prompts.h"

namespace llamakern::LK_ISA {

// z = x Aᵀ
template <typename T>
static void project(const ExcitorKeys<T>& p) {
  using W = Words<T>;
  const int64_t M = p.in.B * p.in.T_, C = p.in.C, R = p.in.R;
  with_strips(M, [&]<int MV>() {
    Scratch<uint32_t> lanes(packed_size<W, MV>(M, C));
    pack_rows<W, MV>(lanes, p.x, p.x_row, M, C);
    gemm<W, MV, Panel::kByRow>(M, R, StoreTokens<MV, float>{p.z, M, R, {}},
                               Segment{lanes, words_of<W>(C), DenseRows<W, float>{p.in.a, C, C}});
  });
}

// K' of head h of the tokens from t on, whose mixtures are `extra` [D][kWidth<MV>]. Where g·extra is 0 K keeps its
// bits.
template <int MV, typename T>
static void store_keys(const ExcitorKeys<T>& p, const uint32_t* extra, int64_t b, int64_t t, int64_t h) {
  const int64_t tokens = min64(kWidth<MV>, p.in.T_ - t), D = p.in.D;
  const float g = p.in.gate_of(h);
  const T* k = p.k.at(b, t, h);
  T* y = p.y.at(b, t, h);
  if (!p.beside)
    return unpack_lanes(y, p.y.token, floats(extra), kWidth<MV>, D, tokens, [&](int64_t d, int64_t i, Vec sum) {
      const Vec plain = load(k + i * p.k.token + d, lanes_left(D - d)), term = sum * g;
      return term == Vec{} ? plain : plain + term;
    });
  for (int64_t i = 0; i < tokens; ++i) memcpy(y + i * p.y.token, k + i * p.k.token, size_t(D) * sizeof(T));
  unpack_lanes(y + D, p.y.token, floats(extra), kWidth<MV>, D, tokens,
               [&](int64_t, int64_t, Vec sum) { return sum * g; });
}

template <typename T>
static void excitor_keys(const ExcitorKeys<T>& p) {
  const Excitor& in = p.in;
  project(p);
  with_token_strips(in.T_, [&]<int MV>() {
    constexpr int64_t width = kWidth<MV>;
    const ExcitorTasks tasks(in, width);
    parallel_for(tasks.count(in.B), [&](int64_t task) {
      const int64_t b = tasks.batch(task), group = task % tasks.groups;
      PromptHeads<MV> prompts(in, b, tasks.softmax(task));
      Scratch<uint32_t> z(in.R * width), w(prompts.rows * width), extra(padded_rows(in.D) * width);
      for (int64_t strip = tasks.begin(group); strip < tasks.begin(group + 1); ++strip) {
        const int64_t t = strip * width;
        pack_strip<FloatWords, MV>(z, p.z + (b * in.T_ + t) * in.R, in.R, in.T_ - t, in.R);
        prompts.weights(w, z);
        for (int64_t h = 0; h < prompts.heads; ++h) {
          product<MV, 1, kHeadStride>(width, extra, false, w, prompts.panel(h), in.D, in.P);
          if (in.cos) turn_lanes<MV>(extra, in, b, t, 1.0f);
          store_keys<MV>(p, extra, b, t, prompts.first + h);
        }
      }
    });
  });
}

LK_KERNEL(ExcitorKeys<float>, excitor_keys);
LK_KERNEL(ExcitorKeys<bfloat16>, excitor_keys);
LK_KERNEL(ExcitorKeys<float16>, excitor_keys);

}  // namespace llamakern::LK_ISA
