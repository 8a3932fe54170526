// Excitor's keys on the GPU: z for all tokens, then tiles of tokens, whose mixtures of prompts never leave the chip.
// A few tokens, as in decoding, take two small kernels and the formula as it stands.
#include "../common/pack.cuh"
#include "../common/reduce.cuh"
#include "../lora/lora_tile.cuh"
#include "excitor_tile.cuh"

namespace llamakern::cuda {

// K' of one element, whose mixture of prompts is given. Where g·mixture is 0 K keeps its bits.
template <typename T>
static LK_DEVICE T add_key(T k, float more) {
  return more == 0.0f ? k : narrow<T>(widen(k) + more);
}

// ---------------------------------------------------------------------------- many tokens

// A block takes `each` tiles of tokens of one softmax in one batch row.
template <typename T>
struct Keys {
  ExcitorKeys<T> p;
  Folded folded;
  int64_t groups, each;
  bool whole;  // rows may be moved in packs
};

template <typename T>
struct KeysShared {
  RankTile<T> ranks;
  ChannelTile<T> channels[1];  // one for each 64
};

// The warp's tokens: their mixtures lie in the tile.
template <bool kWhole, typename T>
static LK_DEVICE void store_keys(const ExcitorKeys<T>& p, const ChannelTile<T>* tiles, const TokenTile& at, int64_t h) {
  constexpr int N = kWhole ? kPack<T> : 1;
  const int packs = int(p.in.D) / N;
  const float g = p.in.gate_of(h);
  for (int i = lane_id(); i < 16 * packs; i += 32) {
    const int row = 16 * warp_id() + i / packs, d = i % packs * N;
    if (row >= at.tokens) return;
    const T* mixture = tiles[d / kTileChannels].rows + row * kRow<T, kTileChannels> + d % kTileChannels;
    T* y = p.y.at(at.b, at.t + row, h) + d;
    Pack<T, N> plain;
    float k[N], more[N];
    plain.load(p.k.at(at.b, at.t + row, h) + d);
    plain.widen_to(k);
    load(more, mixture);
#pragma unroll
    for (int n = 0; n < N; ++n) more[n] *= g;
    if (p.beside) {
      plain.store(y);
      store(y + p.in.D, more);
      continue;
    }
    bool same = true;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      same = same && more[n] == 0.0f;
      k[n] = more[n] == 0.0f ? k[n] : k[n] + more[n];
    }
    if (same)
      plain.store(y);
    else
      store(y, k);
  }
}

template <typename T>
__global__ void __launch_bounds__(kExcitorThreads<T>, 1) excitor_keys_kernel(const Keys<T> keys) {
  LK_DYNAMIC_SHARED(KeysShared<T>, shared);
  ChannelTile<T>* const tiles = shared.channels;
  const Excitor& p = keys.p.in;
  const int64_t group = blockIdx.x % keys.groups, s = blockIdx.x / keys.groups % keys.folded.softmaxes;
  const int64_t b = blockIdx.x / keys.groups / keys.folded.softmaxes;
  const int64_t first = p.full_width ? 0 : s, end = p.full_width ? p.H : s + 1;
  const float* folded = keys.folded.of(p, b, s);
  const bool one = p.P <= kTilePrompts, keep = one && end - first == 1;  // so prompts stay for all tokens
  if (keep)
    for (int64_t c = 0; c < p.D; c += kTileChannels)
      load_prompts(tiles[c / kTileChannels].prompts, p, p.values, b, first, 0, c);
  const int64_t last = min64(p.T_, (group + 1) * keys.each * kTileTokens<T>);
#pragma unroll 1
  for (int64_t t = group * keys.each * kTileTokens<T>; t < last; t += kTileTokens<T>) {
    const TokenTile at(p, b, t, kTileTokens<T>);
    const float* z = keys.p.z + at.m(p) * p.R;
    PromptSoftmax softmax;
    float u[kTilePrompts / 8][4];
    Left<T, kTilePrompts> weights[1];
    for (int64_t i = 0; i < p.P; i += kTilePrompts) {
      scores(u, shared.ranks, p, z, at.tokens, folded, i);
      softmax.add(u, u);
    }
    if (one) {
      softmax.weigh(u);
      weights[0].set(u);
    }
#pragma unroll 1
    for (int64_t h = first; h < end; ++h) {
#pragma unroll 1
      for (int64_t c = 0; c < p.D; c += kTileChannels) {
        ChannelTile<T>& tile = tiles[c / kTileChannels];
        float mixture[1][kTileChannels / 8][4] = {};
#pragma unroll 1
        for (int64_t i = 0; i < p.P; i += kTilePrompts) {
          if (!one) {
            scores(u, shared.ranks, p, z, at.tokens, folded, i);
            softmax.weigh(u);
            weights[0].set(u);
          }
          if (!keep) {
            __syncthreads();
            load_prompts(tile.prompts, p, p.values, b, h, i, c);
            __syncthreads();
          }
          multiply<T, kTileChannels>(mixture, weights, tile.prompts);
        }
        put_fragment<T, kTileChannels>(tile.warp_rows(), mixture[0], {1.0f, 1.0f});
      }
      __syncwarp();
      if (p.cos) turn_rows(tiles, p, at, 1.0f);
      __syncwarp();
      if (keys.whole)
        store_keys<true>(keys.p, tiles, at, h);
      else
        store_keys<false>(keys.p, tiles, at, h);
      __syncwarp();
    }
  }
}

