// The backward of Excitor's keys on the GPU: the sums over tokens, then what adds these up in order and turns them into
// the gradients of what is learned.
#include "../common/reduce.cuh"
#include "../lora/lora_tile.cuh"
#include "excitor_sums.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- the gradients

constexpr int kGradientThreads = 128;

// out[i] = Σ of `count` arrays of n floats, in order: for each of `rows` its own.
static __global__ void __launch_bounds__(kGradientThreads)
    excitor_sum_kernel(float* out, const float* parts, int64_t n, int64_t count, int64_t rows) {
  const int64_t at = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (at >= n * rows) return;
  const float* from = parts + at / n * count * n + at % n;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += from[i * n];
  out[at] = sum;
}

struct PromptGradient {
  Excitor in;
  float *dprompts, *dvalues;  // [N, P, H, D]
  const float* values;        // [N][count][H][P][D]
  const float* dw;            // [N][softmaxes][P][R]
  float* gates;               // [H][N][P]
  int64_t count, softmaxes;
};

// dP, dV and each prompt's share of dg: a block for each prompt of a head.
static __global__ void __launch_bounds__(kGradientThreads) excitor_prompts_kernel(const PromptGradient p) {
  const Excitor& in = p.in;
  const int64_t i = blockIdx.x % in.P, n = blockIdx.x / in.P % in.N, h = blockIdx.x / in.P / in.N;
  const float* dw = p.dw + ((n * p.softmaxes + (in.full_width ? 0 : h)) * in.P + i) * in.R;
  const float g = in.gate_of(h);
  float gate[1] = {0};
  for (int64_t d = threadIdx.x; d < in.D; d += kGradientThreads) {
    float value = 0.0f, key = 0.0f;
    const float* part = p.values + ((n * p.count * in.H + h) * in.P + i) * in.D + d;
    for (int64_t k = 0; k < p.count; ++k) value += part[k * in.H * in.P * in.D];
    const float* b = in.b + (h * in.D + d) * in.R;
    for (int64_t r = 0; r < in.R; ++r) key = fmaf(dw[r], b[r], key);
    const int64_t at = ((n * in.P + i) * in.H + h) * in.D + d;
    gate[0] = fmaf(in.values[at], value, gate[0]);
    key *= in.scale, value *= g;
    p.dprompts[at] = p.dvalues ? key : key + value;
    if (p.dvalues) p.dvalues[at] = value;
  }
  row_sum(gate);
  if (threadIdx.x == 0) p.gates[(h * in.N + n) * in.P + i] = gate[0];
}

// One gate's gradient: a block for each.
static __global__ void __launch_bounds__(kGradientThreads)
    excitor_gate_kernel(float* dgate, const float* gates, int64_t count) {
  float sum[1] = {0};
  for (int64_t i = threadIdx.x; i < count; i += kGradientThreads) sum[0] += gates[blockIdx.x * count + i];
  row_sum(sum);
  if (threadIdx.x == 0) dgate[blockIdx.x] = sum[0];
}

// dB: a thread for each element.
static __global__ void __launch_bounds__(kGradientThreads)
    excitor_db_kernel(const Excitor in, float* db, const float* dw, int64_t softmaxes) {
  const int64_t at = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (at >= in.H * in.D * in.R) return;
  const int64_t r = at % in.R, d = at / in.R % in.D, h = at / in.R / in.D, s = in.full_width ? 0 : h;
  float sum = 0.0f;
  for (int64_t n = 0; n < in.N; ++n)
    for (int64_t i = 0; i < in.P; ++i)
      sum = fmaf(in.prompts[((n * in.P + i) * in.H + h) * in.D + d], dw[((n * softmaxes + s) * in.P + i) * in.R + r],
                 sum);
  db[at] = sum * in.scale;
}

// dx = dz A and dA = dzᵀ x, the latter in pieces of the tokens.
template <typename T>
struct Projection {
  T* dx;
  float* da;
  float* partial;                  // [pieces][R][C]
  Parts<AdapterElement<T>> dz, a;  // [M][R] and [R][C]
  const T* x;
  int64_t x_row, M, R, C, piece;
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) excitor_dx_kernel(const Projection<T> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.M, p.C);
  Tile tile;
  const auto dz = [&](bool low) LK_INLINE { return p.dz.template operand<false>(low, p.M, p.R); };
  const auto a = [&](bool low) LK_INLINE { return p.a.template operand<true>(low, p.R, p.C); };
  add_parts(tile, shared, dz, a, p.dz.low, p.a.low, at.m, at.n, p.R);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, c = at.n + j;
    if (m < p.M && c < p.C) p.dx[m * p.C + c] = narrow<T>(sum);
  });
}

