// Whose rows a block of the GPU takes: tiles of the rows of one key/value head of one sequence, as the CPU's Group.
//
// The rows of a head are t·G + g: the G query heads that share it, token by token, so that a tile of keys is read once
// for all of them. The grid has room for every way to cut the tokens into sequences: it depends on no device value.
#pragma once
#include "attention_tile.cuh"

namespace llamakern::cuda {

// The operands with what is worked out of them once, on the host.
template <typename T>
struct Operands {
  Attended<T> in;
  Divide group, block;                   // by G, and by the tokens of a block of the cache
  int64_t chunks = 1, chunk_tokens = 0;  // the queries of a sequence may be cut into sequences of so many tokens
  bool q_sixteens, k_sixteens, v_sixteens;

  explicit Operands(const Attended<T>& in)
      : in(in),
        group(in.G()),
        block(max64(1, in.block)),
        q_sixteens(in_sixteens(in.q)),
        k_sixteens(in_sixteens(in.k)),
        v_sixteens(in_sixteens(in.v)) {}
};

// Places for tiles of `size` rows, with `per_token` rows to a token: sequence n has its first at
// start_n·per_token / size + n where sequences are packed.
template <typename T>
LK_HD int64_t tile_places(const Operands<T>& o, int64_t tokens, int64_t per_token, int64_t size) {
  if (o.in.starts_q) return tokens * per_token / size + o.in.sequences;
  return ceil_div(tokens * per_token, size) * o.in.sequences * o.chunks;
}

struct Tile {
  int sequence;
  int b, q_begin, k_begin, T, S;  // the sequence
  int kv;
  int first;  // row
  int rows;   // of the head in all; the tile does not exist where first >= rows
};

// Tile number `block` of tile_places(...) for each key/value head. The last tiles of a sequence come first: where
// causal, they are the longest.
template <typename T>
LK_DEVICE Tile find_tile(const Operands<T>& o, const int32_t* starts, int64_t tokens, int64_t per_token, int size,
                         bool of_keys, int64_t block) {
  const Attended<T>& in = o.in;
  const int64_t places = tile_places(o, tokens, per_token, size);
  int64_t n, index;
  if (starts) {
    const int64_t place = block % places;
    int64_t low = 0, high = in.sequences;  // the place of low <= place < that of high
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (starts[middle] * per_token / size + middle <= place ? low : high) = middle;
    }
    n = low;
    index = place - (starts[n] * per_token / size + n);
  } else {
    const int64_t tiles = ceil_div(tokens * per_token, size);
    n = block % places / tiles;
    index = block % tiles;
  }
  Sequence at = in.sequence(n / o.chunks);
  if (o.chunks > 1) {
    at.q_begin = n % o.chunks * o.chunk_tokens;
    at.T = min64(o.chunk_tokens, at.T - at.q_begin);
  }
  Tile tile{int(n), int(at.b), int(at.q_begin), int(at.k_begin), int(at.T), int(at.S), int(block / places), 0, 0};
  tile.rows = int((of_keys ? at.S : at.T) * per_token);
  const int count = (tile.rows + size - 1) / size;
  tile.first = index < count ? (count - 1 - int(index)) * size : tile.rows;
  return tile;
}

template <typename T>
LK_DEVICE Tile find_query_tile(const Operands<T>& o, int size, int64_t block) {
  return find_tile(o, o.in.starts_q, o.in.T_, o.in.G(), size, false, block);
}
template <typename T>
LK_DEVICE Tile find_key_tile(const Operands<T>& o, int size, int64_t block) {
  return find_tile(o, o.in.starts_k, o.in.S, 1, size, true, block);
}

