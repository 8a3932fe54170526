// The experts' linears on the CPU, backward: dx, the gradients of adapters, and those of dense weights.
#include "../common/pages.h"
#include "../lora/adapter.h"
#include "../nf4/nf4_decode.h"
#include "dense_columns.h"
#include "grouped.h"

namespace llamakern::LK_ISA {

// dA [R][K] = scale·gᵀ x and dB [N][R] = scale·dyᵀ h of each expert: lanes are the R columns of g or h.
template <typename T, typename Experts, typename P>
static void adapter_gradients(const GroupedLinearBackward<T, Experts, P>& p, const float* g) {
  using W = Words<T>;
  const int64_t E = p.E, N = p.N, K = p.K, R = p.lora.R;
  with_strips(R, [&]<int MV>() {
    constexpr int64_t width = kWidth<MV>;
    Scratch<Share> room(E + 1);
    Share* shares = room;
    share_out(shares, p.offsets, E, [&](int64_t count) { return packed_size<W, MV>(R, count); });
    Scratch<uint32_t> lane_room(shares[E].at);
    uint32_t* lanes = lane_room;
    const auto gemm_of = [&](int64_t rows, const T* x, int64_t ld, const auto& store) {
      const Plan<MV, Panel::kByWord> plan(R, rows);
      for_experts(
          E, [&](int64_t) { return plan.tasks(); },
          [&](int64_t e, int64_t task) {
            const int64_t count = shares[e].count;
            const DenseColumns<W, T> columns{x + shares[e].begin * ld, ld, count};
            gemm_task<W, MV, Panel::kByWord>(
                plan, task,
                [&](const float* c, int64_t strip, int64_t row, int64_t rows) {
                  store(c, strip * width, e, row, rows);
                },
                Segment{lanes + shares[e].at, words_of<W>(count), columns});
          });
    };
    const auto times_scale = [&](auto, auto, Vec sum) { return sum * p.lora.scale; };
    pack_share_columns<W>(lanes, shares, E, p.h, R, R);
    gemm_of(N, p.dy, p.dy_row, [&](const float* c, int64_t r, int64_t e, int64_t n, int64_t rows) {
      store_rows(p.db + (e * N + n) * R + r, R, c, width, rows, min64(R - r, width),
                 [&](Vec sum) { return sum * p.lora.scale; });
    });
    pack_share_columns<W>(lanes, shares, E, g, R, R);
    gemm_of(K, p.x, p.x_row, [&](const float* c, int64_t r, int64_t e, int64_t k, int64_t rows) {
      unpack_lanes(p.da + (e * R + r) * K + k, K, c, width, rows, min64(R - r, width), times_scale);
    });
  });
}

// --------------------------------------------------------------------------------------------------- dx

template <typename W, typename V>
static DenseColumns<W, V> columns_of(const DenseExperts<V>& w, int64_t e, int64_t N, int64_t K) {
  return {w.w + e * N * K, K, N};
}
template <typename W>
static Nf4Columns<W> columns_of(const Nf4Experts& w, int64_t e, int64_t, int64_t) {
  return {w[e]};
}

// g = dy B, then dx = scale·g A + dy W. Experts of few tokens read a dense weight as it comes by; the others, and NF4
// ones, take panels of it.
template <typename T, typename Experts, typename P>
struct GroupedInput {
  using W = Words<T>;
  static constexpr bool kNf4 = std::is_same_v<Experts, Nf4Experts>;
  const GroupedLinearBackward<T, Experts, P>& p;
  const Share *strips, *words;  // of every expert: `at` in lanes, and in words of `few_lanes` where its tokens are few
  uint32_t *lanes, *g_lanes, *few_lanes;
  float* g;

  static bool few(int64_t count) { return !kNf4 && 0 < count && count <= kFewTokens; }
  static int64_t few_size(const Experts& w, int64_t count, int64_t N) {
    if constexpr (kNf4) return 0;
    if (!few(count)) return 0;
    const Few some = Few::of(count, N, W());
    return is_transposed(w) ? some.places * round_up(words_of<W>(N), kLanes) : columns_size<W>(some, N);
  }
  static int64_t many(const Share& share) { return few(share.count) ? 0 : share.count; }

