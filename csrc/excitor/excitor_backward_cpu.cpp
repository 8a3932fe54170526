// The backward of Excitor's keys on the CPU. Each task holds sums over its tokens; these are added in order.
#include "prompts.h"

namespace llamakern::LK_ISA {

// What the tasks leave behind: dz by softmax, and the sums over each task's tokens.
template <int MV>
struct ExcitorSums {
  static constexpr int64_t kWide = kWidth<MV>;
  int64_t heads, rows, D, R;  // heads of a task; rows of memory for the prompts
  Scratch<uint32_t> values;   // [task][head][D / kWide][rows][kWide]  wᵀ d
  Scratch<uint32_t> folded;   // [task][R / kWide][rows][kWide]        dW
  Scratch<double> gates;      // [task][head]
  Scratch<float> dz;          // [softmax][M][R]

  ExcitorSums(const Excitor& p, const ExcitorTasks& tasks)
      : heads(p.full_width ? p.H : 1),
        rows(padded_rows(p.P)),
        D(round_up(p.D, kWide)),
        R(round_up(p.R, kWide)),
        values(tasks.count(p.B) * heads * D * rows),
        folded(tasks.count(p.B) * R * rows),
        gates(tasks.count(p.B) * heads),
        dz(tasks.softmaxes * p.B * p.T_ * p.R) {}

  uint32_t* values_of(int64_t task, int64_t head) { return values + (task * heads + head) * D * rows; }
  uint32_t* folded_of(int64_t task) { return folded + task * R * rows; }
};

// Works through the strips of one task.
template <int MV, typename T>
struct ExcitorTask {
  static constexpr int64_t kWide = kWidth<MV>;
  const ExcitorKeysBackward<T>& p;
  const Excitor& in = p.in;
  const int64_t b, s, task;
  PromptHeads<MV> prompts;
  ExcitorSums<MV>& sums;
  // [.][kWide tokens]: z, w, Σ g·d Vᵀ and then du, d Vᵀ, d; and [channels or ranks / kWide][token][kWide]: d, z
  Scratch<uint32_t> z, w, du, along, d, d_rows, z_rows;

  ExcitorTask(const ExcitorKeysBackward<T>& p, const ExcitorTasks& tasks, int64_t task, ExcitorSums<MV>& sums)
      : p(p),
        b(tasks.batch(task)),
        s(tasks.softmax(task)),
        task(task),
        prompts(in, b, s),
        sums(sums),
        z(in.R * kWide),
        w(prompts.rows * kWide),
        du(prompts.rows * kWide),
        along(prompts.rows * kWide),
        d(padded_rows(in.D) * kWide),
        d_rows(sums.D * kWide),
        z_rows(sums.R * kWide) {
    memset(w.get(), 0, size_t(prompts.rows * kWide) * 4);  // rows that are no prompt's, up to whole tiles
    memset(du.get(), 0, size_t(prompts.rows * kWide) * 4);
    for (int64_t h = 0; h < prompts.heads; ++h) sums.gates[task * sums.heads + h] = 0.0;
  }

  void strip(int64_t t, bool add) {
    const int64_t tokens = min64(kWide, in.T_ - t), m = b * in.T_ + t;
    pack_strip<FloatWords, MV>(z, p.z + m * in.R, in.R, tokens, in.R);
    prompts.weights(w, z);
    Vec dot[MV] = {};  // rowsum(dw ⊙ w)
    for (int64_t h = 0; h < prompts.heads; ++h) head(h, t, tokens, add, dot);
    for_lanes<MV>([&](int64_t lane) {
      for (int64_t i = 0; i < in.P; ++i) {
        float* here = floats(du + i * kWide + lane);
        store(here, load(floats(w + i * kWide + lane)) * (load(here) - dot[lane / kLanes]));
      }
    });
    Scratch<uint32_t> dz(padded_rows(kWide) * kWide);
    for (int64_t r = 0; r < in.R; r += kWide) {
      const int64_t left = min64(in.R - r, kWide);
      pack_across<FloatWords>(z_rows + r * kWide, kWide, p.z + m * in.R + r, in.R, left, tokens);
      product<MV, kWide, 1>(left, sums.folded_of(task) + r * sums.rows, add, z_rows + r * kWide, du, in.P, tokens);
      product<MV, 1, kWide>(kWide, dz, false, du, prompts.folded + r * prompts.rows, left, in.P);
      unpack_lanes(sums.dz + (s * in.B * in.T_ + m) * in.R + r, in.R, floats(dz), kWide, left, tokens,
                   [](int64_t, int64_t, Vec sum) { return sum; });
    }
  }

