// LoRA backward on the GPU: g = dy B, then dx with g A as the first term of the base's sums, then dA and dB.
#include "lora_tile.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- dx

template <typename T, typename Base>
struct Dx {
  T* dx;
  Parts<AdapterElement<T>> g, a;  // [M][R] and [R][K]
  const T* dy;
  int64_t dy_row;
  Base base;
  Dropout drop;
  float scale;
  int64_t M, N, K, R;
};

template <typename T, typename Tile, typename Base>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) lora_dx_kernel(const Dx<T, Base> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.M, p.K);
  const Range range = p.base.range(at.n, at.n + Tile::kColumns);
  const float scale = p.scale * p.drop.keep_scale * range.down;
  Tile tile;
  const auto g = [&](bool low) LK_INLINE { return p.g.template operand<false>(low, p.M, p.R); };
  const auto a = [&](bool low) LK_INLINE { return p.a.template operand<true>(low, p.R, p.K); };
  add_parts(tile, shared, g, a, p.g.low, p.a.low, at.m, at.n, p.R);
  tile.each([&](int i, int j, float& sum) LK_INLINE {
    sum = p.drop.seed && is_dropped(p.drop, p.drop.row_keys(at.m + i), at.n + j) ? 0.0f : sum * scale;
  });
  tile.add(shared, Rows<T>{p.dy, p.dy_row, p.M, p.N}, p.base.operand(range.down), at.m, at.n, p.N);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, k = at.n + j;
    if (m < p.M && k < p.K) p.dx[m * p.K + k] = narrow<T>(sum * range.up);
  });
}

// ---------------------------------------------------------------------------- dA and dB

// out(r, c) = factor·Σ_m narrow[m][r] values[m][c]: dA [R][K] of g and drop(x), dB [N][R] of h and dy. Long sums are
// cut into pieces of the tokens, by their number alone, and summed in their order.
template <typename T>
struct Gradient {
  T* same;  // out, of T or float32: element (r, c) at r·out_r + c·out_c
  float* wide;
  int64_t out_r, out_c;
  float* partial;                   // [pieces][R][C], or null for one piece
  Parts<AdapterElement<T>> narrow;  // [M][R]
  const T* values;                  // [M][C]
  int64_t ld;
  Dropout drop;
  int64_t M, R, C, piece;
  float factor;

  LK_DEVICE void store(int64_t r, int64_t c, float sum) const {
    const int64_t i = r * out_r + c * out_c;
    if (wide)
      wide[i] = sum * factor;
    else
      same[i] = cuda::narrow<T>(sum * factor);
  }
};

constexpr int64_t kPieceTokens = 256;
constexpr int kSumThreads = 256;

template <typename T>
__global__ void __launch_bounds__(SmallTile<T>::kThreads, 2) lora_gradient_kernel(const Gradient<T> p) {
  using Tile = SmallTile<T>;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.R, p.C);
  const int64_t begin = blockIdx.y * p.piece, end = min64(p.M, begin + p.piece);
  Tile tile;
  const auto narrow = [&](bool low) LK_INLINE { return p.narrow.template operand<true>(low, p.M, p.R); };
  const auto values = [&](bool low) LK_INLINE { return Kept<T, true>{p.values, p.ld, p.M, p.C, p.drop, low}; };
  add_parts(tile, shared, narrow, values, p.narrow.low, std::is_same_v<T, float16>, at.m, at.n, end, begin);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t r = at.m + i, c = at.n + j;
    if (r >= p.R || c >= p.C) return;
    if (p.partial)
      p.partial[(blockIdx.y * p.R + r) * p.C + c] = sum;
    else
      p.store(r, c, sum);
  });
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads) lora_sum_kernel(const Gradient<T> p, int64_t pieces) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, count = p.R * p.C;
  if (i >= count) return;
  float sum = p.partial[i];
  for (int64_t piece = 1; piece < pieces; ++piece) sum += p.partial[piece * count + i];
  p.store(i / p.C, i % p.C, sum);
}

inline int64_t pieces_of(int64_t M) { return max64(1, min64(kMostPieces, M / kPieceTokens)); }

template <typename T>
void gradient(Gradient<T> p, Pieces pieces, Stream stream) {
  if (p.R * p.C == 0) return;
  using Tile = SmallTile<T>;
  p.piece = round_up(ceil_div(p.M, pieces_of(p.M)), Tile::kDepth);
  const int64_t count = max64(1, ceil_div(p.M, max64(1, p.piece)));
  p.partial = count > 1 ? pieces.template take<float>(count * p.R * p.C) : nullptr;
  dim3 grid = tiles_of<Tile>(p.R, p.C);
  grid.y = unsigned(count);
  LK_LAUNCH(lora_gradient_kernel<T>, grid, Tile::kThreads, sizeof(typename Tile::Shared), stream)(p);
  check_launch("lora_gradient_kernel");
  if (count == 1) return;
  LK_LAUNCH(lora_sum_kernel<T>, dim3(unsigned(ceil_div(p.R * p.C, kSumThreads))), kSumThreads, 0, stream)(p, count);
  check_launch("lora_sum_kernel");
}

