// torch.ops.llamakern.nf4_block_decode_: check, allocate, fill the params, run.
#include "../csrc/block/block.h"

#include "nf4.h"

namespace llamakern {
namespace {

using Tensors = std::vector<Tensor>;

constexpr auto kOp = "nf4_block_decode_";
enum Place { kQ, kK, kV, kO, kGate, kUp, kDown, kPlaces };

void check_count(const char* name, const Tensors& some, size_t want) {
  check(some.size() == want, kOp, ": ", name, " must hold ", want, " tensors, got ", some.size());
}

// The seven packed matrices, each of the shape that its place asks for.
struct Matrices {
  std::vector<Nf4Weight> held;

  Matrices(const Tensors& weight_, const Tensors& absmax_, const Tensors& scale_, const Tensors& offset_,
           int64_t block_size, int64_t C, int64_t heads, int64_t kv_heads, int64_t F) {
    check_count("weight", weight_, kPlaces);
    check_count("absmax", absmax_, kPlaces);
    const bool nested = !scale_.empty() || !offset_.empty();
    check_count("absmax_scale", scale_, nested ? kPlaces : 0);
    check_count("absmax_offset", offset_, nested ? kPlaces : 0);
    const int64_t shape[kPlaces][2] = {{heads, C}, {kv_heads, C}, {kv_heads, C}, {C, heads}, {F, C}, {F, C}, {C, F}};
    held.reserve(kPlaces);
    const auto part = [&](const Tensors& t, int i) { return nested ? std::optional<Tensor>(t[i]) : std::nullopt; };
    for (int i = 0; i < kPlaces; ++i)
      held.emplace_back(kOp, weight_[i], absmax_[i], part(scale_, i), part(offset_, i), shape[i][0], shape[i][1],
                        block_size);
  }
  const Nf4Matrix& operator[](Place place) const { return held[place].matrix; }
};

void check_cache(const Tensor& x, const Tensor& k_cache, const Tensor& v_cache, int64_t H) {
  check(k_cache.dim() == 4, kOp, ": k_cache must have shape (B, S, Hkv, D), got ", shape_text(k_cache.sizes()));
  check(k_cache.size(0) == x.size(0), kOp, ": k_cache must have ", x.size(0), " rows, got ", k_cache.size(0));
  check_sizes(kOp, "v_cache", v_cache, k_cache.sizes());
  const int64_t Hkv = k_cache.size(2), D = k_cache.size(3);
  check(D >= 2 && D % 2 == 0 && D <= kMaxHeadDim, kOp, ": k_cache must have an even head_dim of 2 to ", kMaxHeadDim,
        ", got ", D);
  check(Hkv >= 1 && H >= 1 && H % Hkv == 0 && H < INT32_MAX, kOp, ": H must be a multiple of k_cache's ", Hkv,
        " heads, got ", H);
  for (const auto& [name, t] : {std::pair{"k_cache", &k_cache}, {"v_cache", &v_cache}}) {
    check_same_dtype(kOp, name, *t, "x", x);
    check_same_device(kOp, name, *t, "x", x);
    check_not_expanded(kOp, name, *t);
    check(t->stride(3) == 1, kOp, ": ", name, " must have a contiguous last dimension, got a stride of ", t->stride(3));
  }
}

void check_angles(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t D) {
  check(cos.dim() == 2, kOp, ": cos must have shape (positions, D/2), got ", shape_text(cos.sizes()));
  for (const auto& [name, t] : {std::pair{"cos", &cos}, {"sin", &sin}}) {
    check_shape(kOp, name, *t, {cos.size(0), D / 2});
    check_dtype(kOp, name, *t, ScalarType::Float);
    check_same_device(kOp, name, *t, "x", x);
  }
}

Tensor check_lengths(const Tensor& x, const Tensor& lengths, int64_t most) {
  check_shape(kOp, "lengths", lengths, {x.size(0)});
  check_dtype(kOp, "lengths", lengths, ScalarType::Int);
  check_same_device(kOp, "lengths", lengths, "x", x);
  const Tensor flat = as_contiguous(lengths);
  for (int64_t b = 0; readable(flat) && b < x.size(0); ++b) {
    const int32_t n = cptr<int32_t>(flat)[b];
    check(n >= 1 && n <= most, kOp, ": lengths must lie in [1, ", most, "], got ", n);
  }
  return flat;
}

template <typename T>
Heads<T> heads(const Tensor& t) {
  return {ptr<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor nf4_block_decode_(const Tensor& x_, const Tensors& norms, const Tensors& weight, const Tensors& absmax,
                         const Tensors& absmax_scale, const Tensors& absmax_offset, const Tensor& cos_,
                         const Tensor& sin_, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths_,
                         int64_t H, int64_t F, int64_t block_size, double eps, bool interleaved) {
  check(x_.dim() == 3 && x_.size(1) == 1, kOp, ": x must have shape (B, 1, C), got ", shape_text(x_.sizes()));
  check(F >= 0, kOp, ": F must be a size, got ", F);
  check_cache(x_, k_cache, v_cache, H);
  const int64_t C = x_.size(2), S = k_cache.size(1), Hkv = k_cache.size(2), D = k_cache.size(3);
  check_angles(x_, cos_, sin_, D);
  const Tensor cos = as_contiguous(cos_), sin = as_contiguous(sin_);
  const Tensor lengths = check_lengths(x_, lengths_, min64(S, cos.size(0)));
  check_count("norms", norms, 2);
  const std::optional<Tensor> attention_norm = parameter(kOp, "norms", norms[0], {C}, x_),
                              ffn_norm = parameter(kOp, "norms", norms[1], {C}, x_);
  for (const Tensor& t : weight) check_same_device(kOp, "weight", t, "x", x_);
  const Matrices w(weight, absmax, absmax_scale, absmax_offset, block_size, C, H * D, Hkv * D, F);
  const Rows x = as_rows(x_);
  const Tensor y = empty(x_.sizes(), x_.scalar_type(), x_);
  dispatch_float(kOp, "x", x_, [&]<typename T>() {
    run(BlockDecode<T>{.y = ptr<T>(y),
                       .x = cptr<T>(x.t),
                       .attention_norm = either<T>(attention_norm),
                       .ffn_norm = either<T>(ffn_norm),
                       .q = w[kQ],
                       .k = w[kK],
                       .v = w[kV],
                       .o = w[kO],
                       .gate = w[kGate],
                       .up = w[kUp],
                       .down = w[kDown],
                       .cos = cptr<float>(cos),
                       .sin = cptr<float>(sin),
                       .k_cache = heads<T>(k_cache),
                       .v_cache = heads<T>(v_cache),
                       .lengths = cptr<int32_t>(lengths),
                       .x_row = x.stride,
                       .eps = float(eps),
                       .interleaved = interleaved,
                       .B = x.M,
                       .C = C,
                       .S = S,
                       .H = H,
                       .Hkv = Hkv,
                       .D = D,
                       .F = F},
        x_);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  m.def(
      "nf4_block_decode_(Tensor x, Tensor[] norms, Tensor[] weight, Tensor[] absmax, Tensor[] absmax_scale, Tensor[] "
      "absmax_offset, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, int H, int F, "
      "int block_size, float eps, bool interleaved) -> Tensor");
}

LK_REGISTER(m) { m.impl("nf4_block_decode_", TORCH_BOX(&nf4_block_decode_)); }

}  // namespace llamakern
