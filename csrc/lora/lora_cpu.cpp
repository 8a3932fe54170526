// LoRA on the CPU: the adapter is one more segment of the base's matmul; over few tokens it begins the base's sums.
#include "lora.h"

#include "../nf4/nf4_stream.h"
#include "../nf4/nf4_strip.h"
#include "adapter.h"

namespace llamakern::LK_ISA {

// ---------------------------------------------------------------------------------------------- dropout

using UVec = uint32_t __attribute__((vector_size(4 * kLanes)));

inline UVec ubroadcast(uint32_t x) { return x - UVec{}; }
inline UVec counting(int64_t k) {
  UVec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = uint32_t(k + i);
  return v;
}

// Elements k ... of row m, those that are dropped set to 0. The factor 1 / (1 - p) is applied to sums of them.
inline Vec dropped(Vec x, const Dropout& drop, uint64_t keys, int64_t k) {
  const UVec draw = dropout_draw(counting(k), ubroadcast(uint32_t(keys)), ubroadcast(uint32_t(keys >> 32)));
  return draw >= drop.threshold ? x : Vec{};
}

// The words of K in the lanes of x and the rows of A.
enum class Order { kPlain, kGroups };

// Panel.kByWord over rows k: column k of drop(x).
template <typename W, typename T>
struct DroppedColumns {
  const T* x;
  int64_t ld, M;
  Dropout drop;

  void operator()(uint32_t* out, int64_t word, int64_t k, int64_t count) const {
    const int64_t m = word * W::kPer;
    const bool pair = W::kPer == 2 && m + 1 < M;
    const uint64_t keys = drop.row_keys(m), next_keys = drop.row_keys(m + 1);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int there = lanes_left(count - i);
      const Vec first = dropped(load(x + m * ld + k + i, there), drop, keys, k + i);
      const Vec second = pair ? dropped(load(x + (m + 1) * ld + k + i, there), drop, next_keys, k + i) : Vec{};
      store_words(out + i, W::join(first, second));
    }
  }
};

// Lane m of the strips is row m of drop(x).
template <typename W, int MV, Order kOrder, typename T>
static void pack_dropped(uint32_t* out, const T* x, int64_t ld, int64_t M, int64_t K, const Dropout& drop) {
  constexpr int64_t width = kWidth<MV>;
  parallel_for(ceil_div(M, width), [&](int64_t strip) {
    const int64_t rows = min64(M - strip * width, width);
    Scratch<T> kept(rows * K);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t m = strip * width + i;
      const uint64_t keys = drop.row_keys(m);
      for (int64_t k = 0; k < K; k += kLanes) {
        const int there = lanes_left(K - k);
        store(kept + i * K + k, dropped(load(x + m * ld + k, there), drop, keys, k), there);
      }
    }
    if constexpr (kOrder == Order::kGroups)
      pack_groups<W, MV>(out + strip * width * group_words<W>(K), kept.get(), K, rows, K);
    else
      pack_strip<W, MV>(out + strip * width * words_of<W>(K), kept.get(), K, rows, K);
  });
}

// C [k][lane m] of g A, masked like x.
template <int MV>
struct DropC {
  Dropout drop;

  void operator()(float* c, int64_t strip, int64_t k, int64_t rows) const {
    if (!drop.seed) return;
    constexpr int64_t width = kWidth<MV>;
    alignas(64) uint32_t key[width], offset[width];
    for (int64_t i = 0; i < width; ++i) {
      const uint64_t keys = drop.row_keys(strip * width + i);
      key[i] = uint32_t(keys);
      offset[i] = uint32_t(keys >> 32);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t lane = 0; lane < width; lane += kLanes) {
        const UVec draw =
            dropout_draw(ubroadcast(uint32_t(k + row)), (UVec)load_words(key + lane), (UVec)load_words(offset + lane));
        float* here = c + row * width + lane;
        store(here, draw >= drop.threshold ? load(here) : Vec{});
      }
  }
};

// ------------------------------------------------------------------------------------- the narrow matmuls

