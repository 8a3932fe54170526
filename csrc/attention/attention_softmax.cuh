// The online softmax of attention forward on the GPU, on a warp's fragment of scores, in powers of two.
#pragma once
#include "attention_rows.cuh"

namespace llamakern::cuda {

// The softmax of rows 16m + g + 8h of a warp: the maximum so far, and the sum of this lane's columns.
template <int kM>
struct Softmax {
  float m[kM][2], l[kM][2], rounded[kM][2];

  LK_DEVICE Softmax() {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) m[i / 2][i % 2] = -INFINITY, l[i / 2][i % 2] = rounded[i / 2][i % 2] = 0.0f;
  }
};

// Scores of the warp's columns from key j0 on, in powers of two, -inf where hidden. Whether any is not.
template <typename T, int kD, int kM, int kN>
LK_DEVICE bool see(float (&s)[kM][kN / 8][4], const Operands<T>& o, const Tile& tile, T* q, int row0, int j0,
                   float scale) {
  const bool masked = o.in.mask.kind != Mask::kNone;
  const int g = lane_id() / 4, t = lane_id() % 4;
  bool seen = false;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = 16 * m + g + 8 * h;
      const int64_t mask = masked ? mask_index(o, tile, row0 + r) : 0;
      const SeenKeys& keys = behind_row<SeenKeys, kD>(q, r);
      const int begin = keys.begin;
      const unsigned count = unsigned(keys.end - begin);
      const int first = j0 + 2 * t - begin;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = first + 8 * n + e;  // from the first key that the row may see
          float& score = s[m][n][2 * h + e];
          float bias = 0.0f;
          bool visible = unsigned(j) < count;
          if (masked && visible) {
            bias = mask_bias(o.in.mask, mask + (j + int64_t(begin)) * o.in.mask.key);
            visible = bias != -INFINITY;
          }
          score = visible ? fmaf(score, scale, bias) : -INFINITY;
          seen |= visible;
        }
      }
    }
  }
  return seen;
}

// Scores become weights 2^(s - m) against the maximum up to now; sums and outputs follow it.
template <int kM, int kN, int kD>
LK_DEVICE void weigh(float (&s)[kM][kN / 8][4], float (&o)[kM][kD / 8][4], Softmax<kM>& softmax) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
      const float raised = fmaxf(softmax.m[m][h], quad_max(top));
      const float base = raised == -INFINITY ? 0.0f : raised;  // (-inf) - (-inf) is NaN
      const float rescale = exp2_approx(softmax.m[m][h] - base);
      softmax.m[m][h] = raised;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = s[m][n][2 * h + e];
          weight = exp2_approx(weight - base);
          sum += weight;
        }
      }
      softmax.l[m][h] = softmax.l[m][h] * rescale + sum;
      softmax.rounded[m][h] *= rescale;
#pragma unroll
      for (int d = 0; d < kD / 8; ++d) {
        o[m][d][2 * h] *= rescale;
        o[m][d][2 * h + 1] *= rescale;
      }
    }
  }
}

}  // namespace llamakern::cuda
