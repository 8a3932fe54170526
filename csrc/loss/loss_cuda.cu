// Linear cross-entropy on the GPU, in the CPU engine's steps. Tokens that count are listed first, so that the others
// cost nothing and leave no trace; their number is known to the device alone. Of a chunk of them the scores appear tile
// by tile of the vocabulary and leave exponentials relative to the tile's largest score; when all tiles are known these
// become P, which two matmuls turn into dh and dW. Only one chunk's P is ever in memory.
#include "loss.h"

#include "../common/gemm.cuh"
#include "../common/pack.cuh"
#include "../common/reduce.cuh"

namespace llamakern::cuda {

#ifdef LK_HOST_CUDA
static constexpr int64_t kChunkBytes = int64_t(64) << 10;  // so that small problems have several chunks
#else
static constexpr int64_t kChunkBytes = int64_t(256) << 20;  // of P
#endif
static constexpr int kListThreads = 1024, kThreads = 256;

// P of float16 is times kLift and over the largest |g|: small probabilities would else lie below its range. It is a sum
// of two: alone its rounding would be the error of gradients that a loss scale was to lift out of it.
template <typename T>
static constexpr float kLift = std::is_same_v<T, float16> ? 0x1p15f : 1.0f;
template <typename T>
static constexpr int kParts = std::is_same_v<T, float16> ? 2 : 1;

// ---------------------------------------------------------------------------- memory

// A chunk and the memory beside the operands. Rows of a chunk are tokens that count; `rows` is the most it can have.
template <typename T>
struct LossChunk {
  LinearCrossEntropy<T> p;
  int64_t rows, tiles, pitch, h_pitch, chunks;  // tiles of the vocabulary; elements from a row of P, of h, to the next
  int64_t from = 0;                             // tokens that count before this chunk
  bool backward;

  int32_t* tokens;         // [M]              rows of p.h
  int32_t* count;          // []               how many of them there are
  float* unit;             // []               what P is multiplied by, see kLift
  float* losses;           // [M]              of the tokens that count
  float *top, *total;      // [rows][tiles]    largest score, Σ exp(score - largest); then what makes P of exponentials
  float *score, *certain;  // [rows]           of the label; its P
  T* h;                    // [rows][h_pitch]
  T *probs, *low;          // [rows][pitch]    exp(score - largest)·kLift, then P; what it rounds off, or null
  float* sum;              // [V][C]           of dW over the chunks, null where dw can hold it or there is one chunk

  LK_HD int64_t here() const { return max64(0, min64(rows, *count - from)); }
};

template <typename T>
static constexpr int64_t kVocabTile = LargeTile<T>::kColumns;

// The chunk's sizes, and its arrays at `workspace`. Returns the bytes that they take.
template <typename T>
static int64_t lay_out(LossChunk<T>& k, const LinearCrossEntropy<T>& p, void* workspace) {
  k.p = p;
  k.backward = p.dh || p.dw;
  k.tiles = ceil_div(p.V, kVocabTile<T>);
  k.pitch = round_up(p.V, kPack<T>);
  k.h_pitch = round_up(p.C, kPack<T>);
  // A 16-bit dW that is summed over chunks needs `sum`. Tokens whose P takes no more memory than that go at once.
  const int64_t sum_bytes = p.dw && sizeof(T) == 2 ? p.V * p.C * int64_t(sizeof(float)) : 0;
  const int64_t row_bytes = max64(1, k.backward ? k.pitch * int64_t(sizeof(T)) * kParts<T> : k.tiles * 8);
  constexpr int64_t step = LargeTile<T>::kRows;
  const int64_t at_once = max64(step, max64(kChunkBytes, sum_bytes) / row_bytes / step * step);
  k.chunks = max64(1, ceil_div(p.M, at_once));
  k.rows = max64(step, round_up(ceil_div(p.M, k.chunks), step));

  auto* at = static_cast<char*>(workspace);
  const auto take = [&]<typename E>(E*& array, int64_t elements) {
    array = reinterpret_cast<E*>(at);
    at += round_up(elements * int64_t(sizeof(E)), 256);
  };
  take(k.tokens, p.M);
  take(k.count, 1);
  take(k.unit, 1);
  take(k.losses, p.M);
  take(k.top, k.rows * k.tiles);
  take(k.total, k.rows * k.tiles);
  take(k.score, k.rows);
  take(k.certain, k.rows);
  take(k.h, k.rows * k.h_pitch);
  take(k.probs, k.backward ? k.rows * k.pitch : 0);
  take(k.low, k.backward && kParts<T> == 2 ? k.rows * k.pitch : 0);
  take(k.sum, k.chunks > 1 ? sum_bytes / int64_t(sizeof(float)) : 0);
  if (k.chunks == 1 || sum_bytes == 0) k.sum = nullptr;
  return at - static_cast<char*>(workspace);
}

// ---------------------------------------------------------------------------- kernels

// A pack of P, from element `at` on.
template <typename T>
static LK_DEVICE void load_pack(float (&x)[kPack<T>], const LossChunk<T>& k, int64_t at) {
  load(x, k.probs + at);
  if constexpr (kParts<T> == 2) {
    float low[kPack<T>];
    load(low, k.low + at);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) x[i] += low[i];
  }
}
template <typename T>
static LK_DEVICE void store_pack(const LossChunk<T>& k, int64_t at, float (&x)[kPack<T>]) {
  store(k.probs + at, x);
  if constexpr (kParts<T> == 2) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) x[i] -= widen(narrow<T>(x[i]));
    store(k.low + at, x);
  }
}