// h = x Aᵀ of one strip: it packs x too, as each piece of the reduction comes by.
template <typename W, int MV, typename T, typename P>
static void strip_down(float* h, uint32_t* h_lanes, uint32_t* lanes, const T* x, int64_t x_row, const Lora<P>& lora,
                       int64_t M, int64_t K) {
  constexpr int64_t width = kWidth<MV>, tile_rows = kRows<MV>, piece = 4 * kGroup, depth = piece / W::kPer;
  const int64_t rows = round_up(lora.R, tile_rows), pieces = ceil_div(K, piece);
  Scratch<float> parts(max64(pieces, 1) * rows * width);
  float* part = parts;
  memset(part, 0, size_t(rows * width) * 4);
  const GroupRows<W, P> a{lora.a, K};
  parallel_for(pieces, [&](int64_t task) {
    const int64_t k = task * piece, words = group_words<W>(min64(K - k, piece));
    uint32_t* here = lanes + k / W::kPer * width;
    pack_groups<W, MV>(here, x + k, x_row, M, min64(K - k, piece));
    Scratch<uint32_t> panel(tile_rows * depth);
    for (int64_t row = 0; row < lora.R; row += tile_rows) {
      for (int64_t r = 0; r < tile_rows; ++r)  // a row that does not exist repeats the last
        a(panel + r * depth, min64(row + r, lora.R - 1), k / W::kPer, words);
      float* c = part + (task * rows + row) * width;
      tile<W, MV, tile_rows, depth, 1>(c, width, false, here, width, panel, words);
    }
  });
  for (int64_t i = 0; i < rows * width; i += kLanes) {
    Vec total = load(part + i);
    for (int64_t task = 1; task < pieces; ++task) total += load(part + task * rows * width + i);
    store(part + i, total);
  }
  StoreNarrow<W, MV>{h, h_lanes, M, lora.R, 1.0f, lora.scale}(part, 0, 0, lora.R);
}

// h = drop(x) Aᵀ. `lanes` holds x as packed, in kOrder.
template <typename W, int MV, Order kOrder, typename T, typename P>
static void down(float* h, uint32_t* h_lanes, const uint32_t* lanes, const T* x, int64_t x_row, const Lora<P>& lora,
                 int64_t M, int64_t K) {
  const float keep = lora.drop.keep_scale;
  const StoreNarrow<W, MV> store{h, h_lanes, M, lora.R, keep, keep * lora.scale};
  Scratch<uint32_t> kept(lora.drop.seed ? packed_groups<W, MV>(M, K) : 0);
  if (lora.drop.seed) {
    pack_dropped<W, MV, kOrder>(kept, x, x_row, M, K, lora.drop);
    lanes = kept;
  }
  if constexpr (kOrder == Order::kGroups)
    gemm<W, MV, Panel::kByRow>(M, lora.R, store, Segment{lanes, group_words<W>(K), GroupRows<W, P>{lora.a, K}});
  else
    gemm<W, MV, Panel::kByRow>(M, lora.R, store, Segment{lanes, words_of<W>(K), DenseRows<W, P>{lora.a, K, K}});
}

// ---------------------------------------------------------------------------------------------- forward

// y = base + s·h Bᵀ; where the second term is 0 the base's bits stay, -0 included.
template <int MV, typename T, typename P>
struct AddTokens {
  const LoraLinear<T, P>& p;

  void operator()(const float* c, int64_t strip, int64_t n, int64_t rows) const {
    const int64_t m = strip * kWidth<MV>;
    unpack_lanes(p.y + m * p.N + n, p.N, c, kWidth<MV>, rows, min64(p.M - m, kWidth<MV>),
                 [&](int64_t row, int64_t lane, Vec sum) {
                   const int there = lanes_left(rows - row);
                   const Vec b = load(p.base + (m + lane) * p.N + n + row, there);
                   return sum == Vec{} ? b : wide(b, m + lane, n + row, there) + sum;
                 });
  }

 private:
  // base[m][n ...], of which `there` elements exist; those that float16 could not hold are computed again.
  Vec wide(Vec b, int64_t m, int64_t n, int there) const {
    if constexpr (std::is_same_v<T, float16>)
      if (any((b == INFINITY) | (b == -INFINITY)))
        for (int i = 0; i < there; ++i)
          if (std::isinf(b[i]))
            b[i] = dot(p.x + m * p.x_row, p.w + (n + i) * p.K, p.K) + (p.bias ? p.bias[n + i] : 0.0f);
    return b;
  }
};

template <typename T, typename P>
static void lora_linear(const LoraLinear<T, P>& p) {
  using W = Words<T>;
  const int64_t M = p.M, R = p.lora.R;
  with_strips(M, [&]<int MV>() {
    Scratch<uint32_t> lanes(packed_size<W, MV>(M, p.K)), h_lanes(packed_size<W, MV>(M, R));
    if (!p.base || !p.lora.drop.seed) pack_rows<W, MV>(lanes, p.x, p.x_row, M, p.K);
    down<W, MV, Order::kPlain>(p.h, h_lanes, lanes, p.x, p.x_row, p.lora, M, p.K);
    const Segment adapter{h_lanes, words_of<W>(R), DenseRows<W, P>{p.lora.b, R, R}};
    if (p.base)
      gemm<W, MV, Panel::kByRow>(M, p.N, AddTokens<MV, T, P>{p}, adapter);
    else
      gemm<W, MV, Panel::kByRow>(M, p.N, StoreTokens<MV, T>{p.y, M, p.N, p.bias}, adapter,
                                 Segment{lanes, words_of<W>(p.K), DenseRows<W, T>{p.w, p.K, p.K}});
  });
}

