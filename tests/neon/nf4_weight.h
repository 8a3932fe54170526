// A weight quantised to NF4 by the kernels under test, and what it means in double.
#pragma once
#include "../../csrc/nf4/nf4.h"
#include "smoke.h"

namespace smoke {

struct Nf4Weight {
  std::vector<uint8_t> codes, absmax_codes;
  std::vector<float> absmax, absmax_scale;
  float offset = 0.0f;
  int64_t N, K, block_size;

  template <typename T>
  Nf4Weight(const std::vector<T>& w, int64_t N, int64_t K, int64_t block_size)
      : codes(ceil_div(N * K, 2)), absmax(ceil_div(N * K, block_size)), N(N), K(K), block_size(block_size) {
    run(Nf4Quantize<T>{codes.data(), absmax.data(), w.data(), N * K, block_size});
  }
  void quantize_twice() {
    const int64_t n = int64_t(absmax.size());
    for (float one : absmax) offset += one / float(n);
    absmax_codes.resize(n);
    absmax_scale.resize(ceil_div(n, kAbsmaxBlock));
    run(Nf4DoubleQuantize{absmax_codes.data(), absmax_scale.data(), absmax.data(), &offset, n});
  }
  Nf4Matrix matrix() const {
    Nf4Matrix w{};
    w.codes = codes.data(), w.N = N, w.K = K;
    w.block_shift = __builtin_ctzll(uint64_t(block_size));
    if (absmax_codes.empty())
      w.absmax = absmax.data();
    else
      w.absmax_codes = absmax_codes.data(), w.absmax_scale = absmax_scale.data(), w.absmax_offset = &offset;
    return w;
  }
  double scale(int64_t block) const {
    if (absmax_codes.empty()) return absmax[block];
    return double(kDynamicMap.value[absmax_codes[block]]) * absmax_scale[block / kAbsmaxBlock] + offset;
  }
  Doubles values() const {
    Doubles w(N * K);
    for (int64_t i = 0; i < N * K; ++i)
      w[i] = kNf4Codebook[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * scale(i / block_size);
    return w;
  }
};

}  // namespace smoke
