// What the experts' linears on the GPU are made of: whose rows a tile has, and its operands.
//
// A block finds its rows by itself in the offsets: the host never learns how many an expert has. There are as many
// tiles as the rows can need at most, and the few too many end at once.
//
// The adapter's products run on bfloat16 tensor cores beside bfloat16 activations. What a float32 adapter holds, and h
// and g beside it, are two values there, high + low, split while they come to shared memory (lora_tile.cuh).
#pragma once
#include "../lora/lora_tile.cuh"
#include "../nf4/nf4_decode.cuh"
#include "moe.h"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- groups of rows

struct RowGroups {
  const int32_t* offsets;  // [E + 1]
  int64_t S, E;

  // Of so many rows: a bound that no distribution exceeds.
  LK_HD int64_t tiles(int64_t rows) const { return (S + min64(E, S) * (rows - 1)) / rows; }
};

// A tile's rows: `count` rows of expert e from `begin` on, or none.
struct RowsOfTile {
  int64_t e = 0, begin = 0, count = 0;

  // Of tile `tile` of kRows rows each. Every lane of a warp asks.
  template <int kRows>
  static LK_DEVICE RowsOfTile of(const RowGroups& groups, int64_t tile) {
    const int lane = threadIdx.x % 32;
    int left = int(tile);
    for (int64_t first = 0; first < groups.E; first += 32) {
      const int64_t e = min64(first + lane, groups.E - 1);
      const int begin = groups.offsets[e], end = groups.offsets[e + 1];
      const int mine = first + lane < groups.E ? (end - begin + kRows - 1) / kRows : 0;
      int up_to = mine;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int before = __shfl_up_sync(~0u, up_to, by);
        if (lane >= by) up_to += before;
      }
      const unsigned beyond = __ballot_sync(~0u, up_to > left);
      if (beyond) {
        const int owner = __ffs(int(beyond)) - 1, row = (left - up_to + mine) * kRows;
        const int64_t from = __shfl_sync(~0u, begin + row, owner), to = __shfl_sync(~0u, end, owner);
        return {first + owner, from, min64(kRows, to - from)};
      }
      left -= __shfl_sync(~0u, up_to, 31);
    }
    return {};
  }
};

// Blocks of an SM, which bound the registers: where the tile alone would let four in, what stands beside it takes a
// fourth of them.
template <typename Tile>
constexpr int kGroupedBlocks = Tile::kBlocks < 4 ? Tile::kBlocks : 3;

// ---------------------------------------------------------------------------- operands

// Eight elements as they came, to become elements of a tile in float: float16 experts.
template <bool kAcrossMemory>
struct Widened {
  using Element = float;
  static constexpr bool kAcross = kAcrossMemory;
  static constexpr int kChunk = 8;
  struct Chunk {
    float x[8];
  };
  const float16* data;
  int64_t ld, rows, columns;

  LK_DEVICE void fetch(float*, Chunk& chunk, int64_t row, int64_t column) const {
    load_eight(chunk.x, data + row * ld + column, row < rows ? columns - column : 0, rows_aligned(data, ld));
  }
  LK_DEVICE void put(float* to, const Chunk& chunk) const {
    float4* out = reinterpret_cast<float4*>(to);
    out[0] = float4{chunk.x[0], chunk.x[1], chunk.x[2], chunk.x[3]};
    out[1] = float4{chunk.x[4], chunk.x[5], chunk.x[6], chunk.x[7]};
  }
};

// A factor of an adapter, h or g: the high or the low part of it. It has few columns: nothing is held meanwhile.
template <bool kAcrossMemory>
struct Part {
  using Element = bfloat16;
  static constexpr bool kAcross = kAcrossMemory;
  static constexpr int kChunk = 8;
  struct Chunk {};
  Either<bfloat16> data;
  int64_t ld, rows, columns;
  bool low;

  LK_DEVICE void fetch(bfloat16* to, Chunk&, int64_t row, int64_t column) const {
    const int64_t left = row < rows ? columns - column : 0, at = row * ld + column;
    float x[8];
    if (data.wide)
      load_eight(x, data.wide + at, left, rows_aligned(data.wide, ld));
    else
      load_eight(x, data.same + at, left, rows_aligned(data.same, ld));
    uint32_t pair[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) pair[j] = narrow2<bfloat16>(part(x[2 * j]), part(x[2 * j + 1]));
    *reinterpret_cast<uint4*>(to) = uint4{pair[0], pair[1], pair[2], pair[3]};
  }
  LK_DEVICE void put(bfloat16*, const Chunk&) const {}

