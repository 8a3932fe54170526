// A tile of C = U Vᵀ: the word that every matmul kernel is made of. A block of threads keeps the tile in registers, in
// float, and adds products to it; slices of U and V come through shared memory in two buffers, one of them multiplied
// while the next one lands.
//
//   using Tile = LargeTile<T>;                          // tensor cores for bfloat16 and float16, FMAs for float
//   LK_DYNAMIC_SHARED(Tile::Shared, shared);            // sizeof(Tile::Shared) bytes at the launch
//   Tile tile;                                          // zeros
//   tile.add(shared, u, v, m, n, K);                    // C[m ..., n ...] += sum over [0, K), or over [begin, K) with
//                                                       // one argument more; as often as there are terms
//   tile.each([&](int m, int n, float& c) { ... });     // this thread's elements, by their place in the tile
//
// u and v are operands: Rows {data, ld, rows, columns} where a row of memory is a row of U (of V) and the reduction
// runs along it, Columns where it is one step of the reduction and C's rows (columns) run along it. Any struct with the
// four members that they have will do, such as one that decodes or masks. What lies outside the operand counts as 0.
//
// An element's sum runs in the order of k whatever the tile: its bits depend on neither the tile nor its place in it.
#pragma once
#include "cuda.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- operands

// x[0 ... 8) of which `left` exist; the others are 0.
template <typename T>
LK_DEVICE void load_eight(float (&out)[8], const T* x, int64_t left, bool aligned) {
  if (aligned && left >= 8) {
    if constexpr (std::is_same_v<T, float>) {
      const float4 first = reinterpret_cast<const float4*>(x)[0], second = reinterpret_cast<const float4*>(x)[1];
      out[0] = first.x, out[1] = first.y, out[2] = first.z, out[3] = first.w;
      out[4] = second.x, out[5] = second.y, out[6] = second.z, out[7] = second.w;
    } else {
      const uint4 v = *reinterpret_cast<const uint4*>(x);
      const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[2 * i] = widen(T{uint16_t(pair[i])});
        out[2 * i + 1] = widen(T{uint16_t(pair[i] >> 16)});
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < left ? widen(x[i]) : 0.0f;
  }
}

template <typename T>
LK_DEVICE bool rows_aligned(const T* x, int64_t x_row) {
  return (reinterpret_cast<uintptr_t>(x) | uintptr_t(x_row * int64_t(sizeof(T)))) % 16 == 0;
}

// 16 bytes of E's at `to`, a place in the tile, from source[0 ... left), zeros behind them.
template <typename E>
LK_DEVICE void copy_chunk(E* to, const E* source, int64_t left, bool aligned) {
  constexpr int chunk = 16 / sizeof(E);
  const int there = left < chunk ? int(left > 0 ? left : 0) : chunk;
  if (aligned) {
    cp_async<16>(to, source, unsigned(there * sizeof(E)));
  } else {
#pragma unroll
    for (int i = 0; i < chunk; ++i) to[i] = i < there ? source[i] : E{};
  }
}

// A matrix in memory, in the tile's own type.
template <typename E, bool kAcrossMemory>
struct Dense {
  using Element = E;
  static constexpr bool kAcross = kAcrossMemory;  // a row of memory is a step of the reduction
  static constexpr int kChunk = 16 / sizeof(E);   // elements that a thread brings at once
  struct Chunk {};                                // what it holds of them meanwhile

  const E* data;  // [rows][columns]
  int64_t ld, rows, columns;

  // Begins to bring elements (row, column) ... to their place in the tile.
  LK_DEVICE void fetch(E* to, Chunk&, int64_t row, int64_t column) const {
    const bool inside = row < rows && column < columns;
    copy_chunk(to, inside ? data + row * ld + column : data, inside ? columns - column : 0, rows_aligned(data, ld));
  }
  // Ends it, after the slice before was multiplied.
  LK_DEVICE void put(E*, const Chunk&) const {}
};
template <typename E>
using Rows = Dense<E, false>;
template <typename E>
using Columns = Dense<E, true>;

// A slice of one operand: kSide rows (columns) of C and kDepth steps of the reduction.
template <typename Operand, int kSide, int kDepth, int kThreads>
struct Slice {
  using Element = typename Operand::Element;
  static constexpr int kHeight = Operand::kAcross ? kDepth : kSide, kWidth = Operand::kAcross ? kSide : kDepth;
  static constexpr int kRow = kWidth + 16 / int(sizeof(Element));  // 8 rows of an ldmatrix fall in different banks
  static constexpr int kAcrossRow = kWidth / Operand::kChunk, kChunks = kHeight * kAcrossRow;
  static constexpr int kMine = (kChunks + kThreads - 1) / kThreads;
  static_assert(kWidth % Operand::kChunk == 0);
  typename Operand::Chunk chunk[kMine];

  LK_DEVICE void fetch(const Operand& operand, Element* tile, int64_t side, int64_t k) {
    const int64_t row = Operand::kAcross ? k : side, column = Operand::kAcross ? side : k;
    each_chunk([&](int i, int y, int x)
                   LK_INLINE { operand.fetch(tile + y * kRow + x, chunk[i], row + y, column + x); });
  }
  LK_DEVICE void put(const Operand& operand, Element* tile) {
    each_chunk([&](int i, int y, int x) LK_INLINE { operand.put(tile + y * kRow + x, chunk[i]); });
  }

 private:
  template <typename Fn>
  LK_DEVICE static void each_chunk(const Fn& fn) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int at = int(threadIdx.x) + i * kThreads;
      if (kChunks % kThreads == 0 || at < kChunks) fn(i, at / kAcrossRow, at % kAcrossRow * Operand::kChunk);
    }
  }
};

