// The experts' linears backward on the GPU: g = dy B, dx, then dA and dB; and dW. A block sums over all rows of its
// expert in their order, however many they are; without rows it writes zeros.
#include "grouped.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- dA and dB

// out_e(r, c) = scale·Σ_s narrow[s][r] values[s][c] of expert e = blockIdx.y: dA [R][K] of g and x, dB [N][R] of h and
// dy.
template <typename T>
struct AdapterGradient {
  T* same;  // out, of T or float32: element (r, c) at r·out_r + c·out_c
  float* wide;
  int64_t out_r, out_c;
  const float* narrow;  // [S][R]
  const T* values;      // [S][C]
  int64_t ld;
  bool low;
  const int32_t* offsets;
  int64_t R, C;
  float scale;
};

template <typename T>
__global__ void __launch_bounds__(SmallTile<T>::kThreads, 2)
    grouped_adapter_gradient_kernel(const AdapterGradient<T> p) {
  using Tile = SmallTile<T>;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.R, p.C);
  const int64_t e = blockIdx.y, begin = p.offsets[e], count = p.offsets[e + 1] - begin;
  const Either<T> h{nullptr, p.narrow + begin * p.R};
  const auto u = [&](bool low) LK_INLINE { return part_of<T, true>(h, p.R, count, p.R, low); };
  const auto v = [&](bool) LK_INLINE { return Columns<T>{p.values + begin * p.ld, p.ld, count, p.C}; };
  Tile tile;
  add_parts(tile, shared, u, v, p.low, false, at.m, at.n, count);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t r = at.m + i, c = at.n + j, to = e * p.R * p.C + r * p.out_r + c * p.out_c;
    if (r >= p.R || c >= p.C) return;
    if (p.wide)
      p.wide[to] = sum * p.scale;
    else
      p.same[to] = narrow<T>(sum * p.scale);
  });
}

template <typename T>
void adapter_gradient(const AdapterGradient<T>& p, int64_t E, Stream stream) {
  using Tile = SmallTile<T>;
  if (E * p.R * p.C == 0) return;
  dim3 grid = tiles_of<Tile>(p.R, p.C);
  grid.y = unsigned(E);
  LK_LAUNCH(grouped_adapter_gradient_kernel<T>, grid, Tile::kThreads, sizeof(typename Tile::Shared), stream)(p);
  check_launch("grouped_adapter_gradient_kernel");
}

// ---------------------------------------------------------------------------- dW

template <typename T, typename V, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    grouped_weight_gradient_kernel(const GroupedWeightGradient<T, V> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.N, p.K);
  const int64_t e = blockIdx.y, begin = p.offsets[e], count = p.offsets[e + 1] - begin;
  Tile tile;
  tile.add(shared, Columns<T>{p.dy + begin * p.dy_row, p.dy_row, count, p.N},
           Columns<T>{p.x + begin * p.x_row, p.x_row, count, p.K}, at.m, at.n, count);
  V* dw = p.dw + e * p.N * p.K;
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t n = at.m + i, k = at.n + j;
    if (n < p.N && k < p.K) dw[n * p.K + k] = narrow<V>(sum);
  });
}

template <typename Tile, typename T, typename V>
void launch_weight_gradient(const GroupedWeightGradient<T, V>& p, Stream stream) {
  const auto kernel = grouped_weight_gradient_kernel<T, V, Tile>;
  dim3 grid = tiles_of<Tile>(p.N, p.K);
  grid.y = unsigned(p.E);
  allow_shared(kernel, sizeof(typename Tile::Shared));
  LK_LAUNCH_AS("grouped_weight_gradient_kernel", kernel, grid, Tile::kThreads, sizeof(typename Tile::Shared),
               stream)(p);
  check_launch("grouped_weight_gradient_kernel");
}

