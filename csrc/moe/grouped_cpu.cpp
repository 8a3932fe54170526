// The experts' linears on the CPU, forward. An NF4 expert of few tokens streams or takes one strip, as the nf4 room
// does.
#include "../common/pages.h"
#include "../lora/adapter.h"
#include "../nf4/nf4_stream.h"
#include "../nf4/nf4_strip.h"
#include "dense_columns.h"
#include "grouped.h"

namespace llamakern::LK_ISA {

// ---------------------------------------------------------------------------------------------- forward

// How the tokens of one expert meet its weight, decided by their number alone.
enum class Way { kNone, kFew, kStrip, kPanels };

inline Way way_of(const Nf4Experts& w, int64_t count) {
  if (count == 0) return Way::kNone;
  if (can_stream(w.first, count)) return Way::kFew;
  return in_units(w.first) && count <= strip_width(count) ? Way::kStrip : Way::kPanels;
}
template <typename V>
Way way_of(const DenseExperts<V>&, int64_t count) {
  return count == 0 ? Way::kNone : count <= kFewTokens ? Way::kFew : Way::kPanels;
}

// y = x Wᵀ + scale·h Bᵀ over every expert, h = x Aᵀ: LoRA begins the sums of few tokens, else it is one more segment.
template <typename T, typename Experts, typename P>
struct GroupedForward {
  using W = Words<T>;
  static constexpr bool kNf4 = std::is_same_v<Experts, Nf4Experts>;
  const GroupedLinear<T, Experts, P>& p;
  const Share *shares, *strips;  // `at` in words of `lanes`, and in lanes of `h_lanes`
  uint32_t *lanes, *h_lanes;

  static bool units(const Experts& w) {
    if constexpr (kNf4) return in_units(w.first);
    return false;
  }
  // Words of a token's lanes where they lie in strips.
  static int64_t words(const Experts& w, int64_t K) { return units(w) ? group_words<W>(K) : words_of<W>(K); }

  static int64_t lane_words(const Experts& w, int64_t count, int64_t K) {
    int64_t size = strip_lanes(count) * words(w, K);
    if (way_of(w, count) != Way::kFew) return size;
    if constexpr (kNf4) {
      with_tokens(count, [&]<int M>() { size = stream_size<W, M>(K); });
    } else {
      const Few few = Few::of(count, K, W());
      size = w.transposed ? columns_size<W>(few, K) : few.places * round_up(words_of<W>(K), kLanes);
    }
    return size;
  }

  Way way(int64_t e) const { return way_of(p.w, shares[e].count); }
  const T* x(int64_t e) const { return p.x + shares[e].begin * p.x_row; }
  float* h(int64_t e) const { return p.h + shares[e].begin * p.lora.R; }

  void pack() const {
    const auto tasks = [&](int64_t e) {
      const int64_t count = shares[e].count;
      return way(e) == Way::kFew ? 1 : ceil_div(count, strip_width(count));
    };
    for_experts(p.E, tasks, [&](int64_t e, int64_t strip) {
      const int64_t count = shares[e].count, K = p.K;
      uint32_t* out = lanes + shares[e].at;
      if (way(e) == Way::kFew) return pack_few(out, e);
      with_strips(count, [&]<int MV>() {
        const int64_t m = strip * kWidth<MV>;
        out += m * words(p.w, K);
        if (units(p.w))
          pack_groups<W, MV>(out, x(e) + m * p.x_row, p.x_row, count - m, K);
        else
          pack_strip<W, MV>(out, x(e) + m * p.x_row, p.x_row, count - m, K);
      });
    });
  }