// The list of the tokens that count, in order, by one block.
template <typename T>
__global__ void __launch_bounds__(kListThreads) loss_list_kernel(const LossChunk<T> k) {
  const auto& p = k.p;
  __shared__ int32_t found[kListThreads / kWarp];
  __shared__ float largest[kListThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t count = 0;
  float top = 0;
  for (int64_t begin = 0; begin < p.M; begin += kListThreads) {
    const int64_t m = begin + threadIdx.x;
    const bool counts = m < p.M && p.labels[m] != p.ignore_index;
    if (m < p.M && !counts && p.loss && p.reduction == Reduction::kNone) p.loss[m] = 0;
    if (counts && p.dloss) top = fmaxf(top, fabsf(p.dloss[m]));
    const unsigned mask = __ballot_sync(~0u, counts);
    if (lane == 0) found[warp] = __popc(mask);
    __syncthreads();
    int32_t before = count, all = count;
    for (int i = 0; i < kListThreads / kWarp; ++i) {
      if (i < warp) before += found[i];
      all += found[i];
    }
    if (counts) k.tokens[before + __popc(mask & ((1u << lane) - 1))] = int32_t(m);
    count = all;
    __syncthreads();
  }
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, bits));
  if (lane == 0) largest[warp] = top;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kListThreads / kWarp; ++i) top = fmaxf(top, largest[i]);
  if (!p.dloss) top = 1.0f;
  if (p.reduction == Reduction::kMean) top /= float(count);
  const bool lift = kLift<T> != 1.0f && top > 0 && top < INFINITY;
  *k.unit = lift ? kLift<T> / top : 1.0f;
  *k.count = count;
}

// The chunk's rows of h side by side.
template <typename T>
__global__ void __launch_bounds__(kThreads) loss_gather_kernel(const LossChunk<T> k) {
  const int64_t row = blockIdx.x;
  if (row >= k.here()) return;
  const T* from = k.p.h + k.tokens[k.from + row] * k.p.h_row;
  for (int64_t c = threadIdx.x; c < k.p.C; c += kThreads) k.h[row * k.h_pitch + c] = from[c];
}

// One tile of scores: two neighbouring threads have a row, one the even columns and one the odd ones.
template <typename T>
__global__ void __launch_bounds__(LargeTile<T>::kThreads, LargeTile<T>::kBlocks)
    loss_scores_kernel(const LossChunk<T> k) {
  using Tile = LargeTile<T>;
  constexpr int kLine = Tile::kColumns + 1;  // rows fall in different banks
  static_assert(Tile::kThreads == 2 * Tile::kRows);
  static_assert(sizeof(typename Tile::Shared) >= Tile::kRows * kLine * sizeof(float));
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(k.rows, k.p.V);
  const int64_t rows = k.here();
  if (at.m >= rows) return;
  Tile tile;
  tile.add(shared, Rows<T>{k.h, k.h_pitch, rows, k.p.C}, Rows<T>{k.p.w, k.p.w_row, k.p.V, k.p.C}, at.m, at.n, k.p.C);
  float* const scores = reinterpret_cast<float*>(&shared);
  tile.each([&](int m, int n, float z) LK_INLINE { scores[m * kLine + n] = z; });
  __syncthreads();

  const int half = threadIdx.x % 2, columns = int(min64(Tile::kColumns, k.p.V - at.n));
  const int64_t row = at.m + threadIdx.x / 2;
  float* const z = scores + threadIdx.x / 2 * kLine;
  if (row < rows) {
    const int64_t label = k.p.labels[k.tokens[k.from + row]] - at.n;
    if (label >= 0 && label < columns && label % 2 == half) k.score[row] = z[label];
  }
  float top = -INFINITY, total = 0;
  for (int n = half; n < columns; n += 2) top = fmaxf(top, z[n]);
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  for (int n = half; n < columns; n += 2) {
    const float e = expf(z[n] - top);
    total += e;
    z[n] = e * kLift<T>;
  }
  total += __shfl_xor_sync(~0u, total, 1);
  if (half == 0 && row < rows) {
    k.top[row * k.tiles + at.n / Tile::kColumns] = top;
    k.total[row * k.tiles + at.n / Tile::kColumns] = total;
  }
  if (!k.backward) return;
  __syncthreads();
  constexpr int N = kPack<T>, kPacks = Tile::kColumns / N;
  for (int i = threadIdx.x; i < Tile::kRows * kPacks; i += Tile::kThreads) {
    const int m = i / kPacks, n = i % kPacks * N;
    if (at.m + m >= rows || n >= columns) continue;
    float e[N];
#pragma unroll
    for (int j = 0; j < N; ++j) e[j] = n + j < columns ? scores[m * kLine + n + j] : 0.0f;
    store_pack(k, (at.m + m) * k.pitch + at.n + n, e);
  }
}