// ---------------------------------------------------------------------------- the ops

template <typename T, typename P, typename Base>
void backward(T* dx, const Base& base, const AdapterBackward<T, P>& p, void* workspace, Stream stream) {
  const int64_t M = p.M, N = p.N, K = p.K, R = p.lora.R;
  const AnyLora<T> lora(p.lora, N, K);
  Pieces pieces(workspace);
  float* g = pieces.take<float>(M * R);
  const auto b = lora.parts_of_b(pieces, stream);
  const auto g_parts = lora_narrow<true>(pieces, Narrow<T>{g, p.dy, p.dy_row, {}, b, M, R, N, 1.0f}, lora.low, stream);
  const auto h_parts = lora.parts_of(pieces, p.h, M, stream);
  if (dx && M * K > 0) {
    const auto a = lora.parts_of_a(pieces, stream);
    const Dx<T, Base> d{dx, g_parts, a, p.dy, p.dy_row, base, lora.drop, lora.scale, M, N, K, R};
    with_tile<T>(M, K, [&]<typename Tile>() {
      launch_tiles<Tile>("lora_dx_kernel", lora_dx_kernel<T, Tile, Base>, M, K, stream, d);
    });
  }
  Gradient<T> da{}, db{};
  if constexpr (std::is_same_v<P, T>)
    da.same = p.da, db.same = p.db;
  else
    da.wide = p.da, db.wide = p.db;
  da.out_r = K, da.out_c = 1, da.narrow = g_parts, da.values = p.x, da.ld = p.x_row, da.drop = lora.drop;
  db.out_r = 1, db.out_c = R, db.narrow = h_parts, db.values = p.dy, db.ld = p.dy_row;
  da.M = db.M = M, da.R = db.R = R, da.C = K, db.C = N;
  da.factor = lora.scale * lora.drop.keep_scale, db.factor = lora.scale;
  gradient(da, pieces, stream);  // one after the other in the same piece of the workspace
  gradient(db, pieces, stream);
}

template <typename T, typename P>
int64_t backward_bytes(const AdapterBackward<T, P>& p) {
  const AnyLora<T> lora(p.lora, p.N, p.K);
  Pieces pieces;
  pieces.take<float>(p.M * lora.R);
  lora.parts_of_b(pieces, nullptr);
  lora_narrow<true>(pieces, Narrow<T>{nullptr, nullptr, 0, {}, {}, p.M, lora.R, p.N, 1.0f}, lora.low, nullptr);
  lora.parts_of(pieces, nullptr, p.M, nullptr);
  lora.parts_of_a(pieces, nullptr);
  pieces.take<float>(pieces_of(p.M) * lora.R * max64(p.N, p.K));
  return pieces.bytes();
}

template <typename T, typename P>
void lora_linear_backward(const LoraLinearBackward<T, P>& p, void* workspace, Stream stream) {
  backward(p.dx, DenseBase<T, true>{p.w, p.adapter.N, p.adapter.K}, p.adapter, workspace, stream);
}
template <typename T, typename P>
int64_t lora_linear_backward_bytes(const LoraLinearBackward<T, P>& p) {
  return backward_bytes(p.adapter);
}

template <typename T, typename P>
void nf4_lora_linear_backward(const Nf4LoraLinearBackward<T, P>& p, void* workspace, Stream stream) {
  backward(p.dx, Nf4Base<T, true>{p.w}, p.adapter, workspace, stream);
}
template <typename T, typename P>
int64_t nf4_lora_linear_backward_bytes(const Nf4LoraLinearBackward<T, P>& p) {
  return backward_bytes(p.adapter);
}

#define LK_LORA_BACKWARD(T, P)                                                                       \
  static const File<LoraLinearBackward<T, P>> lora_##T##_##P(&lora_linear_backward<T, P>,            \
                                                             &lora_linear_backward_bytes<T, P>);     \
  static const File<Nf4LoraLinearBackward<T, P>> nf4_lora_##T##_##P(&nf4_lora_linear_backward<T, P>, \
                                                                    &nf4_lora_linear_backward_bytes<T, P>)
LK_LORA_BACKWARD(float, float);
LK_LORA_BACKWARD(bfloat16, bfloat16);
LK_LORA_BACKWARD(bfloat16, float);
LK_LORA_BACKWARD(float16, float16);
LK_LORA_BACKWARD(float16, float);

}  // namespace llamakern::cuda