// h [M][R] of a few tokens by plain dots.
template <typename T, typename P>
static void few_down(float* h, const T* x, int64_t x_row, const Lora<P>& lora, int64_t M, int64_t K) {
  const Dropout& drop = lora.drop;
  Scratch<float> kept(M * K);
  for (int64_t m = 0; m < M; ++m)
    for_vectors(K, [&](int64_t k, auto n) {
      const Vec row = load(x + m * x_row + k, n);
      store(kept + m * K + k, drop.seed ? dropped(row, drop, drop.row_keys(m), k) : row, n);
    });
  const float* rows = kept;
  parallel_ranges(lora.R, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t m = 0; m < M; ++m) h[m * lora.R + r] = dot(rows + m * K, lora.a + r * K, K) * drop.keep_scale;
  });
}

// A few tokens: the adapter's term begins each sum of the stream.
template <typename T, typename P>
static void stream_nf4_lora(const Nf4LoraLinear<T, P>& p) {
  using W = Words<T>;
  const int64_t M = p.M, N = p.w.N, R = p.lora.R, padded = round_up(R, kLanes);
  few_down(p.h, p.x, p.x_row, p.lora, M, p.w.K);
  Scratch<float> scaled(M * padded);
  for (int64_t i = 0; i < M * padded; ++i) {
    const int64_t m = i / padded, r = i % padded;
    scaled[i] = r < R ? p.h[m * R + r] * (p.lora.scale * Codes<W>::kScale) : 0.0f;
  }
  const float* h = scaled;
  with_tokens(M, [&]<int tokens>() {
    stream_linear<W, tokens>(
        p.w, p.x, p.x_row,
        [&](int64_t n, int64_t m) {
          Vec sum = {};
          for_vectors(R, [&](int64_t r, auto n_left) {
            sum = fma(load(h + m * padded + r), load(p.lora.b + n * R + r, n_left), sum);
          });
          return sum;
        },
        [&](int64_t n, int64_t m, float y) { p.y[m * N + n] = from_float<T>(p.bias ? y + p.bias[n] : y); });
  });
}

template <typename T, typename P>
static void nf4_lora_linear(const Nf4LoraLinear<T, P>& p) {
  using W = Words<T>;
  const int64_t M = p.M, N = p.w.N, K = p.w.K, R = p.lora.R;
  if (can_stream(p.w, M)) return stream_nf4_lora(p);
  with_strips(M, [&]<int MV>() {
    Scratch<uint32_t> lanes(packed_groups<W, MV>(M, K)), h_lanes(packed_size<W, MV>(M, R));
    const StoreTokens<MV, T> store{p.y, M, N, p.bias};
    const Segment adapter{h_lanes, words_of<W>(R), DenseRows<W, P>{p.lora.b, R, R}};
    if (!in_units(p.w)) {
      pack_rows<W, MV>(lanes, p.x, p.x_row, M, K);
      down<W, MV, Order::kPlain>(p.h, h_lanes, lanes, p.x, p.x_row, p.lora, M, K);
      return gemm<W, MV, Panel::kByRow>(M, N, store, adapter, Segment{lanes, words_of<W>(K), Nf4Rows<W>{p.w}});
    }
    const bool strip = M <= kWidth<MV>;
    if (strip && !p.lora.drop.seed) {
      strip_down<W, MV>(p.h, h_lanes, lanes, p.x, p.x_row, p.lora, M, K);
    } else {
      pack_rows_groups<W, MV>(lanes, p.x, p.x_row, M, K);
      down<W, MV, Order::kGroups>(p.h, h_lanes, lanes, p.x, p.x_row, p.lora, M, K);
    }
    if (strip) return strip_linear<W, MV>(p.w, lanes, BeginWithAdapter<W, MV, P>{h_lanes, p.lora}, store);
    gemm<W, MV, Panel::kByRow>(M, N, store, adapter, Segment{lanes, group_words<W>(K), Nf4Rows<W>{p.w}});
  });
}

// --------------------------------------------------------------------------------------------- backward