// A warp has a token: its loss; `total` becomes what turns a tile's exponentials into P.
template <typename T>
__global__ void __launch_bounds__(kThreads) loss_rows_kernel(const LossChunk<T> k) {
  const auto& p = k.p;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= k.here()) return;
  float *tops = k.top + row * k.tiles, *totals = k.total + row * k.tiles, top = -INFINITY, sum = 0;
  for (int64_t b = threadIdx.x; b < k.tiles; b += kWarp) top = fmaxf(top, tops[b]);
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, bits));
  for (int64_t b = threadIdx.x; b < k.tiles; b += kWarp) sum = fmaf(totals[b], expf(tops[b] - top), sum);
  sum = warp_sum(sum);
  const int32_t token = k.tokens[k.from + row];
  const float loss = logf(sum) - (k.score[row] - top);
  float g = p.dloss ? p.dloss[token] : 1.0f;
  if (p.reduction == Reduction::kMean) g /= float(*k.count);
  g *= *k.unit;
  if (threadIdx.x == 0) {
    k.losses[k.from + row] = loss;
    if (p.loss && p.reduction == Reduction::kNone) p.loss[token] = loss;
    k.certain[row] = g * expm1f(-loss);  // p - 1 of a rounded p would be lost where p is near 1
  }
  const float share = g / sum / kLift<T>;
  for (int64_t b = threadIdx.x; b < k.tiles; b += kWarp) totals[b] = share * expf(tops[b] - top);
}

// P from the exponentials, a pack for each thread; `blocks` for each row.
template <typename T>
__global__ void __launch_bounds__(kThreads) loss_probabilities_kernel(const LossChunk<T> k, unsigned blocks) {
  constexpr int N = kPack<T>;
  const unsigned row = blockIdx.x / blocks;
  const int64_t v = (int64_t(blockIdx.x - row * blocks) * kThreads + threadIdx.x) * N;
  if (row >= k.here() || v >= k.p.V) return;
  const float scale = k.total[row * k.tiles + v / kVocabTile<T>];
  const int64_t label = k.p.labels[k.tokens[k.from + row]] - v;
  float e[N];
  load_pack(e, k, row * k.pitch + v);
#pragma unroll
  for (int i = 0; i < N; ++i) e[i] = i == label ? k.certain[row] : e[i] * scale;
  store_pack(k, row * k.pitch + v, e);
}

// dh = P W, a tile for each block.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) loss_dh_kernel(const LossChunk<T> k) {
  const auto& p = k.p;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(k.rows, p.C);
  const int64_t rows = k.here();
  if (at.m >= rows) return;
  Tile tile;
#pragma unroll 1
  for (int part = 0; part < kParts<T>; ++part)
    tile.add(shared, Rows<T>{part ? k.low : k.probs, k.pitch, rows, p.V}, Columns<T>{p.w, p.w_row, p.V, p.C}, at.m,
             at.n, p.V);
  const float back = 1.0f / *k.unit;
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t row = at.m + i, c = at.n + j;
    if (row < rows && c < p.C) p.dh[k.tokens[k.from + row] * p.C + c] = narrow<T>(sum * back);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) loss_ignored_kernel(const LossChunk<T> k) {
  const int64_t m = blockIdx.x;
  if (k.p.labels[m] != k.p.ignore_index) return;
  for (int64_t c = threadIdx.x; c < k.p.C; c += kThreads) k.p.dh[m * k.p.C + c] = T{};
}

