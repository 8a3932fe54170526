// Many matmuls as one: what the experts' linears are built on. A task is a piece of one expert's matmul, so all cores
// are busy whatever the distribution of tokens; tasks are cut by each expert's shape only.
#pragma once
#include <algorithm>

#include "../common/gemm.h"
#include "moe.h"

namespace llamakern::LK_ISA {

// fn(e, task) for each task in [0, tasks(e)) of each expert.
template <typename Tasks, typename Fn>
void for_experts(int64_t E, const Tasks& tasks, const Fn& fn) {
  Scratch<int64_t> room(E + 1);
  int64_t* first = room;
  first[0] = 0;
  for (int64_t e = 0; e < E; ++e) first[e + 1] = first[e] + tasks(e);
  parallel_neighbours(first[E], [&](int64_t task) {
    const int64_t e = std::upper_bound(first, first + E + 1, task) - first - 1;
    fn(e, task - first[e]);
  });
}

// An expert's slots, and where its lanes begin: in lanes, or in words where the experts' lanes differ in depth.
struct Share {
  int64_t begin, count, at;
};

// Of each expert size(count) units of memory for its lanes; shares[E].at is the size of all.
template <typename Size>
void share_out(Share* shares, const int32_t* offsets, int64_t E, const Size& size) {
  int64_t at = 0;
  for (int64_t e = 0; e < E; ++e) {
    shares[e] = {offsets[e], offsets[e + 1] - offsets[e], at};
    at += size(shares[e].count);
  }
  shares[E] = {offsets[E], 0, at};
}

inline int64_t strip_width(int64_t lanes) {
  int64_t width = 0;
  with_strips(lanes, [&]<int MV>() { width = kWidth<MV>; });
  return width;
}
inline int64_t strip_lanes(int64_t lanes) { return round_up(lanes, strip_width(lanes)); }

// go<MV>(share, plan, e, task) for every task of the matmuls of lanes(share) lanes and `rows` rows.
template <Panel kPanel, typename Lanes, typename Go>
void grouped_gemm(const Share* shares, int64_t E, int64_t rows, const Lanes& lanes, const Go& go) {
  const auto tasks = [&](int64_t e) {
    int64_t count = 0;
    with_strips(lanes(shares[e]), [&]<int MV>() { count = Plan<MV, kPanel>(lanes(shares[e]), rows).tasks(); });
    return count;
  };
  for_experts(E, tasks, [&](int64_t e, int64_t task) {
    with_strips(lanes(shares[e]), [&]<int MV>() {
      go.template operator()<MV>(shares[e], Plan<MV, kPanel>(lanes(shares[e]), rows), e, task);
    });
  });
}

// Whether the weights lie as (E, K, N).
inline bool is_transposed(const Nf4Experts&) { return false; }
template <typename V>
bool is_transposed(const DenseExperts<V>& w) {
  return w.transposed;
}

inline int64_t tokens_of(const Share& share) { return share.count; }

// out[i] = the word of at(i, 0) and at(i, 1), for `count` words and up to whole vectors.
template <typename W, typename At>
void gather_words(uint32_t* out, int64_t count, const At& at) {
  for (int64_t i = 0; i < count; i += kLanes, out += kLanes) {
    alignas(64) float first[kLanes] = {}, next[kLanes] = {};
    for (int64_t j = 0; j < min64(kLanes, count - i); ++j) {
      first[j] = at(i + j, 0);
      next[j] = at(i + j, 1);
    }
    store_words(out, W::join(load(first), load(next)));
  }
}

// An adapter's matrix that lies the other way than the weight beside it; it is small, so it is gathered.
// Panel.kByWord: row n is row n of w [N][K].
template <typename W, typename P>
struct GatheredRows {
  const P* w;
  int64_t K;
  void operator()(uint32_t* out, int64_t word, int64_t row, int64_t rows) const {
    gather_words<W>(out, rows, [&](int64_t i, int64_t next) {
      const int64_t k = word * W::kPer + next;
      return k < K ? to_float(w[(row + i) * K + k]) : 0.0f;
    });
  }
};
// Panel.kByRow: row n is column n of w [K][N].
template <typename W, typename P>
struct GatheredColumns {
  const P* w;
  int64_t N, K;
  void operator()(uint32_t* out, int64_t row, int64_t word, int64_t words) const {
    gather_words<W>(out, words, [&](int64_t i, int64_t next) {
      const int64_t k = (word + i) * W::kPer + next;
      return k < K ? to_float(w[k * N + row]) : 0.0f;
    });
  }
};

// The rows of x [S][K] as lanes of each expert, whose strips begin at share.at lanes.
template <typename W, typename T>
void pack_shares(uint32_t* out, const Share* shares, int64_t E, const T* x, int64_t ld, int64_t K) {
  const int64_t words = words_of<W>(K);
  for_experts(
      E, [&](int64_t e) { return ceil_div(shares[e].count, strip_width(shares[e].count)); },
      [&](int64_t e, int64_t strip) {
        const Share& share = shares[e];
        with_strips(share.count, [&]<int MV>() {
          const int64_t m = strip * kWidth<MV>;
          pack_strip<W, MV>(out + (share.at + m) * words, x + (share.begin + m) * ld, ld, share.count - m, K);
        });
      });
}

// The columns of x [S][C] as lanes of each expert, whose reduction is over its slots; `at` counts words.
template <typename W, typename T>
void pack_share_columns(uint32_t* out, const Share* shares, int64_t E, const T* x, int64_t ld, int64_t C) {
  with_strips(C, [&]<int MV>() {
    constexpr int64_t width = kWidth<MV>;
    for_experts(
        E, [&](int64_t e) { return shares[e].count ? ceil_div(C, width) : 0; },
        [&](int64_t e, int64_t strip) {
          const Share& share = shares[e];
          const int64_t words = words_of<W>(share.count), lanes = min64(C - strip * width, width);
          uint32_t* to = out + share.at + strip * width * words;
          if (lanes < width) memset(to, 0, size_t(words * width) * 4);
          pack_across<W>(to, width, x + share.begin * ld + strip * width, ld, lanes, share.count);
        });
  });
}

}  // namespace llamakern::LK_ISA