 private:
  LK_DEVICE float part(float x) const { return low ? x - widen(narrow<bfloat16>(x)) : x; }
};

template <typename T, bool kAcross>
LK_DEVICE auto part_of(const Either<T>& data, int64_t ld, int64_t rows, int64_t columns, bool low) {
  if constexpr (std::is_same_v<T, float>)
    return Dense<float, kAcross>{data.wide, ld, rows, columns};
  else
    return Part<kAcross>{data, ld, rows, columns, low};
}

// Expert e [N][K].
template <bool kAcross, typename V>
LK_DEVICE Dense<V, kAcross> operand_of(const DenseExperts<V>& w, int64_t e, int64_t N, int64_t K) {
  return {w.w + e * N * K, K, N, K};
}
template <bool kAcross>
LK_DEVICE Widened<kAcross> operand_of(const DenseExperts<float16>& w, int64_t e, int64_t N, int64_t K) {
  return {w.w + e * N * K, K, N, K};
}

// ---------------------------------------------------------------------------- the adapters

// ExpertLora as the kernels of T take it.
template <typename T>
struct Adapters {
  Either<T> a, b;  // [E][R][K], [E][N][R]
  int64_t R;
  float scale;
  bool low;  // whether A, B, h and g have low parts

  template <typename P>
  explicit Adapters(const ExpertLora<P>& lora) : R(lora.R), scale(lora.scale), low(!std::is_same_v<P, T>) {
    if constexpr (std::is_same_v<P, float>) {
      a.wide = lora.a, b.wide = lora.b;
    } else {
      a.same = lora.a, b.same = lora.b;
    }
  }
};

template <typename T>
LK_HD Either<T> at(const Either<T>& x, int64_t i) {
  return {x.same ? x.same + i : nullptr, x.wide ? x.wide + i : nullptr};
}

// ---------------------------------------------------------------------------- what the files call of one another

// out [S][C] = u W_e + scale·narrow factor_e; of W [E][N][K], down its columns (kAcross: C = K, factor A [R][C], as in
// dx = dy W + g A) or along its rows (C = N, factor B [C][R], as in y = x Wᵀ + h Bᵀ). A stack that lies as [E][K][N] is
// the transpose of one of N = K, K = N: the one product takes the other's way over W, with its own factor.
template <typename T, typename Experts>
struct GroupedProduct {
  T* out;
  const T* u;
  int64_t u_row;
  Experts w;
  const float* narrow;  // [S][R]
  Either<T> factor;
  int64_t R;
  float scale;
  bool low, transposed;
  RowGroups groups;
  int64_t N, K;

  GroupedProduct(T* out, const T* u, int64_t u_row, const Experts& w, const float* narrow, const Either<T>& factor,
                 const Adapters<T>& lora, const RowGroups& groups, int64_t N, int64_t K)
      : out(out),
        u(u),
        u_row(u_row),
        w(w),
        narrow(narrow),
        factor(factor),
        R(lora.R),
        scale(lora.scale),
        low(lora.low),
        transposed(false),
        groups(groups),
        N(N),
        K(K) {
    if constexpr (!std::is_same_v<Experts, Nf4Experts>) {
      transposed = w.transposed;
      if (transposed) this->N = K, this->K = N;
    }
  }
};

// `across` for W [E][N][K]: false for y, true for dx.
template <typename T, typename Experts>
void grouped_product(const GroupedProduct<T, Experts>& p, bool across, Stream stream);

// out [S][R] = u factor_e: h = x Aᵀ along the rows of A [R][depth], or g = dy B down the columns of B [depth][R].
template <typename T>
struct GroupedNarrow {
  float* out;
  const T* u;
  int64_t u_row;
  Either<T> factor;
  bool low;
  RowGroups groups;
  int64_t R, depth;
  int64_t pieces = 1, piece = 0;  // of so many steps: a long reduction is cut by its length alone
  float* partial = nullptr;       // [pieces][S][R] where they are several
};

// Without a workspace `pieces` only counts.
template <bool kAcross, typename T>
void grouped_narrow(Pieces& pieces, GroupedNarrow<T> p, Stream stream);

}  // namespace llamakern::cuda