// ---------------------------------------------------------------------------- a few tokens

constexpr int64_t kFewTokens = 8, kFewPrompts = 4096;
constexpr int kFewThreads = 128;

// z: a block for each element.
template <typename T>
__global__ void __launch_bounds__(kFewThreads) excitor_few_ranks_kernel(const ExcitorKeys<T> p) {
  const int64_t r = blockIdx.x % p.in.R, m = blockIdx.x / p.in.R;
  float sum[1] = {0};
  for (int64_t c = threadIdx.x; c < p.in.C; c += kFewThreads)
    sum[0] = fmaf(widen(p.x[m * p.x_row + c]), p.in.a[r * p.in.C + c], sum[0]);
  row_sum(sum);
  if (threadIdx.x == 0) p.z[m * p.in.R + r] = sum[0];
}

template <typename T>
static LK_DEVICE void store_few(const ExcitorKeys<T>& p, const float* mixture, int64_t b, int64_t t, int64_t h) {
  const Excitor& in = p.in;
  const float g = in.gate_of(h);
  for (int d = int(threadIdx.x); d < in.D; d += kFewThreads) {
    float more = mixture[d];
    if (in.cos) {
      const int half = int(in.D / 2), i = in.interleaved ? d / 2 : d % half;
      float x = mixture[in.interleaved ? 2 * i : i], y = mixture[in.interleaved ? 2 * i + 1 : i + half];
      const int64_t angle = b * in.angle_batch + t * half + i;
      rope_rotate(x, y, in.cos[angle], in.sin[angle]);
      more = (in.interleaved ? d % 2 : d / half) ? y : x;
    }
    const T k = p.k.at(b, t, h)[d];
    T* y = p.y.at(b, t, h) + d;
    *y = p.beside ? k : add_key(k, more * g);
    if (p.beside) y[in.D] = narrow<T>(more * g);
  }
}

// A block for each softmax of each token: E, U, w and the mixture as the formula says.
template <typename T>
__global__ void __launch_bounds__(kFewThreads) excitor_few_keys_kernel(const ExcitorKeys<T> p) {
  LK_DYNAMIC_SHARED(float, dynamic);
  __shared__ float row[kExcitorMaxD];
  float* const w = &dynamic;  // [P]
  const Excitor& in = p.in;
  const int64_t all = in.full_width ? 1 : in.H, s = blockIdx.x % all, m = blockIdx.x / all;
  const int64_t b = m / in.T_, t = m % in.T_, first = in.full_width ? 0 : s, end = in.full_width ? in.H : s + 1;
  const auto prompt = [&](const float* prompts, int64_t i, int64_t h)
                          LK_INLINE { return prompts + (((in.N == 1 ? 0 : b) * in.P + i) * in.H + h) * in.D; };
  for (int64_t h = first; h < end; ++h) {
    for (int d = int(threadIdx.x); d < in.D; d += kFewThreads) {
      float e = 0.0f;
      for (int64_t r = 0; r < in.R; ++r) e = fmaf(in.b[(h * in.D + d) * in.R + r], p.z[m * in.R + r], e);
      row[d] = e;
    }
    __syncthreads();
    for (int64_t i = warp_id(); i < in.P; i += kFewThreads / 32) {
      float u = 0.0f;
      for (int d = lane_id(); d < in.D; d += 32) u = fmaf(prompt(in.prompts, i, h)[d], row[d], u);
      u = warp_sum(u);
      if (lane_id() == 0) w[i] = h == first ? u : w[i] + u;
    }
    __syncthreads();
  }
  float most = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < in.P; ++i) most = fmaxf(most, w[i] * in.scale);
  for (int64_t i = 0; i < in.P; ++i) total += exp2_approx((w[i] * in.scale - most) * kLog2e);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < in.P; i += kFewThreads)
    w[i] = exp2_approx((w[i] * in.scale - most) * kLog2e) / total;
  __syncthreads();
  for (int64_t h = first; h < end; ++h) {
    for (int d = int(threadIdx.x); d < in.D; d += kFewThreads) {
      float sum = 0.0f;
      for (int64_t i = 0; i < in.P; ++i) sum = fmaf(w[i], prompt(in.values, i, h)[d], sum);
      row[d] = sum;
    }
    __syncthreads();
    store_few(p, row, b, t, h);
    __syncthreads();
  }
}

