// The experts' linears on the GPU: tiles that find their expert. LoRA is R more columns of the reduction.
#include "../nf4/nf4_stream.cuh"
#include "grouped.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- products

template <typename T, bool kAcross, typename Experts>
LK_DEVICE auto weight_of(const Experts& w, int64_t e, int64_t N, int64_t K) {
  if constexpr (std::is_same_v<Experts, Nf4Experts>)
    return Nf4Operand<T, kAcross>(w[e]);
  else
    return operand_of<kAcross>(w, e, N, K);
}

// tile += narrow factor_e, columns n ... of C: the factor lies as [R][C] (kAcross) or as [C][R].
template <bool kAcross, typename T, typename Tile, typename Product>
LK_DEVICE void add_adapter(Tile& tile, typename Tile::Shared& shared, const Product& p, int64_t e, int64_t begin,
                           int64_t count, int64_t n, int64_t C) {
  const Either<T> h{nullptr, p.narrow + begin * p.R}, factor = at(p.factor, e * p.R * C);
  const auto u = [&](bool low) LK_INLINE { return part_of<T, false>(h, p.R, count, p.R, low); };
  const auto v = [&](bool low) LK_INLINE {
    return part_of<T, kAcross>(factor, kAcross ? C : p.R, kAcross ? p.R : C, kAcross ? C : p.R, low);
  };
  add_parts(tile, shared, u, v, p.low, p.low, 0, n, p.R);
}

template <typename T, typename Tile, bool kAcross, typename Experts>
__global__ void __launch_bounds__(Tile::kThreads, kGroupedBlocks<Tile>)
    grouped_product_kernel(const GroupedProduct<T, Experts> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const int64_t C = kAcross ? p.K : p.N, depth = kAcross ? p.N : p.K;
  const TileAt<Tile> at(p.groups.tiles(Tile::kRows) * Tile::kRows, C);
  const auto [e, begin, count] = RowsOfTile::of<Tile::kRows>(p.groups, at.m / Tile::kRows);
  if (count == 0) return;
  Tile tile;
  if (p.R) {
    if (!std::is_same_v<Experts, Nf4Experts> && p.transposed)
      add_adapter<!kAcross, T>(tile, shared, p, e, begin, count, at.n, C);
    else
      add_adapter<kAcross, T>(tile, shared, p, e, begin, count, at.n, C);
    tile.each([&](int, int, float& sum) LK_INLINE { sum *= p.scale; });
  }
  const Rows<T> u{p.u + begin * p.u_row, p.u_row, count, depth};
  tile.add(shared, u, weight_of<T, kAcross>(p.w, e, p.N, p.K), 0, at.n, depth);
  T* out = p.out + begin * C;
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t n = at.n + j;
    if (i < count && n < C) out[i * C + n] = narrow<T>(sum);
  });
}

template <typename Tile, bool kAcross, typename T, typename Experts>
void launch_product(const GroupedProduct<T, Experts>& p, Stream stream) {
  const auto kernel = grouped_product_kernel<T, Tile, kAcross, Experts>;
  const dim3 grid = tiles_of<Tile>(p.groups.tiles(Tile::kRows) * Tile::kRows, kAcross ? p.K : p.N);
  allow_shared(kernel, sizeof(typename Tile::Shared));
  LK_LAUNCH_AS("grouped_product_kernel", kernel, grid, Tile::kThreads, sizeof(typename Tile::Shared), stream)(p);
  check_launch("grouped_product_kernel");
}

// Large tiles where an expert has rows enough for them on average, and there are enough of them.
template <bool kAcross, typename T, typename Experts>
void choose_product(const GroupedProduct<T, Experts>& p, Stream stream) {
  using Large = LargeTile<T>;
  const bool large = p.groups.S >= p.groups.E * (Large::kRows / 2) && wants_large<T>(p.groups.S, kAcross ? p.K : p.N);
  if (large)
    launch_product<Large, kAcross>(p, stream);
  else
    launch_product<SmallTile<T>, kAcross>(p, stream);
}

