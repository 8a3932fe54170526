#include "prompt.h"

#include "../common/parallel.h"

namespace llamakern::LK_ISA {
namespace {

// scale = sign(scale)·|scale|, the first part exact; the other one for powers of two.
inline float sign(float scale) { return std::copysign(1.0f, scale); }
inline float power(float scale) { return std::fabs(scale) * kLog2e; }

// out [round_up(P, kTileRows), kStrip] = factor·⟨row p, lane⟩
template <typename W>
__attribute__((noinline)) void dot_prompts(float* out, const uint32_t* lanes, const uint32_t* rows, int64_t P,
                                           int64_t words, float factor) {
  const int64_t ld = round_up(words, kLanes);
  for (int64_t j = 0; j < P; j += kTileRows, out += kTileRows * kStrip, rows += kTileRows * ld) {
    Tile c = {};
    dot_rows<W, 0>(c, lanes, rows, words);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) store(out + r * kStrip + v * kLanes, c[r][v] * factor);
  }
}

// s [P, kStrip] of kLanes lanes becomes 2^(scale (s - max s)); returns their sum. The scale is taken of differences: a
// product with it would round scores of many thousands.
Vec weigh(float* s, int64_t P, float scale) {
  Vec top = broadcast(-INFINITY), total{};
  for (int64_t j = 0; j < P; ++j) top = max(top, load(s + j * kStrip));
  for (int64_t j = 0; j < P; ++j) {
    const Vec x = exp2((load(s + j * kStrip) - top) * scale);
    store(s + j * kStrip, x);
    total += x;
  }
  return total;
}

// out [ceil(P / kPer), kStrip] = x [P, kStrip] as words along the prompts.
template <typename W>
void join_prompts(uint32_t* out, const float* x, int64_t P) {
  for (int64_t j = 0; j < P; j += W::kPer, out += kStrip)
    for (int i = 0; i < kStrip; i += kLanes)
      store_words(out + i,
                  W::join(load(x + j * kStrip + i), j + 1 < P ? load(x + (j + W::kPer - 1) * kStrip + i) : Vec{}));
}

// The gate of each lane.
template <typename T>
struct LaneGates {
  alignas(64) float of[kStrip];

  LaneGates(const Group<T>& group, const Strip& strip) {
    for (int lane = 0; lane < kStrip; ++lane) of[lane] = group.in.prompts.gate[strip.head[lane]];
  }
};

// sums [rows, channels in chunks] += weights [rows, kBandWords] · x, chunks of [kBandWords, channels].
template <typename W>
void add_band(float* sums, const uint32_t* weights, const uint32_t* x, int64_t rows, int64_t D, int64_t words) {
  for_chunks(D, [&]<int MV>(int64_t c) {
    for (int64_t j = 0; j < rows; j += kTileRows)
      tile<W, MV, kTileRows, kBandWords, 1>(sums + c * rows + j * MV * kLanes, MV * kLanes, true, x + c * kBandWords,
                                            MV * kLanes, weights + j * kBandWords, words);
  });
}

// Row j of `x` as words along the lanes of strip i of a band.
template <typename W>
void store_lanes(uint32_t* band, int i, const float* x, int64_t P) {
  using Element = std::conditional_t<W::kPer == 2, bfloat16, float>;
  for (int64_t j = 0; j < P; ++j)
    for (int lane = 0; lane < kStrip; lane += kLanes)
      store(reinterpret_cast<Element*>(band + j * kBandWords + i * kRowWords<W>) + lane, load(x + j * kStrip + lane));
}

// Working memory for the prompts of one band: g·a and ds of a strip, and of all strips as rows.
template <typename W>
struct Room {
  int64_t rows;
  Scratch<float> a, ds;               // [rows, kStrip]
  Scratch<uint32_t> a_rows, ds_rows;  // [rows, kBandWords]
  Scratch<uint32_t> ds_lanes;         // [words along the prompts, kStrip]

