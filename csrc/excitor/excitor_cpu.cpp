// Excitor's keys on the CPU: z for all tokens, then each head's mixture of prompts, a strip of tokens at a time. A few
// tokens take the formula as it stands.
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

// K' of one head of a token, whose mixture of prompts is given. Where g·mixture is 0 K keeps its bits.
template <typename T>
static void store_key(const ExcitorKeys<T>& p, const float* mixture, int64_t b, int64_t t, int64_t h) {
  const float g = p.in.gate_of(h);
  const T* k = p.k.at(b, t, h);
  T *y = p.y.at(b, t, h), *beside = p.beside ? y + p.in.D : nullptr;
  for_vectors(p.in.D, [=](int64_t d, auto there) {
    const Vec plain = load(k + d, there), more = load(mixture + d, there) * g;
    if (beside) return store(y + d, plain, there), store(beside + d, more, there);
    store(y + d, more == Vec{} ? plain : plain + more, there);
  });
}

// The same for the tokens of a strip from t on, whose mixtures are `extra` [D][kWidth<MV>]. Heads of neighbouring
// tokens often lie a power of two apart, in one set of the cache: so token by token.
template <int MV, typename T>
static void store_keys(const ExcitorKeys<T>& p, const uint32_t* extra, float* rows, int64_t b, int64_t t, int64_t h) {
  const int64_t tokens = min64(kWidth<MV>, p.in.T_ - t), D = p.in.D;
  unpack_lanes(rows, D, floats(extra), kWidth<MV>, D, tokens, [](int64_t, int64_t, Vec sum) { return sum; });
  for (int64_t i = 0; i < tokens; ++i) store_key(p, rows + i * D, b, t + i, h);
}

// ----------------------------------------------------------------------------------- a few tokens, as in decoding

constexpr int64_t kFew = 8;  // tokens for which W would not pay

template <typename A>
static float dot(const A* a, const float* b, int64_t n) {
  constexpr int64_t chains = 4;  // sums that do not wait for each other
  Vec total[chains] = {};
  int64_t i = 0;
  for (; i + chains * kLanes <= n; i += chains * kLanes)
    for (int64_t c = 0; c < chains; ++c) total[c] = fma(load(a + i + c * kLanes), load(b + i + c * kLanes), total[c]);
  for (; i < n; i += kLanes) total[0] = fma(load(a + i, lanes_left(n - i)), load(b + i, lanes_left(n - i)), total[0]);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

static void softmax(float* w, int64_t n, float scale) {
  float most = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < n; ++i) most = w[i] * scale > most ? w[i] * scale : most;
  for_vectors(n, [=](int64_t i, auto there) { store(w + i, exp(load(w + i, there) * scale - most), there); });
  for (int64_t i = 0; i < n; ++i) total += w[i];
  for (int64_t i = 0; i < n; ++i) w[i] /= total;
}

// The heads of softmax s of a token whose z is given: E, U, w and the mixture as the formula says.
template <typename T>
static void mix(const ExcitorKeys<T>& p, const float* z, int64_t b, int64_t t, int64_t s) {
  const Excitor& in = p.in;
  const int64_t first = in.full_width ? 0 : s, end = in.full_width ? in.H : s + 1;
  const auto prompt = [&](const float* prompts, int64_t i, int64_t h) {
    return prompts + (((in.N == 1 ? 0 : b) * in.P + i) * in.H + h) * in.D;
  };
  Scratch<float> row(in.D), weights(in.P);
  float *x = row, *w = weights;
  memset(w, 0, size_t(in.P) * sizeof(float));
  for (int64_t h = first; h < end; ++h) {
    for (int64_t d = 0; d < in.D; ++d) x[d] = dot(in.b + (h * in.D + d) * in.R, z, in.R);
    for (int64_t i = 0; i < in.P; ++i) w[i] += dot(prompt(in.prompts, i, h), x, in.D);
  }
  softmax(w, in.P, in.scale);
  for (int64_t h = first; h < end; ++h) {
    for_vectors(in.D, [&](int64_t d, auto there) {
      Vec total = {};
      for (int64_t i = 0; i < in.P; ++i) total = fma(load(prompt(in.values, i, h) + d, there), broadcast(w[i]), total);
      store(x + d, total, there);
    });
    for (int64_t i = 0, half = in.D / 2; in.cos && i < half; ++i) {
      const int64_t angle = b * in.angle_batch + t * half + i;
      rope_rotate(x[in.interleaved ? 2 * i : i], x[in.interleaved ? 2 * i + 1 : i + half], in.cos[angle],
                  in.sin[angle]);
    }
    store_key(p, x, b, t, h);
  }
}

template <typename T>
static void few_keys(const ExcitorKeys<T>& p) {
  const Excitor& in = p.in;
  const int64_t M = in.B * in.T_;
  parallel_ranges(in.R, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t m = 0; m < M; ++m) p.z[m * in.R + r] = dot(p.x + m * p.x_row, in.a + r * in.C, in.C);
  });
  parallel_ranges(in.full_width ? 1 : in.H, 4, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      for (int64_t m = 0; m < M; ++m) mix(p, p.z + m * in.R, m / in.T_, m % in.T_, s);
  });
}

// --------------------------------------------------------------------------------------------------- many tokens

template <typename T>
static void excitor_keys(const ExcitorKeys<T>& p) {
  const Excitor& in = p.in;
  if (in.B * in.T_ <= kFew) return few_keys(p);
  project(p);
  with_token_strips(in.T_, [&]<int MV>() {
    constexpr int64_t width = kWidth<MV>;
    const ExcitorTasks tasks(in, width);
    parallel_for(tasks.count(in.B), [&](int64_t task) {
      const int64_t b = tasks.batch(task), group = task % tasks.groups;
      PromptHeads<MV> prompts(in, b, tasks.softmax(task));
      Scratch<uint32_t> z(in.R * width), w(prompts.rows * width), extra(padded_rows(in.D) * width);
      Scratch<float> rows(in.D * width);
      for (int64_t strip = tasks.begin(group); strip < tasks.begin(group + 1); ++strip) {
        const int64_t t = strip * width;
        pack_strip<FloatWords, MV>(z, p.z + (b * in.T_ + t) * in.R, in.R, in.T_ - t, in.R);
        prompts.weights(w, z);
        for (int64_t h = 0; h < prompts.heads; ++h) {
          product<MV, 1, kHeadStride>(width, extra, false, w, prompts.panel(h), in.D, in.P);
          if (in.cos) turn_lanes<MV>(extra, in, b, t, 1.0f);
          store_keys<MV>(p, extra, rows, b, t, prompts.first + h);
        }
      }
    });
  });
}

LK_KERNEL(ExcitorKeys<float>, excitor_keys);
LK_KERNEL(ExcitorKeys<bfloat16>, excitor_keys);
LK_KERNEL(ExcitorKeys<float16>, excitor_keys);

}  // namespace llamakern::LK_ISA