// y = x Wᵀ over NF4 for few rows of each expert: the nf4 room's stream through the bytes of W.
constexpr int kStreamedRows = 16;

static __global__ void __launch_bounds__(kStreamThreads, 2)
    grouped_stream_kernel(const GroupedProduct<bfloat16, Nf4Experts> p) {
  __shared__ uint32_t table[kStreamTable];
  const auto [e, begin, count] = RowsOfTile::of<kStreamedRows>(p.groups, blockIdx.y);
  if (count == 0) return;
  const Nf4Linear<bfloat16> linear{
      .y = p.out + begin * p.N, .x = p.u + begin * p.u_row, .x_row = p.u_row, .w = p.w[e], .bias = {}, .M = count};
  const AdapterTerm<bfloat16> term{p.narrow + begin * p.R, cuda::at(p.factor, e * p.N * p.R), p.R, p.scale};
  nf4_stream_rows<bfloat16, kStreamedRows / 16>(linear, term, table);
}

template <typename T, typename Experts>
bool stream_product(const GroupedProduct<T, Experts>&, Stream) {
  return false;
}
static bool stream_product(const GroupedProduct<bfloat16, Nf4Experts>& p, Stream stream) {
  const int64_t tiles = p.groups.tiles(kStreamedRows);
  const Nf4Linear<bfloat16> first{
      .y = p.out, .x = p.u, .x_row = p.u_row, .w = p.w.first, .bias = {}, .M = kStreamedRows};
  if (p.groups.S > max64(kStreamTokens, p.groups.E * kStreamedRows / 2) || tiles > kMaxGridY || !can_stream(first))
    return false;
  const dim3 grid(unsigned(ceil_div(p.N, kStreamRows)), unsigned(tiles));
  LK_LAUNCH(grouped_stream_kernel, grid, kStreamThreads, 0, stream)(p);
  check_launch("grouped_stream_kernel");
  return true;
}

template <typename T, typename Experts>
void grouped_product(const GroupedProduct<T, Experts>& p, bool across, Stream stream) {
  across = across != p.transposed;
  if (p.groups.S * (across ? p.K : p.N) == 0) return;
  if (!across && stream_product(p, stream)) return;
  if (across)
    choose_product<true>(p, stream);
  else
    choose_product<false>(p, stream);
}

template void grouped_product(const GroupedProduct<float, DenseExperts<float>>&, bool, Stream);
template void grouped_product(const GroupedProduct<float, DenseExperts<float16>>&, bool, Stream);
template void grouped_product(const GroupedProduct<bfloat16, DenseExperts<bfloat16>>&, bool, Stream);
template void grouped_product(const GroupedProduct<float, Nf4Experts>&, bool, Stream);
template void grouped_product(const GroupedProduct<bfloat16, Nf4Experts>&, bool, Stream);

// ---------------------------------------------------------------------------- h and g

template <typename T, bool kAcross>
__global__ void __launch_bounds__(SmallTile<T>::kThreads, kGroupedBlocks<SmallTile<T>>)
    grouped_narrow_kernel(const GroupedNarrow<T> p) {
  using Tile = SmallTile<T>;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.groups.tiles(Tile::kRows) * Tile::kRows, p.R);
  const auto [e, begin, count] = RowsOfTile::of<Tile::kRows>(p.groups, at.m / Tile::kRows);
  if (count == 0) return;
  const Either<T> factor = cuda::at(p.factor, e * p.R * p.depth);
  const auto u = [&](bool) LK_INLINE { return Rows<T>{p.u + begin * p.u_row, p.u_row, count, p.depth}; };
  const auto v = [&](bool low) LK_INLINE {
    return part_of<T, kAcross>(factor, kAcross ? p.R : p.depth, kAcross ? p.depth : p.R, kAcross ? p.R : p.depth, low);
  };
  const int64_t first = blockIdx.y * p.piece, last = min64(p.depth, first + p.piece);
  Tile tile;
  add_parts(tile, shared, u, v, false, p.low, 0, at.n, last, first);
  float* out = (p.partial ? p.partial + blockIdx.y * p.groups.S * p.R : p.out) + begin * p.R;
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t r = at.n + j;
    if (i < count && r < p.R) out[i * p.R + r] = sum;
  });
}