template <typename T>
__global__ void __launch_bounds__(SmallTile<T>::kThreads, 2) excitor_da_kernel(const Projection<T> p) {
  using Tile = SmallTile<T>;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.R, p.C);
  const int64_t begin = blockIdx.y * p.piece, end = min64(p.M, begin + p.piece);
  Tile tile;
  const auto dz = [&](bool low) LK_INLINE { return p.dz.template operand<true>(low, p.M, p.R); };
  const auto x = [&](bool low) LK_INLINE { return Kept<T, true>{p.x, p.x_row, p.M, p.C, {}, low}; };
  add_parts(tile, shared, dz, x, p.dz.low, std::is_same_v<T, float16>, at.m, at.n, end, begin);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t r = at.m + i, c = at.n + j;
    if (r < p.R && c < p.C) p.partial[(blockIdx.y * p.R + r) * p.C + c] = sum;
  });
}

// -------------------------------------------------------------------------- launchers

static void sum_parts(float* out, const float* parts, int64_t n, int64_t count, int64_t rows, Stream stream) {
  if (n * rows == 0) return;
  LK_LAUNCH(excitor_sum_kernel, unsigned(ceil_div(n * rows, kGradientThreads)), kGradientThreads, 0, stream)
  (out, parts, n, count, rows);
  check_launch("excitor_sum_kernel");
}

// The workspace, and how the tokens are cut: by shape alone.
template <typename T>
struct Plan {
  Sums<T> sums;
  Pieces pieces;
  AnyLora<T> lora;
  float *dz, *dw, *gates, *partial;
  int64_t M, da_pieces, da_piece;

  Plan(const ExcitorKeysBackward<T>& p, void* workspace)
      : pieces(workspace), lora(Lora<float>{p.in.a, nullptr, p.in.R, 1.0f, {}}, 0, p.in.C), M(p.in.B * p.in.T_) {
    const Excitor& in = p.in;
    const int64_t S = softmaxes(in), tiles = ceil_div(in.T_, kTileTokens<T>);
    lora.low = std::is_same_v<T, float16>;
    sums.p = p;
    sums.parts = max64(ceil_div(in.D, kPartChannels<T>), ceil_div(in.R, kTileRanks));
    sums.chunks = ceil_div(in.P, kTilePrompts);
    const int64_t blocks = max64(1, in.B * sums.heads() * sums.chunks * sums.parts);
    sums.each = max64(1, ceil_div(tiles, max64(1, min64(tiles, kExcitorBlocks / blocks))));
    sums.groups = ceil_div(tiles, sums.each);
    sums.sixteens = in_sixteens(Heads<const T>{p.dy.data, p.dy.batch, p.dy.token, p.dy.head});
    sums.folded = {pieces.take<float>(in.N * S * in.P * in.R), S};
    const bool before = in.full_width || sums.chunks > 1;
    sums.most = before ? pieces.take<float>(S * M) : nullptr;
    sums.total = before ? pieces.take<float>(S * M) : nullptr;
    sums.along = before ? pieces.take<float>(S * M) : nullptr;
    sums.values = pieces.take<float>(sums.rows() * in.H * in.P * in.D);
    sums.scores = pieces.take<float>(sums.rows() * S * in.P * in.R);
    sums.dz = pieces.take<float>(S * sums.chunks * M * in.R);
    dz = pieces.take<float>(M * in.R);
    dw = pieces.take<float>(in.N * S * in.P * in.R);
    gates = pieces.take<float>(in.H * in.N * in.P);
    da_piece = max64(SmallTile<T>::kDepth, round_up(ceil_div(M, kMostPieces), SmallTile<T>::kDepth));
    da_pieces = ceil_div(M, da_piece);
    partial = pieces.take<float>(da_pieces * in.R * in.C);
  }
  // Of sums that rows of the batch share, or not, as the prompts.
  int64_t count() const { return sums.p.in.N == 1 ? sums.rows() : sums.groups; }
};

template <typename T>
static int64_t excitor_keys_backward_bytes(const ExcitorKeysBackward<T>& p) {
  Plan<T> plan(p, nullptr);
  plan.lora.parts_of_a(plan.pieces, nullptr);
  plan.lora.parts_of(plan.pieces, nullptr, plan.M, nullptr);
  return plan.pieces.bytes();
}

