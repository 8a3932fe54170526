// NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E), and the linear over a weight stored in it.
//
//   w[i] = codebook[code[i]]·absmax[i / block_size]         byte k holds element 2k in its high nibble
//   absmax[j] = dynamic[absmax_code[j]]·absmax_scale[j / 256] + absmax_offset             (double quantisation)
//
//   y = x Wᵀ + bias            dx = dy W                     W is decoded panel by panel and never stored
//
// The bytes are those of bitsandbytes (quant_type "nf4"). Blocks run over the row-major flattened weight and may cross
// rows. Shapes: M tokens, N out_features, K in_features.
#pragma once
#include "../common/linear.h"

namespace llamakern {

inline constexpr float kNf4Codebook[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
// A value takes the number of thresholds that it strictly exceeds. They are bitsandbytes' CUDA constants, each rounded
// from its decimals straight to float32: four of them are one step away from the float32 midpoint of the two codes.
inline constexpr float kNf4Thresholds[15] = {
    -0.84809643f,  -0.610632896f,  -0.45999527f,  -0.33967942f, -0.234607399f,
    -0.137911737f, -0.0455250181f, 0.0397901498f, 0.120255254f, 0.203521252f,
    0.292013764f,  0.389312536f,   0.501663387f,  0.64278692f,  0.861478388f,
};

constexpr int64_t kAbsmaxBlock = 256;  // absmax values that share one absmax_scale

// bitsandbytes' 8-bit dynamic map, ascending: for each decade 10^(i-6), i = 0..6, the 2^i middles of a float32
// linspace(0.1, 1, 2^i + 1), their mirror images, 0 and 1.
struct DynamicMap {
  float value[256] = {};

  constexpr DynamicMap() {
    constexpr float decade[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    for (int i = 0, p = 0; i < 7; ++i) {
      const int parts = 1 << i;
      for (int j = 0; j < parts; ++j, ++p) {
        value[128 + p] = (edge(j, parts) + edge(j + 1, parts)) / 2 * decade[i];
        value[126 - p] = -value[128 + p];
      }
    }
    value[255] = 1.0f;
  }

 private:
  // Edge j of the linspace, counted from the nearer end and rounded once.
  static constexpr float edge(int j, int parts) {
    const float step = (1.0f - 0.1f) / float(parts);
    return j < (parts + 1) / 2 ? float(0.1f + double(step) * j) : float(1.0 - double(step) * (parts - j));
  }
};
inline constexpr DynamicMap kDynamicMap;

// The nearest level of the map; of two that are equally near, the one with the even code.
LK_HD uint8_t nearest_level(const float* level, float x) {
  int low = 0, high = 255;
  while (high - low > 1) (x > level[(low + high) / 2] ? low : high) = (low + high) / 2;
  const float middle = (level[low] + level[high]) * 0.5f;
  return uint8_t(x > middle ? high : x < middle || low % 2 == 0 ? low : high);
}

// Keeps a product from becoming part of an fma: it is rounded before anything is added.
inline float rounded(float product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

struct Nf4Matrix {              // [N, K]
  const uint8_t* codes;         // [ceil(N·K / 2)]
  const float* absmax;          // [ceil(N·K / block_size)], or null where it is quantised too:
  const uint8_t* absmax_codes;  // [ceil(N·K / block_size)]
  const float* absmax_scale;    // [ceil(blocks / 256)]
  const float* absmax_offset;   // one
  int64_t N, K;
  int block_shift;  // block_size = 2^block_shift

  __attribute__((always_inline)) float block_scale(int64_t block) const {
    if (absmax) return absmax[block];
    const float level = kDynamicMap.value[absmax_codes[block]];
    return rounded(level * absmax_scale[block / kAbsmaxBlock]) + *absmax_offset;
  }
  LK_HD int code(int64_t i) const { return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }
};

template <typename T>
struct Nf4Quantize {
  uint8_t* codes;  // [ceil(n / 2)]            out; the nibble behind an odd end is 0
  float* absmax;   // [ceil(n / block_size)]   out
  const T* w;      // [n]
  int64_t n, block_size;
};

template <typename T>
struct Nf4Dequantize {
  T* w;  // [N, K]  out
  Nf4Matrix from;
};

struct Nf4DoubleQuantize {
  uint8_t* codes;       // [n]              out
  float* scale;         // [ceil(n / 256)]  out
  const float* absmax;  // [n]
  const float* offset;  // one
  int64_t n;
};

template <typename T>
struct Nf4Linear {
  T* y;        // [M, N]  out
  const T* x;  // [M, K]  row stride x_row
  int64_t x_row;
  Nf4Matrix w;
  Either<T> bias;  // [N] or null
  int64_t M;
};

// y[i] = x W[i]ᵀ for up to three weights: few tokens meet all of them in one pass.
template <typename T>
struct Nf4Linears {
  T* y[3];         // [M, N of i]  out
  Nf4Matrix w[3];  // [N of i, K]
  const T* x;      // [M, K]  row stride x_row
  int64_t x_row;
  int count;
  int64_t M;
};

template <typename T>
struct Nf4LinearBackward {
  T* dx;        // [M, K]  out
  const T* dy;  // [M, N]  row stride dy_row
  int64_t dy_row;
  Nf4Matrix w;
  int64_t M;
};

}  // namespace llamakern