  // h = x Aᵀ: by plain dots for few tokens.
  void down() const {
    constexpr int64_t some = 4;  // rows of A in a task
    const int64_t K = p.K, R = p.lora.R;
    const auto tasks = [&](int64_t e) {
      int64_t count = way(e) == Way::kFew ? ceil_div(R, some) : 0;
      if (way(e) == Way::kStrip || way(e) == Way::kPanels)
        with_strips(shares[e].count, [&]<int MV>() { count = Plan<MV, Panel::kByRow>(shares[e].count, R).tasks(); });
      return count;
    };
    for_experts(p.E, tasks, [&](int64_t e, int64_t task) {
      const P* a = p.lora.a + e * R * K;
      if (way(e) == Way::kFew) {
        for (int64_t r = task * some; r < min64(R, (task + 1) * some); ++r)
          for (int64_t m = 0; m < shares[e].count; ++m) h(e)[m * R + r] = dot(x(e) + m * p.x_row, a + r * K, K);
        return;
      }
      with_strips(shares[e].count, [&]<int MV>() {
        const Plan<MV, Panel::kByRow> plan(shares[e].count, R);
        const StoreNarrow<W, MV> store{h(e),        h_lanes + strips[e].at * words_of<W>(R), shares[e].count, R, 1.0f,
                                       p.lora.scale};
        const uint32_t* from = lanes + shares[e].at;
        if (units(p.w))
          gemm_task<W, MV, Panel::kByRow>(plan, task, store, Segment{from, words(p.w, K), GroupRows<W, P>{a, K}});
        else
          gemm_task<W, MV, Panel::kByRow>(plan, task, store, Segment{from, words(p.w, K), DenseRows<W, P>{a, K, K}});
      });
    });
  }

  void up() const {
    const auto tasks = [&](int64_t e) {
      int64_t tasks = 0;
      if constexpr (kNf4) {
        if (way(e) == Way::kFew) with_tokens(shares[e].count, [&]<int M>() { tasks = stream_tasks<M>(p.w.first); });
        if (way(e) == Way::kStrip) tasks = strip_tasks(p.w.first);
      } else if (way(e) == Way::kFew) {
        tasks = p.w.transposed ? columns_tasks(p.N) : few_tasks(p.N);
      }
      if (way(e) == Way::kPanels)
        with_strips(shares[e].count, [&]<int MV>() {
          const int64_t count = shares[e].count;
          tasks = is_transposed(p.w) ? Plan<MV, Panel::kByWord>(count, p.N).tasks()
                                     : Plan<MV, Panel::kByRow>(count, p.N).tasks();
        });
      return tasks;
    };
    for_experts(p.E, tasks, [&](int64_t e, int64_t task) {
      if (way(e) == Way::kFew)
        few(e, task);
      else
        with_strips(shares[e].count, [&]<int MV>() { many<MV>(e, task); });
    });
  }

 private:
  void pack_few(uint32_t* out, int64_t e) const {
    const int64_t count = shares[e].count, K = p.K;
    if constexpr (kNf4)
      with_tokens(count, [&]<int M>() { order_tokens<W, M>(out, x(e), p.x_row, K); });
    else if (p.w.transposed)
      order_words<W>(out, Few::of(count, K, W()), x(e), p.x_row, K);
    else
      order_few<W>(out, Few::of(count, K, W()), x(e), p.x_row, K);
  }

  void few(int64_t e, int64_t task) const {
    const int64_t N = p.N, K = p.K, R = p.lora.R, count = shares[e].count;
    const P* b = p.lora.b + e * N * R;
    const float* h_e = h(e);
    T* y = p.y + shares[e].begin * N;
    float scale = p.lora.scale;
    if constexpr (kNf4) scale *= Codes<W>::kScale;
    const auto adapter = [&](int64_t n, int64_t m) {
      Vec sum = {};
      for_vectors(
          R, [&](int64_t r, auto left) { sum = fma(load(h_e + m * R + r, left), load(b + n * R + r, left), sum); });
      return sum * scale;
    };
    const auto finish = [&](int64_t n, int64_t m, auto value, auto... there) {
      if constexpr (kNf4)
        y[m * N + n] = from_float<T>(value);
      else
        store(y + m * N + n, value, there...);
    };
    const uint32_t* from = lanes + shares[e].at;
    if constexpr (kNf4) {
      with_tokens(count, [&]<int M>() { stream_task<W, M>(p.w[e], from, adapter, finish, task); });
    } else {
      const Few few = Few::of(count, K, W());
      const auto* w = p.w.w + e * N * K;
      if (!p.w.transposed) return few_task<W>(few, w, N, K, from, adapter, finish, task);
      const auto begin = [&](float* c, int64_t column, int64_t columns) {
        for (int64_t m = 0; m < (R ? count : 0); ++m)
          for (int64_t n = 0; n < columns; ++n) c[m * kFewColumns + n] = sum(adapter(column + n, m));
      };
      const auto store = [&](const float* c, int64_t column, int64_t columns) {
        store_rows(y + column, N, c, kFewColumns, count, columns, [](Vec sum) { return sum; });
      };
      columns_task<W>(few, N, task, begin, store, ColumnPart{from, w, K, N});
    }
  }