  explicit Room(int64_t P)
      : rows(PromptSums::chunk_rows(P)),
        a(rows * kStrip),
        ds(rows * kStrip),
        a_rows(rows * kBandWords),
        ds_rows(rows * kBandWords),
        ds_lanes(rows * kStrip) {
    memset(a_rows, 0, size_t(rows * kBandWords) * 4);
    memset(ds_rows, 0, size_t(rows * kBandWords) * 4);
  }
};

// Strip i of a band: its dq, what its lanes give to dg, and its rows of g·a and ds.
template <typename T>
void strip_backward(Room<Words<T>>& room, float* dgate, const typename PackedPrompts<T>::Head& prompt,
                    const Group<T>& group, const Strip& strip, const StripData<Words<T>>& s, int i) {
  using W = Words<T>;
  const int64_t P = group.in.prompts.P, D = group.in.D, words = ceil_div(D, W::kPer);
  const LaneGates<T> gates(group, strip);
  alignas(64) float o[kStrip];
  dot_prompts<W>(room.a, s.q, prompt.k, P, words, sign(group.in.scale));
  dot_prompts<W>(room.ds, s.dy, prompt.v, P, words, 1.0f);
  for (int lane = 0; lane < kStrip; lane += kLanes) {
    float *a = room.a + lane, *ds = room.ds + lane;  // da, then ds
    const Vec inverse = 1.0f / weigh(a, P, power(group.in.scale)), gate = load(gates.of + lane);
    Vec sum{};
    for (int64_t j = 0; j < P; ++j) sum = fma(load(a + j * kStrip) * inverse, load(ds + j * kStrip), sum);
    for (int64_t j = 0; j < P; ++j) {
      const Vec ga = gate * (load(a + j * kStrip) * inverse);
      store(a + j * kStrip, ga);
      store(ds + j * kStrip, ga * (load(ds + j * kStrip) - sum));
    }
    store(o + lane, sum);
    store(s.minus_delta + lane, fma(gate, sum, load(s.minus_delta + lane)));
  }
  for (int lane = 0; lane < strip.lanes; ++lane) dgate[strip.head[lane] - group.kv * group.in.G()] += o[lane];
  store_lanes<W>(room.a_rows, i, room.a, P);
  store_lanes<W>(room.ds_rows, i, room.ds, P);
  join_prompts<W>(room.ds_lanes, room.ds, P);
  for_channels(D, [&]<int NR>(int64_t c) {
    tile<W, kTileVecs, NR, 1, kPanel>(s.dq + c * kStrip, kStrip, true, room.ds_lanes, kStrip,
                                      prompt.k_pairs + pair_panel(c, 0, ceil_div(P, W::kPer)), ceil_div(P, W::kPer));
  });
}

}  // namespace

template <typename T>
PackedPrompts<T>::PackedPrompts(const Attended<T>& in, Pass pass)
    : B_(in.prompts.B),
      Hkv_(in.Hkv),
      rows_(round_up(in.prompts.P, kTileRows) * row_words<W>(in.D)),
      panels_(pair_panels_size(in.D, ceil_div(in.prompts.P, W::kPer))),
      size_(rows_ + max64(rows_, panels_) + (pass == Pass::kBackward ? panels_ : 0)),
      room_(B_ * Hkv_ * size_) {
  const int64_t P = in.prompts.P, D = in.D, words = ceil_div(P, W::kPer);
  parallel_for(B_ * Hkv_, [&](int64_t n) {
    const Head to = head(n / Hkv_, n % Hkv_);
    const T *k = in.prompts.k.at(n / Hkv_, 0, n % Hkv_), *v = in.prompts.v.at(n / Hkv_, 0, n % Hkv_);
    pack_rows<W>(to.k, k, in.prompts.k.token, P, D);
    if (pass == Pass::kForward) return pack_pair_panels<W>(to.v, words, 0, v, in.prompts.v.token, P, D);
    pack_rows<W>(to.v, v, in.prompts.v.token, P, D);
    pack_pair_panels<W>(to.k_pairs, words, 0, k, in.prompts.k.token, P, D);
  });
}

template <typename T>
void add_prompts(float* o, float* divisor, const uint32_t* q, const PackedPrompts<T>& prompts, const Group<T>& group,
                 const Strip& strip) {
  using W = Words<T>;
  const int64_t P = group.in.prompts.P, D = group.in.D, words = ceil_div(P, W::kPer);
  const auto prompt = prompts.head(group.at.b, group.kv);
  const LaneGates<T> gates(group, strip);
  bool open = false;
  for (float gate : gates.of) open |= gate != 0.0f;
  if (!open) return;
  Scratch<float> a(round_up(P, kTileRows) * kStrip);
  Scratch<uint32_t> weights(words * kStrip);
  dot_prompts<W>(a, q, prompt.k, P, ceil_div(D, W::kPer), sign(group.in.scale));
  for (int lane = 0; lane < kStrip; lane += kLanes) {
    const Vec by = load(divisor + lane), sum = where(by == Vec{}, broadcast(1.0f), by);
    store(divisor + lane, sum);
    const Vec factor = load(gates.of + lane) * sum / weigh(a + lane, P, power(group.in.scale));
    for (int64_t j = 0; j < P; ++j) store(a + j * kStrip + lane, load(a + j * kStrip + lane) * factor);
  }
  join_prompts<W>(weights, a, P);
  for_channels(D, [&]<int NR>(int64_t c) {
    tile<W, kTileVecs, NR, 1, kPanel>(o + c * kStrip, kStrip, true, weights, kStrip, prompt.v + pair_panel(c, 0, words),
                                      words);
  });
}