  void run() const {
    const int64_t E = p.E, N = p.N, R = p.lora.R, r_words = words_of<W>(R);
    pack_shares<W>(lanes, strips, E, p.dy, p.dy_row, N);
    if (R)
      grouped_gemm<Panel::kByWord>(
          strips, E, R, tokens_of, [&]<int MV>(const Share& share, const auto& plan, int64_t e, int64_t task) {
            const StoreNarrow<W, MV> store{g + share.begin * R, g_lanes + share.at * r_words, share.count, R, 1.0f,
                                           p.lora.scale};
            const DenseColumns<W, P> b{p.lora.b + e * N * R, R, N};
            gemm_task<W, MV, Panel::kByWord>(plan, task, store, lane_segment(share, b));
          });
    if (!p.dx) return;
    if (is_transposed(p.w))
      panels<Panel::kByRow>();
    else
      panels<Panel::kByWord>();
    if constexpr (!kNf4) stream();
  }

 private:
  template <typename Fill>
  Segment<Fill> lane_segment(const Share& share, const Fill& fill) const {
    const int64_t depth = words_of<W>(p.N);
    return {lanes + share.at * depth, depth, fill};
  }

  template <Panel kPanel>
  void panels() const {
    const int64_t N = p.N, K = p.K, R = p.lora.R, r_words = words_of<W>(R);
    grouped_gemm<kPanel>(
        strips, p.E, K, many, [&]<int MV>(const Share& share, const auto& plan, int64_t e, int64_t task) {
          const StoreTokens<MV, T> store{p.dx + share.begin * K, share.count, K, {}};
          const uint32_t* from = g_lanes + share.at * r_words;
          const P* a = p.lora.a + e * R * K;
          if constexpr (kPanel == Panel::kByWord) {
            gemm_task<W, MV, kPanel>(plan, task, store, Segment{from, r_words, DenseColumns<W, P>{a, K, R}},
                                     lane_segment(share, columns_of<W>(p.w, e, N, K)));
          } else if constexpr (!kNf4) {
            const DenseRows<W, std::remove_cvref_t<decltype(*p.w.w)>> rows{p.w.w + e * N * K, N, N};
            gemm_task<W, MV, kPanel>(plan, task, store, Segment{from, r_words, GatheredColumns<W, P>{a, K, R}},
                                     lane_segment(share, rows));
          }
        });
  }

  void stream() const {
    const int64_t E = p.E, N = p.N, K = p.K;
    for_experts(
        E, [&](int64_t e) { return few(words[e].count) ? 1 : 0; },
        [&](int64_t e, int64_t) {
          const Few some = Few::of(words[e].count, N, W());
          const T* dy = p.dy + words[e].begin * p.dy_row;
          if (p.w.transposed)
            order_few<W>(few_lanes + words[e].at, some, dy, p.dy_row, N);
          else
            order_words<W>(few_lanes + words[e].at, some, dy, p.dy_row, N);
        });
    for_experts(
        E, [&](int64_t e) { return !few(words[e].count) ? 0
                                   : p.w.transposed     ? few_tasks(K)
                                                        : columns_tasks(K); },
        [&](int64_t e, int64_t task) { p.w.transposed ? stream_rows(e, task) : stream_columns(e, task); });
  }

  // scale·g A of one expert's tokens, for the columns of one task.
  template <typename Store>
  void adapter_columns(int64_t e, int64_t column, int64_t columns, const Store& store) const {
    const int64_t R = p.lora.R, count = words[e].count;
    for (int64_t m = 0; m < count; ++m)
      for (int64_t k = column; k < column + columns; k += kLanes) {
        const int there = lanes_left(column + columns - k);
        Vec sum = {};
        for (int64_t r = 0; r < R; ++r)
          sum = fma(broadcast(g[(words[e].begin + m) * R + r] * p.lora.scale),
                    load(p.lora.a + (e * R + r) * p.K + k, there), sum);
        store(m, k, sum, there);
      }
  }

  void stream_columns(int64_t e, int64_t task) const {
    const int64_t N = p.N, K = p.K, count = words[e].count;
    T* dx = p.dx + words[e].begin * K;
    const auto begin = [&](float* c, int64_t column, int64_t columns) {
      if (p.lora.R)
        adapter_columns(e, column, columns, [&](int64_t m, int64_t k, Vec sum, int there) {
          store(c + m * kFewColumns + k - column, sum, there);
        });
    };
    const auto store = [&](const float* c, int64_t column, int64_t columns) {
      store_rows(dx + column, K, c, kFewColumns, count, columns, [](Vec sum) { return sum; });
    };
    columns_task<W>(Few::of(count, N, W()), K, task, begin, store,
                    ColumnPart{few_lanes + words[e].at, p.w.w + e * N * K, N, K});
  }