// The chunk's share of dW = Pᵀ h joins those before it.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) loss_dw_kernel(const LossChunk<T> k, bool last) {
  const auto& p = k.p;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.V, p.C);
  const int64_t rows = k.here();
  Tile tile;
#pragma unroll 1
  for (int part = 0; part < kParts<T>; ++part)
    tile.add(shared, Columns<T>{part ? k.low : k.probs, k.pitch, rows, p.V}, Columns<T>{k.h, k.h_pitch, rows, p.C},
             at.m, at.n, rows);
  const float back = 1.0f / *k.unit;
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t v = at.m + i, c = at.n + j;
    if (v >= p.V || c >= p.C) return;
    const int64_t to = v * p.C + c;
    if constexpr (std::is_same_v<T, float>) {
      p.dw[to] = k.from ? p.dw[to] + sum : sum;
    } else {
      if (k.from) sum += k.sum[to];
      if (last)
        p.dw[to] = narrow<T>(sum * back);
      else
        k.sum[to] = sum;
    }
  });
}

// The losses in the order of the list, by one block: tokens that do not count change no bit.
template <typename T>
__global__ void __launch_bounds__(kThreads) loss_sum_kernel(const LossChunk<T> k) {
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < *k.count; i += kThreads) sum += double(k.losses[i]);
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *k.p.loss = float(k.p.reduction == Reduction::kMean ? sums[0] / double(*k.count) : sums[0]);
}

// -------------------------------------------------------------------------- launchers

template <typename T>
static int64_t loss_bytes(const LinearCrossEntropy<T>& p) {
  LossChunk<T> k;
  return lay_out(k, p, nullptr);
}

template <typename T>
static void run_chunk(const LossChunk<T>& k, bool last, Stream stream) {
  const auto& p = k.p;
  const unsigned rows = unsigned(k.rows), warps = kThreads / kWarp;
  LK_LAUNCH(loss_gather_kernel<T>, rows, kThreads, 0, stream)(k);
  check_launch("loss_gather_kernel");
  launch_tiles<LargeTile<T>>("loss_scores_kernel", loss_scores_kernel<T>, k.rows, p.V, stream, k);
  LK_LAUNCH(loss_rows_kernel<T>, unsigned(ceil_div(rows, warps)), dim3(kWarp, warps), 0, stream)(k);
  check_launch("loss_rows_kernel");
  if (!k.backward) return;
  const unsigned blocks = unsigned(ceil_div(p.V, int64_t(kThreads) * kPack<T>));
  if (blocks > 0) {
    LK_LAUNCH(loss_probabilities_kernel<T>, rows * blocks, kThreads, 0, stream)(k, blocks);
    check_launch("loss_probabilities_kernel");
  }
  if (p.dh)
    with_tile<T>(k.rows, p.C, [&]<typename Tile>() {
      launch_tiles<Tile>("loss_dh_kernel", loss_dh_kernel<T, Tile>, k.rows, p.C, stream, k);
    });
  if (p.dw)
    with_tile<T>(p.V, p.C, [&]<typename Tile>() {
      launch_tiles<Tile>("loss_dw_kernel", loss_dw_kernel<T, Tile>, p.V, p.C, stream, k, last);
    });
}

template <typename T>
static void linear_cross_entropy(const LinearCrossEntropy<T>& p, void* workspace, Stream stream) {
  LossChunk<T> k;
  lay_out(k, p, workspace);
  LK_LAUNCH(loss_list_kernel<T>, 1u, kListThreads, 0, stream)(k);
  check_launch("loss_list_kernel");
  if (p.dh && p.M * p.C > 0) {
    LK_LAUNCH(loss_ignored_kernel<T>, unsigned(p.M), kThreads, 0, stream)(k);
    check_launch("loss_ignored_kernel");
  }
  for (int64_t chunk = 0; chunk < k.chunks; ++chunk, k.from += k.rows) run_chunk(k, chunk + 1 == k.chunks, stream);
  if (!p.loss || p.reduction == Reduction::kNone) return;
  LK_LAUNCH(loss_sum_kernel<T>, 1u, kThreads, 0, stream)(k);
  check_launch("loss_sum_kernel");
}

LK_CUDA_KERNEL(LinearCrossEntropy<float>, linear_cross_entropy<float>, loss_bytes<float>);
LK_CUDA_KERNEL(LinearCrossEntropy<bfloat16>, linear_cross_entropy<bfloat16>, loss_bytes<bfloat16>);
LK_CUDA_KERNEL(LinearCrossEntropy<float16>, linear_cross_entropy<float16>, loss_bytes<float16>);

}  // namespace llamakern::cuda