template <typename T>
static void launch_sums(const Plan<T>& plan, Stream stream) {
  const Sums<T>& s = plan.sums;
  const Excitor& in = s.p.in;
  if (plan.M == 0 || in.H == 0 || in.D == 0) return;
  fold(in, s.folded, stream);
  const size_t bytes = sizeof(SumsShared<T>) + size_t(ceil_div(in.D, kTileChannels) - 1) * sizeof(ChannelTile<T>);
  if (s.most) {
    const int64_t blocks = in.B * s.folded.softmaxes * ceil_div(in.T_, kTileTokens<T>);
    allow_shared(excitor_softmax_kernel<T>, bytes);
    LK_LAUNCH(excitor_softmax_kernel<T>, unsigned(blocks), kExcitorThreads<T>, bytes, stream)(s);
    check_launch("excitor_softmax_kernel");
  }
  allow_shared(excitor_sums_kernel<T>, bytes);
  LK_LAUNCH(excitor_sums_kernel<T>, unsigned(s.rows() * s.parts * s.chunks * s.heads()), kExcitorThreads<T>, bytes,
            stream)
  (s, s.heads());
  check_launch("excitor_sums_kernel");
}

template <typename T>
static void launch_projection(Plan<T>& plan, Stream stream) {
  const ExcitorKeysBackward<T>& p = plan.sums.p;
  const Excitor& in = p.in;
  const auto a = plan.lora.parts_of_a(plan.pieces, stream);
  const auto dz = plan.lora.parts_of(plan.pieces, plan.dz, plan.M, stream);
  const Projection<T> to{p.dx, p.da, plan.partial, dz, a, p.x, p.x_row, plan.M, in.R, in.C, plan.da_piece};
  if (in.C == 0) return;
  if (p.dx && plan.M > 0) {
    using Tile = SmallTile<T>;
    const auto kernel = excitor_dx_kernel<T, Tile>;
    LK_LAUNCH(kernel, tiles_of<Tile>(plan.M, in.C), Tile::kThreads, sizeof(typename Tile::Shared), stream)(to);
    check_launch("excitor_dx_kernel");
  }
  if (plan.M > 0) {
    using Tile = SmallTile<T>;
    dim3 grid = tiles_of<Tile>(in.R, in.C);
    grid.y = unsigned(plan.da_pieces);
    LK_LAUNCH(excitor_da_kernel<T>, grid, Tile::kThreads, sizeof(typename Tile::Shared), stream)(to);
    check_launch("excitor_da_kernel");
  }
  sum_parts(p.da, plan.partial, in.R * in.C, plan.da_pieces, 1, stream);
}

template <typename T>
static void excitor_keys_backward(const ExcitorKeysBackward<T>& p, void* workspace, Stream stream) {
  const Excitor& in = p.in;
  Plan<T> plan(p, workspace);
  const Sums<T>& s = plan.sums;
  const int64_t S = s.folded.softmaxes;
  launch_sums(plan, stream);
  sum_parts(plan.dw, s.scores, S * in.P * in.R, plan.count(), in.N, stream);
  sum_parts(plan.dz, s.dz, plan.M * in.R, S * s.chunks, 1, stream);
  if (in.N * in.H > 0) {
    const PromptGradient gradient{in, p.dprompts, p.dvalues, s.values, plan.dw, plan.gates, plan.count(), S};
    LK_LAUNCH(excitor_prompts_kernel, unsigned(in.P * in.N * in.H), kGradientThreads, 0, stream)(gradient);
    check_launch("excitor_prompts_kernel");
  }
  const int64_t gates = in.gate_head ? in.H : 1;
  if (gates > 0) {
    LK_LAUNCH(excitor_gate_kernel, unsigned(gates), kGradientThreads, 0, stream)
    (p.dgate, plan.gates, in.H / gates * in.N * in.P);
    check_launch("excitor_gate_kernel");
  }
  if (in.H * in.D > 0) {
    LK_LAUNCH(excitor_db_kernel, unsigned(ceil_div(in.H * in.D * in.R, kGradientThreads)), kGradientThreads, 0, stream)
    (in, p.db, plan.dw, S);
    check_launch("excitor_db_kernel");
  }
  launch_projection(plan, stream);
}

LK_CUDA_KERNEL(ExcitorKeysBackward<float>, excitor_keys_backward<float>, excitor_keys_backward_bytes<float>);
LK_CUDA_KERNEL(ExcitorKeysBackward<bfloat16>, excitor_keys_backward<bfloat16>, excitor_keys_backward_bytes<bfloat16>);
LK_CUDA_KERNEL(ExcitorKeysBackward<float16>, excitor_keys_backward<float16>, excitor_keys_backward_bytes<float16>);

}  // namespace llamakern::cuda