 private:
  // Adds head h's share to du (g·d Vᵀ) and to `dot`.
  void head(int64_t h, int64_t t, int64_t tokens, bool add, Vec (&dot)[MV]) {
    const float g = in.gate_of(prompts.first + h);
    gradient_lanes(h, t, tokens);
    product<MV, kHeadStride, 1>(kWide, along, false, d, prompts.panel(h), in.P, in.D);
    double total = 0.0;
    for_lanes<MV>([&](int64_t lane) {
      Vec sum_here = {};
      for (int64_t i = 0; i < in.P; ++i) {
        const Vec x = load(floats(along + i * kWide + lane));
        float* here = floats(du + i * kWide + lane);
        store(here, h ? fma(x, broadcast(g), load(here)) : x * g);
        sum_here = fma(x, load(floats(w + i * kWide + lane)), sum_here);
      }
      dot[lane / kLanes] = fma(sum_here, broadcast(g), dot[lane / kLanes]);
      total += sum(sum_here);
    });
    sums.gates[task * sums.heads + h] += total;
    uint32_t* out = sums.values_of(task, h);
    for (int64_t c = 0; c < in.D; c += kWide)
      product<MV, kWide, 1>(min64(in.D - c, kWide), out + c * sums.rows, add, d_rows + c * kWide, w, in.P, tokens);
  }

  // d as rows and as lanes, which are 0 for tokens that do not exist.
  void gradient_lanes(int64_t h, int64_t t, int64_t tokens) {
    const T* dy = p.dy.at(b, t, prompts.first + h);
    for (int64_t c = 0; c < in.D; c += kWide) {
      const int64_t left = min64(in.D - c, kWide);
      pack_across<FloatWords>(d_rows + c * kWide, kWide, dy + c, p.dy.token, left, tokens);
      pack_strip<FloatWords, MV>(d + c * kWide, floats(d_rows + c * kWide), kWide, tokens, left);
    }
    if (!in.cos) return;
    turn_lanes<MV>(d, in, b, t, -1.0f);
    for (int64_t c = 0; c < in.D; c += kWide)
      unpack_lanes(floats(d_rows + c * kWide), kWide, floats(d + c * kWide), kWide, min64(in.D - c, kWide), tokens,
                   [](int64_t, int64_t, Vec x) { return x; });
  }
};

// Σ of `tasks` arrays of n floats, in order.
template <typename Part>
static void add_up(uint32_t* out, int64_t n, int64_t tasks, const Part& part) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec total = {};
    for (int64_t task = 0; task < tasks; ++task) total += load(floats(part(task)) + i);
    store(floats(out) + i, total);
  }
}

// dP, dV, dB and dg of one head from the sums of the tasks.
template <int MV, typename T>
static void finish_head(const ExcitorKeysBackward<T>& p, const ExcitorTasks& tasks, ExcitorSums<MV>& sums, int64_t h) {
  constexpr int64_t width = kWidth<MV>;
  const Excitor& in = p.in;
  const int64_t rows = sums.rows, s = in.full_width ? 0 : h, head = in.full_width ? h : 0;
  const int64_t each = in.N == 1 ? in.B : 1, parts = each * tasks.groups;
  const float g = in.gate_of(h);
  Scratch<uint32_t> folded(sums.R * rows), values(sums.D * rows), panel(rows * kHeadStride), ranks(in.R * width),
      keys(rows * width), db(sums.R * padded_rows(in.D));
  memset(db.get(), 0, size_t(sums.R * padded_rows(in.D)) * 4);
  for (int64_t n = 0; n < in.N; ++n) {
    const auto part = [&](int64_t i) { return tasks.index(n * each + i / tasks.groups, s, i % tasks.groups); };
    add_up(folded, sums.R * rows, parts, [&](int64_t i) { return sums.folded_of(part(i)); });
    add_up(values, sums.D * rows, parts, [&](int64_t i) { return sums.values_of(part(i), head); });
    pack_prompts(panel, in, in.prompts, n, h);
    for (int64_t r = 0; r < in.R; r += width)
      product<MV, 1, kHeadStride>(min64(in.R - r, width), db + r * padded_rows(in.D), true, folded + r * rows, panel,
                                  in.D, in.P);
    for (int64_t c = 0; c < in.D; c += width) {
      const int64_t left = min64(in.D - c, width);
      pack_strip<FloatWords, MV>(ranks, in.b + (h * in.D + c) * in.R, in.R, left, in.R);
      for (int64_t r = 0; r < in.R; r += width)
        product<MV, width, 1>(left, keys, r > 0, ranks + r * width, folded + r * rows, in.P, min64(in.R - r, width));
      const int64_t at = (n * in.P * in.H + h) * in.D + c;
      for (int64_t i = 0; i < in.P; ++i)
        for_vectors(left, [&](int64_t d, auto there) {
          const Vec key = load(floats(keys) + i * width + d, there) * in.scale;
          const Vec value = load(floats(values) + (c * rows + i * width) + d, there) * g;
          float* out = p.dprompts + at + i * in.H * in.D + d;
          store(out, p.dvalues ? key : key + value, there);
          if (p.dvalues) store(p.dvalues + (out - p.dprompts), value, there);
        });
    }
  }
  for (int64_t r = 0; r < in.R; r += width)
    store_rows(p.db + h * in.D * in.R + r, in.R, floats(db) + r * padded_rows(in.D), width, in.D,
               min64(in.R - r, width), [&](Vec sum) { return sum * in.scale; });
}