// dA [R][K] = scale·gᵀ drop(x) and dB [N][R] = scale·dyᵀ h: lanes are the R columns of g or h, rows the columns of x or
// dy.
template <typename T, typename P>
static void adapter_gradients(const AdapterBackward<T, P>& p, const float* g) {
  using W = Words<T>;
  const int64_t M = p.M, N = p.N, K = p.K, R = p.lora.R;
  const Dropout& drop = p.lora.drop;
  with_strips(R, [&]<int MV>() {
    constexpr int64_t width = kWidth<MV>;
    Scratch<uint32_t> lanes(packed_size<W, MV>(R, M));
    const int64_t words = words_of<W>(M);

    pack_columns<W, MV>(lanes, p.h, R, R, M);
    const auto store_db = [&](const float* c, int64_t strip, int64_t n, int64_t rows) {
      const int64_t r = strip * width;
      store_rows(p.db + n * R + r, R, c, width, rows, min64(R - r, width), [&](Vec sum) { return sum * p.lora.scale; });
    };
    gemm<W, MV, Panel::kByWord>(R, N, store_db, Segment{lanes, words, DenseColumns<W, T>{p.dy, p.dy_row, M}});

    pack_columns<W, MV>(lanes, g, R, R, M);
    const float scale = p.lora.scale * drop.keep_scale;
    const auto store_da = [&](const float* c, int64_t strip, int64_t k, int64_t rows) {
      const int64_t r = strip * width;
      unpack_lanes(p.da + r * K + k, K, c, width, rows, min64(R - r, width),
                   [&](int64_t, int64_t, Vec sum) { return sum * scale; });
    };
    if (drop.seed)
      gemm<W, MV, Panel::kByWord>(R, K, store_da, Segment{lanes, words, DroppedColumns<W, T>{p.x, p.x_row, M, drop}});
    else
      gemm<W, MV, Panel::kByWord>(R, K, store_da, Segment{lanes, words, DenseColumns<W, T>{p.x, p.x_row, M}});
  });
}

// g = dy B, then dx = drop(s·g A) + dy W with the columns of W from `w`, then dA and dB.
template <typename T, typename P, typename Columns>
static void backward(T* dx, const Columns& w, const AdapterBackward<T, P>& p) {
  using W = Words<T>;
  const int64_t M = p.M, N = p.N, K = p.K, R = p.lora.R;
  Scratch<float> g(M * R);
  with_strips(M, [&]<int MV>() {
    Scratch<uint32_t> lanes(packed_size<W, MV>(M, N)), g_lanes(packed_size<W, MV>(M, R));
    pack_rows<W, MV>(lanes, p.dy, p.dy_row, M, N);
    const float scale = p.lora.scale * p.lora.drop.keep_scale;
    gemm<W, MV, Panel::kByWord>(M, R, StoreNarrow<W, MV>{g, g_lanes, M, R, 1.0f, scale},
                                Segment{lanes, words_of<W>(N), DenseColumns<W, P>{p.lora.b, R, N}});
    if (!dx) return;
    gemm<W, MV, Panel::kByWord>(
        M, K, StoreTokens<MV, T>{dx, M, K, {}},
        Segment{g_lanes, words_of<W>(R), DenseColumns<W, P>{p.lora.a, K, R}, DropC<MV>{p.lora.drop}},
        Segment{lanes, words_of<W>(N), w});
  });
  adapter_gradients(p, g.get());
}

template <typename T, typename P>
static void lora_linear_backward(const LoraLinearBackward<T, P>& p) {
  backward(p.dx, DenseColumns<Words<T>, T>{p.w, p.adapter.K, p.adapter.N}, p.adapter);
}

template <typename T, typename P>
static void nf4_lora_linear_backward(const Nf4LoraLinearBackward<T, P>& p) {
  backward(p.dx, Nf4Columns<Words<T>>{p.w}, p.adapter);
}

#define LK_LORA_KERNELS(T, P)                                                                    \
  static const File<LoraLinear<T, P>> lora_##T##_##P(kThisIsa, &lora_linear);                    \
  static const File<Nf4LoraLinear<T, P>> nf4_lora_##T##_##P(kThisIsa, &nf4_lora_linear);         \
  static const File<LoraLinearBackward<T, P>> lora_b_##T##_##P(kThisIsa, &lora_linear_backward); \
  static const File<Nf4LoraLinearBackward<T, P>> nf4_lora_b_##T##_##P(kThisIsa, &nf4_lora_linear_backward)
LK_LORA_KERNELS(float, float);
LK_LORA_KERNELS(bfloat16, bfloat16);
LK_LORA_KERNELS(bfloat16, float);
LK_LORA_KERNELS(float16, float16);
LK_LORA_KERNELS(float16, float);

}  // namespace llamakern::LK_ISA