template <typename T>
void prompts_backward(const PromptSums& sums, const PackedPrompts<T>& prompts, const Group<T>& group,
                      const Strip* strips, int64_t count, const BandData<Words<T>>& band) {
  using W = Words<T>;
  const int64_t P = group.in.prompts.P, D = group.in.D;
  Room<W> room(P);
  const auto prompt = prompts.head(group.at.b, group.kv);
  for (int i = 0; i < count; ++i) strip_backward(room, sums.dgate, prompt, group, strips[i], band.strip(i), i);
  add_band<W>(sums.dv, room.a_rows, band.dy_rows, room.rows, D, count * kRowWords<W>);
  add_band<W>(sums.dk, room.ds_rows, band.q_rows, room.rows, D, count * kRowWords<W>);
}

template <typename T>
void add_prompt_sums(float* totals, const Attended<T>& in, const float* sums, int64_t first, int64_t groups,
                     int64_t parts) {
  const int64_t size = PromptSums::size(in.prompts.P, in.D, in.G());
  parallel_for(in.prompts.B * in.Hkv, [&](int64_t head) {
    float* total = totals + head * size;
    for (int64_t n = 0; n < groups; ++n) {
      if ((first + n) % (in.prompts.B * in.Hkv) != head) continue;
      for (const float *from = sums + n * parts * size, *end = from + parts * size; from < end; from += size)
        for (int64_t i = 0; i < size; i += kLanes) store(total + i, load(total + i) + load(from + i));
    }
  });
}

template <typename T>
void store_prompt_sums(const AttentionBackward<T>& p, const float* totals) {
  const Attended<T>& in = p.in;
  const int64_t P = in.prompts.P, D = in.D, G = in.G(), rows = PromptSums::chunk_rows(P);
  const auto sums_of = [&](int64_t b, int64_t kv) {
    return PromptSums(const_cast<float*>(totals) + (b * in.Hkv + kv) * PromptSums::size(P, D, G), P, D);
  };
  const auto store_heads = [&](const Heads<T>& x, const float* sums, float scale, int64_t b, int64_t kv) {
    for_chunks(D, [&]<int MV>(int64_t c) {
      for (int64_t j = 0; j < P; ++j)
        for (int64_t d = 0; d < MV * kLanes; d += kLanes)
          store(x.at(b, j, kv) + c + d, load(sums + c * rows + j * MV * kLanes + d) * scale, lanes_left(D - c - d));
    });
  };
  for (int64_t h = 0; h < in.H; ++h) p.dprompt_gate[h] = 0.0f;
  for (int64_t b = 0; b < in.prompts.B; ++b)
    for (int64_t kv = 0; kv < in.Hkv; ++kv) {
      const PromptSums sums = sums_of(b, kv);
      store_heads(p.dprompt_k, sums.dk, in.scale, b, kv);
      store_heads(p.dprompt_v, sums.dv, 1.0f, b, kv);
      for (int64_t g = 0; g < G; ++g) p.dprompt_gate[kv * G + g] += sums.dgate[g];
    }
}

#define LK_INSTANTIATE(T)                                                                                             \
  template class PackedPrompts<T>;                                                                                    \
  template void add_prompts(float*, float*, const uint32_t*, const PackedPrompts<T>&, const Group<T>&, const Strip&); \
  template void prompts_backward(const PromptSums&, const PackedPrompts<T>&, const Group<T>&, const Strip*, int64_t,  \
                                 const BandData<Words<T>>&);                                                          \
  template void add_prompt_sums(float*, const Attended<T>&, const float*, int64_t, int64_t, int64_t);                 \
  template void store_prompt_sums(const AttentionBackward<T>&, const float*)
LK_INSTANTIATE(float);
LK_INSTANTIATE(bfloat16);
LK_INSTANTIATE(float16);

}  // namespace llamakern::LK_ISA
