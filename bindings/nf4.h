// The guard of an NF4 weight, for every op that takes one.
#pragma once
#include <array>

#include "../csrc/nf4/nf4.h"
#include "linear.h"

namespace llamakern {

inline void check_block_size(const char* op, int64_t block_size) {
  const bool fits = block_size >= 32 && block_size <= 4096 && (block_size & (block_size - 1)) == 0;
  check(fits, op, ": block_size must be a power of two from 32 to 4096, got ", block_size);
}

struct Nf4Weight {
  Tensor codes, absmax;
  std::optional<Tensor> absmax_scale, absmax_offset;
  Nf4Matrix matrix;

  Nf4Weight(const char* op, const Tensor& weight, const Tensor& absmax_, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& offset, int64_t N, int64_t K, int64_t block_size)
      : codes(as_contiguous(weight)), absmax(as_contiguous(absmax_)) {
    check_block_size(op, block_size);
    check(N >= 0 && K >= 0 && N <= INT64_MAX / max64(1, K), op, ": shape must be two sizes, got ",
          shape_text(std::array{N, K}));
    const int64_t blocks = ceil_div(N * K, block_size);
    check_dtype(op, "weight", weight, ScalarType::Byte);
    check_count(op, "weight", weight, ceil_div(N * K, 2), "bytes", N, K);
    check_count(op, "absmax", absmax, blocks, "values", N, K);
    check_same_device(op, "absmax", absmax, "weight", weight);
    check(scale.has_value() == offset.has_value(), op,
          ": absmax_scale and absmax_offset must be given together, got one");
    check_dtype(op, "absmax", absmax, scale ? ScalarType::Byte : ScalarType::Float);
    if (scale) {
      for (const auto& [name, t] : {std::pair{"absmax_scale", &scale}, {"absmax_offset", &offset}}) {
        check_dtype(op, name, **t, ScalarType::Float);
        check_same_device(op, name, **t, "weight", weight);
      }
      check_count(op, "absmax_scale", *scale, ceil_div(blocks, kAbsmaxBlock), "values", N, K);
      check_count(op, "absmax_offset", *offset, 1, "values", N, K);
      absmax_scale = as_contiguous(*scale);
      absmax_offset = as_contiguous(*offset);
    }
    matrix = {.codes = cptr<uint8_t>(codes),
              .absmax = scale ? nullptr : cptr<float>(absmax),
              .absmax_codes = scale ? cptr<uint8_t>(absmax) : nullptr,
              .absmax_scale = cptr<float>(absmax_scale),
              .absmax_offset = cptr<float>(absmax_offset),
              .N = N,
              .K = K,
              .block_shift = __builtin_ctzll(uint64_t(block_size))};
  }

 private:
  static void check_count(const char* op, const char* name, const Tensor& t, int64_t want, const char* what, int64_t N,
                          int64_t K) {
    check(t.numel() == want, op, ": ", name, " must hold ", want, ' ', what, " for a weight of shape [", N, ", ", K,
          "], got ", shape_text(t.sizes()));
  }
};

}  // namespace llamakern