static __global__ void __launch_bounds__(kSplitThreads)
    grouped_narrow_sum_kernel(float* out, const float* partial, int64_t pieces, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (i >= count) return;
  float sum = partial[i];
  for (int64_t piece = 1; piece < pieces; ++piece) sum += partial[piece * count + i];
  out[i] = sum;
}

template <bool kAcross, typename T>
void grouped_narrow(Pieces& pieces, GroupedNarrow<T> p, Stream stream) {
  using Tile = SmallTile<T>;
  const int64_t count = p.groups.S * p.R;
  p.pieces = max64(1, min64(kMostPieces, p.depth / kPieceSteps));
  p.piece = max64(1, round_up(ceil_div(p.depth, p.pieces), Tile::kDepth));
  p.pieces = max64(1, ceil_div(p.depth, p.piece));
  p.partial = p.pieces > 1 ? pieces.template take<float>(p.pieces * count) : nullptr;
  if (!p.out || count == 0) return;
  dim3 grid = tiles_of<Tile>(p.groups.tiles(Tile::kRows) * Tile::kRows, p.R);
  grid.y = unsigned(p.pieces);
  const auto kernel = grouped_narrow_kernel<T, kAcross>;
  LK_LAUNCH_AS("grouped_narrow_kernel", kernel, grid, Tile::kThreads, sizeof(typename Tile::Shared), stream)(p);
  check_launch("grouped_narrow_kernel");
  if (p.pieces == 1) return;
  const unsigned blocks = unsigned(ceil_div(count, kSplitThreads));
  LK_LAUNCH(grouped_narrow_sum_kernel, blocks, kSplitThreads, 0, stream)(p.out, p.partial, p.pieces, count);
  check_launch("grouped_narrow_sum_kernel");
}

template void grouped_narrow<true>(Pieces&, GroupedNarrow<float>, Stream);
template void grouped_narrow<true>(Pieces&, GroupedNarrow<bfloat16>, Stream);

// ---------------------------------------------------------------------------- the ops

template <typename T, typename Experts, typename P>
GroupedNarrow<T> narrow_of(const GroupedLinear<T, Experts, P>& p, float* h) {
  const Adapters<T> lora(p.lora);
  return {h, p.x, p.x_row, lora.a, lora.low, {p.offsets, p.S, p.E}, lora.R, p.K};
}

template <typename T, typename Experts, typename P>
int64_t grouped_linear_bytes(const GroupedLinear<T, Experts, P>& p) {
  Pieces pieces;
  grouped_narrow<false>(pieces, narrow_of(p, nullptr), nullptr);
  return pieces.bytes();
}

template <typename T, typename Experts, typename P>
void grouped_linear(const GroupedLinear<T, Experts, P>& p, void* workspace, Stream stream) {
  const Adapters<T> lora(p.lora);
  Pieces pieces(workspace);
  grouped_narrow<false>(pieces, narrow_of(p, p.h), stream);
  const RowGroups groups{p.offsets, p.S, p.E};
  grouped_product(GroupedProduct<T, Experts>(p.y, p.x, p.x_row, p.w, p.h, lora.b, lora, groups, p.N, p.K), false,
                  stream);
}

#define LK_GROUPED(Experts, T, P)                                                      \
  static const File<GroupedLinear<T, Experts, P>> LK_JOIN_TOKENS(filed_, __COUNTER__)( \
      &grouped_linear<T, Experts, P>, &grouped_linear_bytes<T, Experts, P>)
LK_GROUPED(DenseExperts<float>, float, float);
LK_GROUPED(DenseExperts<float16>, float, float);
LK_GROUPED(DenseExperts<bfloat16>, bfloat16, bfloat16);
LK_GROUPED(DenseExperts<bfloat16>, bfloat16, float);
LK_GROUPED(Nf4Experts, float, float);
LK_GROUPED(Nf4Experts, bfloat16, bfloat16);
LK_GROUPED(Nf4Experts, bfloat16, float);

}  // namespace llamakern::cuda
