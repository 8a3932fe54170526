// Neighbours in memory that one thread moves as one: 16 bytes where everything is aligned to that, else one element.
#pragma once
#include <initializer_list>

#include "cuda.cuh"

namespace llamakern::cuda {

template <typename T>
constexpr int kPack = 16 / int(sizeof(T));

template <int kBytes>
struct Words;  // what the machine moves at once
template <>
struct Words<16> {
  using Type = uint4;
};
template <>
struct Words<8> {
  using Type = uint2;
};
template <>
struct Words<4> {
  using Type = uint32_t;
};
template <>
struct Words<2> {
  using Type = uint16_t;
};

// N elements as they lie in memory. Above 16 bytes (float weights beside 16-bit activations) it is several words.
// kWhole: aligned to its words and all there; else element by element, and only the first `count` are.
template <typename T, int N, bool kWhole = true>
struct Pack {
  static constexpr int kBytes = N * int(sizeof(T)), kWord = kBytes < 16 ? kBytes : 16, kWords = kBytes / kWord;
  using Word = typename Words<kWord>::Type;
  Word words[kWords];

  LK_DEVICE void load(const T* from, [[maybe_unused]] int64_t count = N) {
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
    } else {
      T at[N] = {};
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < count) at[i] = from[i];
      memcpy(words, at, kBytes);
    }
  }
  LK_DEVICE void store(T* to, [[maybe_unused]] int64_t count = N) const {
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
    } else {
      T at[N];
      memcpy(at, words, kBytes);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < count) to[i] = at[i];
    }
  }
  LK_DEVICE void widen_to(float (&x)[N]) const {
    T at[N];
    memcpy(at, words, kBytes);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = widen(at[i]);
  }
  LK_DEVICE void narrow_from(const float (&x)[N]) {
    T at[N];
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = narrow<T>(x[i]);
    memcpy(words, at, kBytes);
  }
};

template <bool kWhole = true, typename T, int N>
LK_DEVICE void load(float (&x)[N], const T* from, int64_t count = N) {
  Pack<T, N, kWhole> pack;
  pack.load(from, count);
  pack.widen_to(x);
}
template <bool kWhole = true, typename T, int N>
LK_DEVICE void store(T* to, const float (&x)[N], int64_t count = N) {
  Pack<T, N, kWhole> pack;
  pack.narrow_from(x);
  pack.store(to, count);
}

// Rows that can be moved in packs of 16 bytes: where they start, and the elements from each to the next. Null counts as
// aligned.
template <typename T>
struct PackRows {
  const T* data;
  std::initializer_list<int64_t> strides;
};
template <typename T>
bool in_packs(const PackRows<T>& rows) {
  if (reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) return false;
  for (const int64_t stride : rows.strides)
    if (rows.data && stride % kPack<T> != 0) return false;
  return true;
}

// fn<kPack<T>>() or fn<1>().
template <typename T, typename Fn>
void with_packs(bool in_packs, const Fn& fn) {
  if (in_packs)
    fn.template operator()<kPack<T>>();
  else
    fn.template operator()<1>();
}

}  // namespace llamakern::cuda