// Bytes that a slice of either direction fits in.
constexpr int slice_bytes(int side, int depth, int element) {
  const int along = side * (depth * element + 16), across = depth * (side * element + 16);
  return along > across ? along : across;
}

// Slice after slice of steps [begin, end) through two buffers: multiply(u, v) takes those that have landed.
template <typename Tile, typename U, typename V, typename Multiply>
LK_DEVICE void for_slices(typename Tile::Shared& shared, const U& u, const V& v, int64_t m, int64_t n, int64_t begin,
                          int64_t end, const Multiply& multiply) {
  Slice<U, Tile::kRows, Tile::kDepth, Tile::kThreads> u_slice;
  Slice<V, Tile::kColumns, Tile::kDepth, Tile::kThreads> v_slice;
  const auto u_tile = [&](int b) LK_INLINE { return reinterpret_cast<typename U::Element*>(shared.u[b]); };
  const auto v_tile = [&](int b) LK_INLINE { return reinterpret_cast<typename V::Element*>(shared.v[b]); };
  const auto fetch = [&](int b, int64_t k) LK_INLINE {
    u_slice.fetch(u, u_tile(b), m, k);
    v_slice.fetch(v, v_tile(b), n, k);
    cp_async_commit();
  };
  const auto land = [&](int b) LK_INLINE {
    u_slice.put(u, u_tile(b));
    v_slice.put(v, v_tile(b));
  };
  if (begin < end) {
    fetch(0, begin);
    land(0);
  }
  for (int64_t k = begin, now = 0; k < end; k += Tile::kDepth, now ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const bool more = k + Tile::kDepth < end;
    if (more) fetch(int(now ^ 1), k + Tile::kDepth);
    multiply(u_tile(int(now)), v_tile(int(now)));
    if (more) land(int(now ^ 1));
  }
  __syncthreads();  // the buffers are free for the next term
}

// ---------------------------------------------------------------------------- tensor cores

// kBlocks: that an SM is to hold at once, which bounds the registers of a kernel's __launch_bounds__.
template <int kM, int kN, int kWarpsM, int kWarpsN, int kBlocksOfSm>
struct MmaTile {
  static constexpr int kRows = kM, kColumns = kN, kDepth = 64, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlocks = kBlocksOfSm;
  static constexpr int kWarpRows = kM / kWarpsM, kWarpColumns = kN / kWarpsN;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0);
  struct Shared {
    __align__(16) unsigned char u[2][slice_bytes(kM, kDepth, 2)];
    __align__(16) unsigned char v[2][slice_bytes(kN, kDepth, 2)];
  };

  float sum[kWarpRows / 16][kWarpColumns / 8][4] = {};

  template <typename U, typename V>
  LK_DEVICE void add(Shared& shared, const U& u, const V& v, int64_t m, int64_t n, int64_t end, int64_t begin = 0) {
    static_assert(std::is_same_v<typename U::Element, typename V::Element>);
    for_slices<MmaTile>(shared, u, v, m, n, begin, end, [&](const auto* u_tile, const auto* v_tile) LK_INLINE {
      multiply<typename U::Element, U::kAcross, V::kAcross>(u_tile, v_tile);
    });
  }

  template <typename Fn>
  LK_DEVICE void each(const Fn& fn) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          fn(warp_row() + 16 * i + lane / 4 + e / 2 * 8, warp_column() + 8 * j + lane % 4 * 2 + e % 2, sum[i][j][e]);
      }
    }
  }

 private:
  LK_DEVICE static int warp_row() { return int(threadIdx.x) / 32 / kWarpsN * kWarpRows; }
  LK_DEVICE static int warp_column() { return int(threadIdx.x) / 32 % kWarpsN * kWarpColumns; }

  template <typename E, bool kUAcross, bool kVAcross>
  LK_DEVICE void multiply(const E* u, const E* v) {
    constexpr int u_row = (kUAcross ? kM : kDepth) + 8, v_row = (kVAcross ? kN : kDepth) + 8;
    const int lane = threadIdx.x % 32, r = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kWarpRows / 16][4], b[kWarpColumns / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
        const int m = warp_row() + 16 * i;
        ldmatrix<kUAcross>(a[i],
                           kUAcross ? u + (k + high + r) * u_row + m + low : u + (m + low + r) * u_row + k + high);
      }
#pragma unroll
      for (int j = 0; j < kWarpColumns / 16; ++j) {
        const int n = warp_column() + 16 * j;
        ldmatrix<kVAcross>(b[j],
                           kVAcross ? v + (k + low + r) * v_row + n + high : v + (n + high + r) * v_row + k + low);
      }
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<E>(sum[i][j], a[i], pair);
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------- float32