template <typename T, typename V>
void grouped_weight_gradient(const GroupedWeightGradient<T, V>& p, void*, Stream stream) {
  if (p.E * p.N * p.K == 0) return;
  if (wants_large<T>(p.N, p.K * p.E))
    launch_weight_gradient<LargeTile<T>>(p, stream);
  else
    launch_weight_gradient<SmallTile<T>>(p, stream);
}

// ---------------------------------------------------------------------------- the ops

template <typename T, typename Experts, typename P>
GroupedNarrow<T> narrow_of(const GroupedLinearBackward<T, Experts, P>& p, const Adapters<T>& lora, float* g) {
  return {g, p.dy, p.dy_row, lora.b, lora.low, {p.offsets, p.S, p.E}, lora.R, p.N};
}

template <typename T, typename Experts, typename P>
int64_t grouped_backward_bytes(const GroupedLinearBackward<T, Experts, P>& p) {
  Pieces pieces;
  pieces.take<float>(p.S * p.lora.R);
  grouped_narrow<true>(pieces, narrow_of(p, Adapters<T>(p.lora), nullptr), nullptr);
  return pieces.bytes();
}

template <typename T, typename Experts, typename P>
void grouped_backward(const GroupedLinearBackward<T, Experts, P>& p, void* workspace, Stream stream) {
  const Adapters<T> lora(p.lora);
  Pieces pieces(workspace);
  float* g = pieces.take<float>(p.S * lora.R);
  grouped_narrow<true>(pieces, narrow_of(p, lora, g), stream);
  const RowGroups groups{p.offsets, p.S, p.E};
  if (p.dx)
    grouped_product(GroupedProduct<T, Experts>(p.dx, p.dy, p.dy_row, p.w, g, lora.a, lora, groups, p.N, p.K), true,
                    stream);
  if (lora.R == 0) return;
  AdapterGradient<T> da{}, db{};
  if constexpr (std::is_same_v<P, float>)
    da.wide = p.da, db.wide = p.db;
  else
    da.same = p.da, db.same = p.db;
  da.out_r = p.K, da.out_c = 1, da.narrow = g, da.values = p.x, da.ld = p.x_row, da.C = p.K;
  db.out_r = 1, db.out_c = lora.R, db.narrow = p.h, db.values = p.dy, db.ld = p.dy_row, db.C = p.N;
  da.low = db.low = lora.low, da.offsets = db.offsets = p.offsets, da.R = db.R = lora.R;
  da.scale = db.scale = lora.scale;
  adapter_gradient(da, p.E, stream);
  adapter_gradient(db, p.E, stream);
}

#define LK_GROUPED_BACKWARD(Experts, T, P)                                                     \
  static const File<GroupedLinearBackward<T, Experts, P>> LK_JOIN_TOKENS(filed_, __COUNTER__)( \
      &grouped_backward<T, Experts, P>, &grouped_backward_bytes<T, Experts, P>)
LK_GROUPED_BACKWARD(DenseExperts<float>, float, float);
LK_GROUPED_BACKWARD(DenseExperts<float16>, float, float);
LK_GROUPED_BACKWARD(DenseExperts<bfloat16>, bfloat16, bfloat16);
LK_GROUPED_BACKWARD(DenseExperts<bfloat16>, bfloat16, float);
LK_GROUPED_BACKWARD(Nf4Experts, float, float);
LK_GROUPED_BACKWARD(Nf4Experts, bfloat16, bfloat16);
LK_GROUPED_BACKWARD(Nf4Experts, bfloat16, float);

using FloatGradient = GroupedWeightGradient<float, float>;
using Float16Gradient = GroupedWeightGradient<float, float16>;
using Bfloat16Gradient = GroupedWeightGradient<bfloat16, bfloat16>;
LK_CUDA_KERNEL(FloatGradient, grouped_weight_gradient<float, float>);
LK_CUDA_KERNEL(Float16Gradient, grouped_weight_gradient<float, float16>);
LK_CUDA_KERNEL(Bfloat16Gradient, grouped_weight_gradient<bfloat16, bfloat16>);

}  // namespace llamakern::cuda