// -------------------------------------------------------------------------- launchers

template <typename T>
static bool few(const Excitor& p) {
  return p.B * p.T_ <= kFewTokens && p.P <= kFewPrompts;
}

// x and A as the operands of z = x Aᵀ: as the CPU engine, beside bfloat16 A is rounded to it.
template <typename T>
AnyLora<T> projection(const Excitor& p) {
  AnyLora<T> lora(Lora<float>{p.a, nullptr, p.R, 1.0f, {}}, 0, p.C);
  lora.low = std::is_same_v<T, float16>;
  return lora;
}

template <typename T>
static int64_t excitor_keys_bytes(const ExcitorKeys<T>& p) {
  if (few<T>(p.in)) return 0;
  Pieces pieces;
  pieces.take<float>(p.in.N * softmaxes(p.in) * p.in.P * p.in.R);
  const AnyLora<T> lora = projection<T>(p.in);
  lora.parts_of_a(pieces, nullptr);
  lora_narrow<false>(pieces, Narrow<T>{nullptr, nullptr, 0, {}, {}, p.in.B * p.in.T_, p.in.R, p.in.C, 1.0f}, lora.low,
                     nullptr);
  return pieces.bytes();
}

template <typename T>
static void few_keys(const ExcitorKeys<T>& p, Stream stream) {
  const int64_t M = p.in.B * p.in.T_;
  LK_LAUNCH(excitor_few_ranks_kernel<T>, unsigned(M * p.in.R), kFewThreads, 0, stream)(p);
  check_launch("excitor_few_ranks_kernel");
  const size_t bytes = size_t(p.in.P) * sizeof(float);
  LK_LAUNCH(excitor_few_keys_kernel<T>, unsigned(M * softmaxes(p.in)), kFewThreads, bytes, stream)(p);
  check_launch("excitor_few_keys_kernel");
}

template <typename T>
static void excitor_keys(const ExcitorKeys<T>& p, void* workspace, Stream stream) {
  const Excitor& in = p.in;
  const int64_t M = in.B * in.T_;
  if (M == 0 || in.H == 0 || in.D == 0) return;
  if (few<T>(in)) return few_keys(p, stream);
  Pieces pieces(workspace);
  const Folded folded{pieces.take<float>(in.N * softmaxes(in) * in.P * in.R), softmaxes(in)};
  fold(in, folded, stream);
  const AnyLora<T> lora = projection<T>(in);
  const auto a = lora.parts_of_a(pieces, stream);
  lora_narrow<false>(pieces, Narrow<T>{p.z, p.x, p.x_row, {}, a, M, in.R, in.C, 1.0f}, lora.low, stream);

  const int64_t tiles = ceil_div(in.T_, kTileTokens<T>), rows = in.B * folded.softmaxes;
  const int64_t each = ceil_div(tiles, max64(1, min64(tiles, kExcitorBlocks / rows)));
  const bool whole = in_packs<T>({p.k.data, {p.k.batch, p.k.token, p.k.head, in.D}}) &&
                     in_packs<T>({p.y.data, {p.y.batch, p.y.token, p.y.head}});
  const Keys<T> keys{p, folded, ceil_div(tiles, each), each, whole};
  const size_t bytes = sizeof(RankTile<T>) + size_t(ceil_div(in.D, kTileChannels)) * sizeof(ChannelTile<T>);
  allow_shared(excitor_keys_kernel<T>, bytes);
  LK_LAUNCH(excitor_keys_kernel<T>, unsigned(rows * keys.groups), kExcitorThreads<T>, bytes, stream)(keys);
  check_launch("excitor_keys_kernel");
}

LK_CUDA_KERNEL(ExcitorKeys<float>, excitor_keys<float>, excitor_keys_bytes<float>);
LK_CUDA_KERNEL(ExcitorKeys<bfloat16>, excitor_keys<bfloat16>, excitor_keys_bytes<bfloat16>);
LK_CUDA_KERNEL(ExcitorKeys<float16>, excitor_keys<float16>, excitor_keys_bytes<float16>);

}  // namespace llamakern::cuda