template <int MV, typename T>
static void finish_gate(const ExcitorKeysBackward<T>& p, const ExcitorTasks& tasks, ExcitorSums<MV>& sums) {
  double total = 0.0;
  for (int64_t h = 0; h < p.in.H; ++h) {
    if (p.in.gate_head) total = 0.0;
    for (int64_t b = 0; b < p.in.B; ++b)
      for (int64_t group = 0; group < tasks.groups; ++group) {
        const int64_t task = tasks.index(b, p.in.full_width ? 0 : h, group);
        total += sums.gates[task * sums.heads + (p.in.full_width ? h : 0)];
      }
    p.dgate[h * p.in.gate_head] = float(total);
  }
}

// dx = dz A, if it is wanted, and dA = dzᵀ x.
template <typename T>
static void finish_projection(const ExcitorKeysBackward<T>& p, const float* dz) {
  using W = Words<T>;
  const int64_t M = p.in.B * p.in.T_, R = p.in.R, C = p.in.C;
  if (p.dx)
    with_strips(M, [&]<int MV>() {
      Scratch<uint32_t> lanes(packed_size<W, MV>(M, R));
      pack_rows<W, MV>(lanes, dz, R, M, R);
      gemm<W, MV, Panel::kByWord>(M, C, StoreTokens<MV, T>{p.dx, M, C, {}},
                                  Segment{lanes, words_of<W>(R), DenseColumns<W, float>{p.in.a, C, R}});
    });
  with_strips(R, [&]<int MV>() {
    Scratch<uint32_t> lanes(packed_size<W, MV>(R, M));
    pack_columns<W, MV>(lanes, dz, R, R, M);
    const auto store_da = [&](const float* c, int64_t strip, int64_t k, int64_t rows) {
      const int64_t r = strip * kWidth<MV>;
      unpack_lanes(p.da + r * C + k, C, c, kWidth<MV>, rows, min64(R - r, kWidth<MV>),
                   [](int64_t, int64_t, Vec sum) { return sum; });
    };
    gemm<W, MV, Panel::kByWord>(R, C, store_da, Segment{lanes, words_of<W>(M), DenseColumns<W, T>{p.x, p.x_row, M}});
  });
}

template <typename T>
static void excitor_keys_backward(const ExcitorKeysBackward<T>& p) {
  const Excitor& in = p.in;
  with_token_strips(in.T_, [&]<int MV>() {
    const ExcitorTasks tasks(in, kWidth<MV>);
    ExcitorSums<MV> sums(in, tasks);
    parallel_for(tasks.count(in.B), [&](int64_t task) {
      const int64_t first = tasks.begin(task % tasks.groups), end = tasks.begin(task % tasks.groups + 1);
      ExcitorTask<MV, T> work(p, tasks, task, sums);
      for (int64_t strip = first; strip < end; ++strip) work.strip(strip * kWidth<MV>, strip > first);
    });
    parallel_for(in.H, [&](int64_t h) { finish_head<MV>(p, tasks, sums, h); });
    finish_gate<MV>(p, tasks, sums);
    float* dz = sums.dz;
    const int64_t n = in.B * in.T_ * in.R;
    parallel_ranges(n, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t s = 1; s < tasks.softmaxes; ++s)
        for_vectors(end - begin, [&](int64_t i, auto there) {
          float* here = dz + begin + i;
          store(here, load(here, there) + load(here + s * n, there), there);
        });
    });
    finish_projection(p, dz);
  });
}

LK_KERNEL(ExcitorKeysBackward<float>, excitor_keys_backward);
LK_KERNEL(ExcitorKeysBackward<bfloat16>, excitor_keys_backward);
LK_KERNEL(ExcitorKeysBackward<float16>, excitor_keys_backward);

}  // namespace llamakern::LK_ISA
