// NF4 on the CPU: the codec, and the linear from packed bytes.
#include "nf4_stream.h"
#include "nf4_strip.h"

namespace llamakern::LK_ISA {

// ------------------------------------------------------------------------------------------------ codec

// code[i] = thresholds that w[i]·scale exceeds. NaN (0·inf in a block of zeros) exceeds none, as on CUDA.
template <typename T>
static void encode(uint8_t* code, const T* w, float scale, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = load(w + i, lanes_left(n - i)) * scale;
    IVec count = {};
    for (float threshold : kNf4Thresholds) count -= x > broadcast(threshold);
    for (int64_t j = 0; j < lanes_left(n - i); ++j) code[i + j] = uint8_t(count[j]);
  }
}

template <typename T>
static float largest(const T* w, int64_t n) {
  Vec top = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = load(w + i, lanes_left(n - i));
    top = max(max(x, -x), top);
  }
  return max_of(top);
}

template <typename T>
static void nf4_quantize(const Nf4Quantize<T>& p) {
  const int64_t blocks = ceil_div(p.n, p.block_size);
  parallel_ranges(blocks, max64(1, 16384 / p.block_size), [&](int64_t begin, int64_t end) {
    Scratch<uint8_t> code(p.block_size + 1);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block * p.block_size, n = min64(p.block_size, p.n - i);
      p.absmax[block] = largest(p.w + i, n);
      encode(code.get(), p.w + i, 1.0f / p.absmax[block], n);
      code[n] = 0;
      for (int64_t j = 0; j < n; j += 2) p.codes[(i + j) / 2] = uint8_t(code[j] << 4 | code[j + 1]);
    }
  });
}

template <typename T>
static void nf4_dequantize(const Nf4Dequantize<T>& p) {
  constexpr int64_t piece = 4096;  // a whole number of units
  parallel_ranges(p.from.N * p.from.K, piece, [&](int64_t begin, int64_t end) {
    alignas(64) float run[piece];
    decode_run(run, p.from, begin, end - begin);
    for (int64_t i = 0; i < end - begin; i += kLanes)
      store(p.w + begin + i, load(run + i), lanes_left(end - begin - i));
  });
}

static void nf4_double_quantize(const Nf4DoubleQuantize& p) {
  parallel_for(ceil_div(p.n, kAbsmaxBlock), [&](int64_t block) {
    const int64_t begin = block * kAbsmaxBlock, end = min64(p.n, begin + kAbsmaxBlock);
    float top = 0.0f;
    for (int64_t i = begin; i < end; ++i) {
      const float size = std::fabs(p.absmax[i] - *p.offset);
      if (size > top) top = size;
    }
    p.scale[block] = top;
    for (int64_t i = begin; i < end; ++i)
      p.codes[i] = nearest_level(kDynamicMap.value, (p.absmax[i] - *p.offset) * (1.0f / top));
  });
}

// ----------------------------------------------------------------------------------------------- linear

template <typename T>
static void nf4_linear(const Nf4Linear<T>& p) {
  using W = Words<T>;
  const int64_t M = p.M, N = p.w.N, K = p.w.K;
  if (can_stream(p.w, M))
    return with_tokens(M, [&]<int tokens>() {
      stream_linear<W, tokens>(
          p.w, p.x, p.x_row, [](int64_t, int64_t) { return Vec{}; },
          [&](int64_t n, int64_t m, float y) { p.y[m * N + n] = from_float<T>(p.bias ? y + p.bias[n] : y); });
    });
  with_strips(M, [&]<int MV>() {
    const StoreTokens<MV, T> store{p.y, M, N, p.bias};
    Scratch<uint32_t> lanes(packed_groups<W, MV>(M, K));
    if (!in_units(p.w)) {
      pack_rows<W, MV>(lanes, p.x, p.x_row, M, K);
      return gemm<W, MV, Panel::kByRow>(M, N, store, Segment{lanes, words_of<W>(K), Nf4Rows<W>{p.w}});
    }
    pack_rows_groups<W, MV>(lanes, p.x, p.x_row, M, K);
    if (M <= kWidth<MV>) return strip_linear<W, MV>(p.w, lanes, [](float*, int64_t, int64_t) { return false; }, store);
    gemm<W, MV, Panel::kByRow>(M, N, store, Segment{lanes, group_words<W>(K), Nf4Rows<W>{p.w}});
  });
}

template <typename T>
static void nf4_linears(const Nf4Linears<T>& p) {
  bool few = true;
  for (int i = 0; i < p.count; ++i) few = few && can_stream(p.w[i], p.M);
  if (few && p.count > 0)
    return with_tokens(p.M, [&]<int tokens>() {
      stream_linears<Words<T>, tokens>(
          p.w, p.count, p.x, p.x_row, [](int, int64_t, int64_t) { return Vec{}; },
          [&](int i, int64_t n, int64_t m, float y) { p.y[i][m * p.w[i].N + n] = from_float<T>(y); });
    });
  for (int i = 0; i < p.count; ++i)
    nf4_linear(Nf4Linear<T>{.y = p.y[i], .x = p.x, .x_row = p.x_row, .w = p.w[i], .bias = {}, .M = p.M});
}

template <typename T>
static void nf4_linear_backward(const Nf4LinearBackward<T>& p) {
  using W = Words<T>;
  const int64_t M = p.M, N = p.w.N, K = p.w.K;
  with_strips(M, [&]<int MV>() {
    Scratch<uint32_t> lanes(packed_size<W, MV>(M, N));
    pack_rows<W, MV>(lanes, p.dy, p.dy_row, M, N);
    gemm<W, MV, Panel::kByWord>(M, K, StoreTokens<MV, T>{p.dx, M, K, {}},
                                Segment{lanes, words_of<W>(N), Nf4Columns<W>{p.w}});
  });
}

LK_KERNEL(Nf4Quantize<float>, nf4_quantize<float>);
LK_KERNEL(Nf4Quantize<bfloat16>, nf4_quantize<bfloat16>);
LK_KERNEL(Nf4Quantize<float16>, nf4_quantize<float16>);
LK_KERNEL(Nf4Dequantize<float>, nf4_dequantize<float>);
LK_KERNEL(Nf4Dequantize<bfloat16>, nf4_dequantize<bfloat16>);
LK_KERNEL(Nf4Dequantize<float16>, nf4_dequantize<float16>);
LK_KERNEL(Nf4DoubleQuantize, nf4_double_quantize);
LK_KERNEL(Nf4Linear<float>, nf4_linear<float>);
LK_KERNEL(Nf4Linear<bfloat16>, nf4_linear<bfloat16>);
LK_KERNEL(Nf4Linear<float16>, nf4_linear<float16>);
LK_KERNEL(Nf4Linears<float>, nf4_linears<float>);
LK_KERNEL(Nf4Linears<bfloat16>, nf4_linears<bfloat16>);
LK_KERNEL(Nf4Linears<float16>, nf4_linears<float16>);
LK_KERNEL(Nf4LinearBackward<float>, nf4_linear_backward<float>);
LK_KERNEL(Nf4LinearBackward<bfloat16>, nf4_linear_backward<bfloat16>);
LK_KERNEL(Nf4LinearBackward<float16>, nf4_linear_backward<float16>);

}  // namespace llamakern::LK_ISA