template <typename T>
LK_DEVICE int64_t query_head(const Operands<T>& o, const Tile& tile, int row) {
  const uint32_t t = o.group.quotient(uint32_t(row));
  return tile.kv * int64_t(o.group.d) + uint32_t(row) - t * o.group.d;
}
// Row `row` of x, [B, T, H, D], or null.
template <typename U, typename T>
LK_DEVICE U* query_row(const Heads<U>& x, const Operands<T>& o, const Tile& tile, int row) {
  if (row >= tile.T * int(o.group.d)) return nullptr;
  const uint32_t t = o.group.quotient(uint32_t(row)), g = uint32_t(row) - t * o.group.d;
  return x.at(tile.b, tile.q_begin + int64_t(t), tile.kv * int64_t(o.group.d) + g);
}
// Key j of x, [B, S, Hkv, D] or blocks, or null.
template <typename U, typename T>
LK_DEVICE U* key_row(const Heads<U>& x, const Operands<T>& o, const Tile& tile, int j) {
  if (j >= tile.S) return nullptr;
  if (!o.in.block_table) return x.at(tile.b, tile.k_begin + int64_t(j), tile.kv);
  const uint32_t n = o.block.quotient(uint32_t(j));
  return x.at(o.in.block_table[tile.b * o.in.table_width + n], uint32_t(j) - n * o.block.d, tile.kv);
}

// Where lse has row `row`: [B, H, T].
template <typename T>
LK_DEVICE int64_t lse_index(const Operands<T>& o, const Tile& tile, int row) {
  const uint32_t t = o.group.quotient(uint32_t(row)), g = uint32_t(row) - t * o.group.d;
  return (int64_t(tile.b) * o.in.H + tile.kv * int64_t(o.group.d) + g) * o.in.T_ + tile.q_begin + int64_t(t);
}
// Rows of all heads in the order of their tiles: [B, Hkv, T·G].
template <typename T>
LK_DEVICE int64_t row_index(const Operands<T>& o, const Tile& tile, int row) {
  return ((int64_t(tile.b) * o.in.Hkv + tile.kv) * o.in.T_ + tile.q_begin) * int64_t(o.group.d) + row;
}
template <typename T>
LK_HD int64_t all_rows(const Attended<T>& in) {
  return (in.starts_q ? 1 : in.sequences) * in.T_ * in.H;
}

// Keys that a row may see; and, in rows 0 to kWarps - 1, those that some row of a warp may.
struct alignas(16) SeenKeys {
  int begin, end, any_begin, any_end;
};

// Those that some row of the block may see, from what each lane knows of its rows.
template <int kWarps, int kD, typename T>
LK_DEVICE int2 reach_of_block(T* tile, int begin, int end) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    begin = min(begin, __shfl_xor_sync(~0u, begin, i));
    end = max(end, __shfl_xor_sync(~0u, end, i));
  }
  if (lane_id() == 0) {
    behind_row<SeenKeys, kD>(tile, warp_id()).any_begin = begin;
    behind_row<SeenKeys, kD>(tile, warp_id()).any_end = end;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    begin = min(begin, behind_row<SeenKeys, kD>(tile, w).any_begin);
    end = max(end, behind_row<SeenKeys, kD>(tile, w).any_end);
  }
  return int2{begin, end};
}

// ---------------------------------------------------------------------------------- masks

// Where the mask has row `row` and key 0 of the sequence.
template <typename T>
LK_DEVICE int64_t mask_index(const Operands<T>& o, const Tile& tile, int row) {
  const Mask& m = o.in.mask;
  const uint32_t t = o.group.quotient(uint32_t(row)), g = uint32_t(row) - t * o.group.d;
  return int64_t(tile.b) * m.batch + (tile.kv * int64_t(o.group.d) + g) * m.head +
         (tile.q_begin + int64_t(t)) * m.token + int64_t(tile.k_begin) * m.key;
}

// What a mask adds to a score in powers of two; -inf where it hides. The lowest finite value, which some write for
// "hidden", becomes -inf: by the product, or for float16 by name.
LK_DEVICE float mask_bias(const Mask& mask, int64_t at) {
  switch (mask.kind) {
    case Mask::kNone: return 0.0f;
    case Mask::kBool: return static_cast<const uint8_t*>(mask.data)[at] ? 0.0f : -INFINITY;
    case Mask::kFloat: return static_cast<const float*>(mask.data)[at] * kLog2e;
    case Mask::kBfloat16: return widen(static_cast<const bfloat16*>(mask.data)[at]) * kLog2e;
    default: {
      const float added = widen(static_cast<const float16*>(mask.data)[at]);
      return added == -65504.0f ? -INFINITY : added * kLog2e;
    }
  }
}

}  // namespace llamakern::cuda