  void stream_rows(int64_t e, int64_t task) const {
    const int64_t N = p.N, K = p.K, count = words[e].count;
    const int64_t column = task * kFewRows, columns = min64(kFewRows, K - column);
    Scratch<float> room(count * kFewRows);
    float* adapter = room;
    if (p.lora.R)
      adapter_columns(e, column, columns, [&](int64_t m, int64_t k, Vec sum, int there) {
        store(adapter + m * kFewRows + k - column, sum, there);
      });
    T* dx = p.dx + words[e].begin * K;
    const auto start = [&](int64_t k, int64_t m) {
      Vec first = {};
      if (p.lora.R) first[0] = adapter[m * kFewRows + k - column];
      return first;
    };
    const auto finish = [&](int64_t k, int64_t m, Vec sums, int there) { store(dx + m * K + k, sums, there); };
    few_task<W>(Few::of(count, N, W()), p.w.w + e * N * K, K, N, few_lanes + words[e].at, start, finish, task);
  }
};

template <typename T, typename Experts, typename P>
static void backward(const GroupedLinearBackward<T, Experts, P>& p) {
  using W = Words<T>;
  using Input = GroupedInput<T, Experts, P>;
  if (p.dx) expect_large_pages(p.dx, size_t(p.S * p.K) * sizeof(T));
  const int64_t E = p.E, R = p.lora.R;
  Scratch<Share> strips(E + 1), words(E + 1);
  share_out(strips.get(), p.offsets, E, [&](int64_t count) { return strip_lanes(count); });
  share_out(words.get(), p.offsets, E, [&](int64_t count) { return Input::few_size(p.w, count, p.N); });
  const int64_t lanes = strips.get()[E].at;
  Scratch<uint32_t> lane_room(lanes * words_of<W>(p.N)), g_room(lanes * words_of<W>(R));
  Scratch<uint32_t> few_room(words.get()[E].at);
  Scratch<float> g(p.S * R);
  Input{p, strips, words, lane_room, g_room, few_room, g}.run();
  if (R) adapter_gradients(p, g.get());
}

// --------------------------------------------------------------------------------------------------- dW

template <typename T, typename V>
static void weight_gradient(const GroupedWeightGradient<T, V>& p) {
  using W = Words<T>;
  const int64_t E = p.E, N = p.N, K = p.K;
  expect_large_pages(p.dw, size_t(E * N * K) * sizeof(V));
  with_strips(K, [&]<int MV>() {
    constexpr int64_t width = kWidth<MV>;
    Scratch<Share> room(E + 1);
    Share* shares = room;
    share_out(shares, p.offsets, E, [&](int64_t count) { return packed_size<W, MV>(K, count); });
    Scratch<uint32_t> lane_room(shares[E].at);
    uint32_t* lanes = lane_room;
    pack_share_columns<W>(lanes, shares, E, p.x, p.x_row, K);
    const Plan<MV, Panel::kByWord> plan(K, N);
    for_experts(
        E, [&](int64_t) { return plan.tasks(); },
        [&](int64_t e, int64_t task) {
          const Share& share = shares[e];
          V* dw = p.dw + e * N * K;
          const auto store = [&](const float* c, int64_t strip, int64_t n, int64_t rows) {
            const int64_t k = strip * width;
            store_rows(dw + n * K + k, K, c, width, rows, min64(K - k, width), [](Vec sum) { return sum; });
          };
          const DenseColumns<W, T> columns{p.dy + share.begin * p.dy_row, p.dy_row, share.count};
          gemm_task<W, MV, Panel::kByWord>(plan, task, store,
                                           Segment{lanes + share.at, words_of<W>(share.count), columns});
        });
  });
}

#define LK_MOE_KERNELS(T, V, P) \
  static const File<GroupedLinearBackward<T, DenseExperts<V>, P>> dense_##T##V##P(kThisIsa, &backward)
LK_MOE_KERNELS(float, float, float);
LK_MOE_KERNELS(float, float16, float);
LK_MOE_KERNELS(bfloat16, bfloat16, bfloat16);
LK_MOE_KERNELS(bfloat16, bfloat16, float);
#define LK_MOE_NF4_KERNELS(T, P) \
  static const File<GroupedLinearBackward<T, Nf4Experts, P>> nf4_##T##P(kThisIsa, &backward)
LK_MOE_NF4_KERNELS(float, float);
LK_MOE_NF4_KERNELS(bfloat16, bfloat16);
LK_MOE_NF4_KERNELS(bfloat16, float);
static const File<GroupedWeightGradient<float, float>> dw_float(kThisIsa, &weight_gradient);
static const File<GroupedWeightGradient<float, float16>> dw_float16(kThisIsa, &weight_gradient);
static const File<GroupedWeightGradient<bfloat16, bfloat16>> dw_bfloat16(kThisIsa, &weight_gradient);

}  // namespace llamakern::LK_ISA