  template <int MV>
  void many(int64_t e, int64_t task) const {
    const int64_t N = p.N, K = p.K, R = p.lora.R, count = shares[e].count;
    const Lora<P> lora{p.lora.a + e * R * K, p.lora.b + e * N * R, R, p.lora.scale, {}};
    const StoreTokens<MV, T> store{p.y + shares[e].begin * N, count, N, {}};
    const uint32_t *from = lanes + shares[e].at, *h_e = h_lanes + strips[e].at * words_of<W>(R);
    const Plan<MV, Panel::kByRow> plan(count, N);
    const Segment adapter{h_e, words_of<W>(R), DenseRows<W, P>{lora.b, R, R}};
    if constexpr (kNf4) {
      if (way(e) == Way::kStrip)
        return strip_task<W, MV>(p.w[e], from, BeginWithAdapter<W, MV, P>{h_e, lora}, store, task);
      gemm_task<W, MV, Panel::kByRow>(plan, task, store, adapter, Segment{from, words(p.w, K), Nf4Rows<W>{p.w[e]}});
    } else {
      using V = std::remove_cvref_t<decltype(*p.w.w)>;
      const V* w = p.w.w + e * N * K;
      if (p.w.transposed)
        return gemm_task<W, MV, Panel::kByWord>(Plan<MV, Panel::kByWord>(count, N), task, store,
                                                Segment{h_e, words_of<W>(R), GatheredRows<W, P>{lora.b, R}},
                                                Segment{from, words(p.w, K), DenseColumns<W, V>{w, N, K}});
      gemm_task<W, MV, Panel::kByRow>(plan, task, store, adapter,
                                      Segment{from, words(p.w, K), DenseRows<W, V>{w, K, K}});
    }
  }
};

template <typename T, typename Experts, typename P>
static void linear(const GroupedLinear<T, Experts, P>& p) {
  using Forward = GroupedForward<T, Experts, P>;
  expect_large_pages(p.y, size_t(p.S * p.N) * sizeof(T));
  Scratch<Share> shares(p.E + 1), strips(p.E + 1);
  share_out(shares.get(), p.offsets, p.E, [&](int64_t count) { return Forward::lane_words(p.w, count, p.K); });
  share_out(strips.get(), p.offsets, p.E, strip_lanes);
  Scratch<uint32_t> lanes(shares.get()[p.E].at), h_lanes(strips.get()[p.E].at * words_of<Words<T>>(p.lora.R));
  const Forward forward{p, shares, strips, lanes, h_lanes};
  forward.pack();
  if (p.lora.R) forward.down();
  forward.up();
}

#define LK_MOE_KERNELS(T, V, P) \
  static const File<GroupedLinear<T, DenseExperts<V>, P>> dense_##T##V##P(kThisIsa, &linear)
LK_MOE_KERNELS(float, float, float);
LK_MOE_KERNELS(float, float16, float);
LK_MOE_KERNELS(bfloat16, bfloat16, bfloat16);
LK_MOE_KERNELS(bfloat16, bfloat16, float);
#define LK_MOE_NF4_KERNELS(T, P) static const File<GroupedLinear<T, Nf4Experts, P>> nf4_##T##P(kThisIsa, &linear)
LK_MOE_NF4_KERNELS(float, float);
LK_MOE_NF4_KERNELS(bfloat16, bfloat16);
LK_MOE_NF4_KERNELS(bfloat16, float);

}  // namespace llamakern::LK_ISA