// A thread makes 8 x 4 elements. The products of a slice are summed before they join the total: a long reduction loses
// less.
struct FloatTile {
  static constexpr int kRows = 64, kColumns = 64, kDepth = 32, kThreads = 128, kBlocks = 2;
  struct Shared {
    __align__(16) unsigned char u[2][slice_bytes(kRows, kDepth, 4)];
    __align__(16) unsigned char v[2][slice_bytes(kColumns, kDepth, 4)];
  };

  float sum[8][4] = {};

  template <typename U, typename V>
  LK_DEVICE void add(Shared& shared, const U& u, const V& v, int64_t m, int64_t n, int64_t end, int64_t begin = 0) {
    for_slices<FloatTile>(shared, u, v, m, n, begin, end, [&](const float* u_tile, const float* v_tile) LK_INLINE {
      multiply<U::kAcross, V::kAcross>(u_tile, v_tile);
    });
  }

  template <typename Fn>
  LK_DEVICE void each(const Fn& fn) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) fn(row(i), column(j), sum[i][j]);
    }
  }

 private:
  LK_DEVICE static int row(int i) { return int(threadIdx.x) / 16 + 8 * i; }
  LK_DEVICE static int column(int j) { return int(threadIdx.x) % 16 + 16 * j; }

  // Elements k ... k + 3 of one row of the tile's side.
  template <bool kAcross, int kSide>
  LK_DEVICE static float4 four(const float* tile, int side, int k) {
    if constexpr (!kAcross) {
      return *reinterpret_cast<const float4*>(tile + side * (kDepth + 4) + k);
    } else {
      const float* at = tile + k * (kSide + 4) + side;
      constexpr int row = kSide + 4;
      return float4{at[0], at[row], at[2 * row], at[3 * row]};
    }
  }

  template <bool kUAcross, bool kVAcross>
  LK_DEVICE void multiply(const float* u, const float* v) {
    float part[8][4] = {};
#pragma unroll 2
    for (int k = 0; k < kDepth; k += 4) {
      float4 b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = four<kVAcross, kColumns>(v, column(j), k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 a = four<kUAcross, kRows>(u, row(i), k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          part[i][j] = fmaf(a.x, b[j].x, part[i][j]);
          part[i][j] = fmaf(a.y, b[j].y, part[i][j]);
          part[i][j] = fmaf(a.z, b[j].z, part[i][j]);
          part[i][j] = fmaf(a.w, b[j].w, part[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    }
  }
};

// ---------------------------------------------------------------------------- grids

template <typename T>
using LargeTile = std::conditional_t<std::is_same_v<T, float>, FloatTile, MmaTile<128, 128, 2, 4, 1>>;
template <typename T>
using SmallTile = std::conditional_t<std::is_same_v<T, float>, FloatTile, MmaTile<32, 64, 2, 2, 4>>;

// Whether C [M][N] has enough large tiles to keep a GPU busy. The choice changes no bits.
template <typename T>
bool wants_large(int64_t M, int64_t N) {
  using Tile = LargeTile<T>;
  return ceil_div(M, Tile::kRows) * ceil_div(N, Tile::kColumns) >= 64;
}

// A grid of one block for each tile of C [M][N].
template <typename Tile>
inline dim3 tiles_of(int64_t M, int64_t N) {
  return dim3(unsigned(ceil_div(M, Tile::kRows) * ceil_div(N, Tile::kColumns)));
}

// The kernel over them; nothing where C is empty.
template <typename Tile, typename Kernel, typename... Arguments>
void launch_tiles(const char* name, Kernel kernel, int64_t M, int64_t N, Stream stream, const Arguments&... arguments) {
  if (M * N == 0) return;
  allow_shared(kernel, sizeof(typename Tile::Shared));
  LK_LAUNCH_AS(name, kernel, tiles_of<Tile>(M, N), Tile::kThreads, sizeof(typename Tile::Shared), stream)(arguments...);
  check_launch(name);
}

// fn<Tile>() with the tile that suits C [M][N].
template <typename T, typename Fn>
void with_tile(int64_t M, int64_t N, const Fn& fn) {
  if (wants_large<T>(M, N))
    fn.template operator()<LargeTile<T>>();
  else
    fn.template operator()<SmallTile<T>>();
}

// Where the block's tile lies. Blocks that run together share rows of U and of V: eight tiles down, then to the right.
template <typename Tile>
struct TileAt {
  int64_t m, n;

  LK_DEVICE TileAt(int64_t M, int64_t N) {
    const int64_t down = (M + Tile::kRows - 1) / Tile::kRows, right = (N + Tile::kColumns - 1) / Tile::kColumns;
    const int64_t band = blockIdx.x / (8 * right), within = blockIdx.x % (8 * right);
    const int64_t height = min64(8, down - 8 * band);
    m = (8 * band + within % height) * Tile::kRows;
    n = within / height * Tile::kColumns;
  }
};

}  // namespace llamakern::cuda
