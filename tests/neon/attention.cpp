// attention: forward and backward over many queries and over few, decoding over a cache in blocks, prompts.
#include "../../csrc/attention/attention.h"

#include "smoke.h"

namespace smoke {
namespace {

struct Sizes {
  int64_t B, T, S, H, Hkv, D;
  int64_t q() const { return B * T * H * D; }
  int64_t k() const { return B * S * Hkv * D; }
};

template <typename T>
Heads<T> heads(T* data, int64_t tokens, int64_t H, int64_t D) {
  return {data, tokens * H * D, H * D, D};
}

struct Truth {
  Doubles y, lse, dq, dk, dv;
};

// Causal attention and its gradient, row by row, as attention.h says it; row b sees its first lengths[b] keys.
template <typename T>
Truth plain_attention(const Sizes& n, const std::vector<T>& q, const std::vector<T>& k, const std::vector<T>& v,
                      const std::vector<T>& dy, const std::vector<int32_t>& lengths) {
  Truth out{Doubles(n.q()), {}, Doubles(n.q()), Doubles(n.k()), Doubles(n.k())};
  const double scale = default_scale(n.D);
  for (int64_t b = 0; b < n.B; ++b)
    for (int64_t h = 0; h < n.H; ++h)
      for (int64_t t = 0; t < n.T; ++t) {
        const int64_t seen = lengths[b] - n.T + t + 1, row = ((b * n.T + t) * n.H + h) * n.D;
        const auto key = [&](int64_t j) { return ((b * n.S + j) * n.Hkv + h / (n.H / n.Hkv)) * n.D; };
        const auto dot = [&](const std::vector<T>& a, int64_t i, const std::vector<T>& c, int64_t j) {
          double sum = 0.0;
          for (int64_t d = 0; d < n.D; ++d) sum += double(to_float(a[i + d])) * to_float(c[j + d]);
          return sum;
        };
        Doubles p(seen > 0 ? seen : 0);
        double total = 0.0, delta = 0.0;
        for (int64_t j = 0; j < seen; ++j) total += p[j] = std::exp(scale * dot(q, row, k, key(j)));
        out.lse.push_back(std::log(total));
        for (int64_t j = 0; j < seen; ++j) {
          p[j] /= total;
          delta += p[j] * dot(dy, row, v, key(j));
          for (int64_t d = 0; d < n.D; ++d) out.y[row + d] += p[j] * to_float(v[key(j) + d]);
        }
        for (int64_t j = 0; j < seen; ++j) {
          const double ds = scale * p[j] * (dot(dy, row, v, key(j)) - delta);
          for (int64_t d = 0; d < n.D; ++d) {
            out.dq[row + d] += ds * to_float(k[key(j) + d]);
            out.dk[key(j) + d] += ds * to_float(q[row + d]);
            out.dv[key(j) + d] += p[j] * to_float(dy[row + d]);
          }
        }
      }
  return out;
}

template <typename T>
Attended<T> attended(const Sizes& n, const std::vector<T>& q, const std::vector<T>& k, const std::vector<T>& v) {
  Attended<T> in{};
  in.q = heads(q.data(), n.T, n.H, n.D);
  in.k = heads(k.data(), n.S, n.Hkv, n.D), in.v = heads(v.data(), n.S, n.Hkv, n.D);
  in.block = n.S, in.sight.causal = true, in.scale = default_scale(n.D);
  in.sequences = n.B, in.T_ = n.T, in.S = n.S, in.H = n.H, in.Hkv = n.Hkv, in.D = n.D;
  return in;
}

template <typename T>
void check_training(const Sizes& n) {
  const auto q = random<T>(n.q(), 2.0), k = random<T>(n.k(), 2.0), v = random<T>(n.k()), dy = random<T>(n.q());
  std::vector<T> y(n.q()), dq(n.q()), dk(n.k()), dv(n.k());
  std::vector<float> lse(n.B * n.H * n.T);
  AttentionForward<T> forward{};
  forward.y = heads(y.data(), n.T, n.H, n.D), forward.lse = lse.data(), forward.in = attended(n, q, k, v);
  run(forward);
  AttentionBackward<T> backward{};
  backward.dq = heads(dq.data(), n.T, n.H, n.D);
  backward.dk = heads(dk.data(), n.S, n.Hkv, n.D), backward.dv = heads(dv.data(), n.S, n.Hkv, n.D);
  backward.y = heads<const T>(y.data(), n.T, n.H, n.D), backward.dy = heads<const T>(dy.data(), n.T, n.H, n.D);
  backward.lse = lse.data(), backward.in = forward.in;
  run(backward);
  const Truth truth = plain_attention(n, q, k, v, dy, std::vector<int32_t>(n.B, int32_t(n.S)));
  const std::string name = "attention T=" + std::to_string(n.T);
  judge<T>(name, y, truth.y);
  judge<float>(name + "'s lse", lse, truth.lse);
  judge<T>(name + "'s dq", dq, truth.dq, 2.0);  // y, rounded, is read for delta
  judge<T>(name + "'s dk", dk, truth.dk, 2.0);
  judge<T>(name + "'s dv", dv, truth.dv, 2.0);
}

// The last keys come through cache_append_, into blocks that lie in reverse.
template <typename T>
void check_decoding() {
  constexpr Sizes n{2, 3, 140, 6, 2, 20};
  constexpr int64_t kBlock = 20, kWidth = n.S / kBlock;
  const std::vector<int32_t> lengths{139, 17};
  const auto q = random<T>(n.q(), 2.0), k = random<T>(n.k(), 2.0), v = random<T>(n.k());
  std::vector<T> k_cache(n.k()), v_cache(n.k()), k_new, v_new, y(n.q());
  std::vector<int32_t> table(n.B * kWidth);
  for (int64_t i = 0; i < n.B * kWidth; ++i) table[i] = int32_t(n.B * kWidth - 1 - i);
  for (int64_t b = 0; b < n.B; ++b)
    for (int64_t j = 0; j < n.S; ++j)
      for (int64_t i = 0; i < n.Hkv * n.D; ++i) {
        const int64_t from = (b * n.S + j) * n.Hkv * n.D + i,
                      to = (table[b * kWidth + j / kBlock] * kBlock + j % kBlock) * n.Hkv * n.D + i;
        if (j < lengths[b] - n.T) k_cache[to] = k[from], v_cache[to] = v[from];
        if (j >= lengths[b] - n.T && j < lengths[b]) k_new.push_back(k[from]), v_new.push_back(v[from]);
      }
  CacheAppend<T> append{};
  append.k_cache = heads(k_cache.data(), kBlock, n.Hkv, n.D),
  append.v_cache = heads(v_cache.data(), kBlock, n.Hkv, n.D);
  append.k = heads<const T>(k_new.data(), n.T, n.Hkv, n.D), append.v = heads<const T>(v_new.data(), n.T, n.Hkv, n.D);
  append.lengths = lengths.data(), append.block_table = table.data(), append.table_width = kWidth;
  append.block = kBlock, append.B = n.B, append.T_ = n.T, append.Hkv = n.Hkv, append.D = n.D;
  run(append);
  std::vector<float> lse(n.B * n.H * n.T);
  AttentionForward<T> decode{};
  decode.y = heads(y.data(), n.T, n.H, n.D), decode.lse = lse.data(), decode.in = attended(n, q, k, v);
  decode.in.k = heads<const T>(k_cache.data(), kBlock, n.Hkv, n.D);
  decode.in.v = heads<const T>(v_cache.data(), kBlock, n.Hkv, n.D);
  decode.in.lengths = lengths.data(), decode.in.block_table = table.data(), decode.in.table_width = kWidth;
  decode.in.block = kBlock;
  run(decode);
  judge<T>("attention_decode in blocks", y, plain_attention(n, q, k, v, q, lengths).y);
}

// Queries that see no word, so that the prompts' part stands alone: y, dq and the gradients of the prompts.
template <typename T>
void check_prompts(int64_t tokens) {
  constexpr int64_t P = 7, H = 6, Hkv = 2, D = 20;
  const Sizes n{1, tokens, 1, H, Hkv, D};
  const auto q = random<T>(n.q(), 2.0), k = random<T>(n.k()), dy = random<T>(n.q());
  const auto pk = random<T>(P * Hkv * D, 2.0), pv = random<T>(P * Hkv * D);
  const auto gate = random<float>(H);
  std::vector<T> y(n.q()), dq(n.q()), dk(n.k()), dv(n.k()), dpk(pk.size()), dpv(pk.size());
  std::vector<float> lse(H * tokens), dgate(H);
  AttentionForward<T> forward{};
  forward.y = heads(y.data(), tokens, H, D), forward.lse = lse.data(), forward.in = attended(n, q, k, k);
  forward.in.S = 0;
  forward.in.prompts = {heads(pk.data(), 0, Hkv, D), heads(pv.data(), 0, Hkv, D), gate.data(), P, 1};
  run(forward);
  AttentionBackward<T> backward{};
  backward.dq = heads(dq.data(), tokens, H, D), backward.dk = heads(dk.data(), 1, Hkv, D);
  backward.dv = heads(dv.data(), 1, Hkv, D), backward.y = heads<const T>(y.data(), tokens, H, D);
  backward.dy = heads<const T>(dy.data(), tokens, H, D), backward.lse = lse.data(), backward.in = forward.in;
  backward.dprompt_k = heads(dpk.data(), 0, Hkv, D), backward.dprompt_v = heads(dpv.data(), 0, Hkv, D);
  backward.dprompt_gate = dgate.data();
  run(backward);
  Doubles want_y(n.q()), want_dq(n.q()), want_dpk(pk.size()), want_dpv(pk.size()), want_dgate(H);
  for (int64_t row = 0; row < tokens * H; ++row) {
    const int64_t h = row % H;
    const auto at = [&](int64_t p, int64_t d) { return (p * Hkv + h / (H / Hkv)) * D + d; };
    Doubles a(P), da(P);
    double total = 0.0, o = 0.0;
    for (int64_t p = 0; p < P; ++p) {
      double s = 0.0;
      for (int64_t d = 0; d < D; ++d) s += double(to_float(q[row * D + d])) * to_float(pk[at(p, d)]);
      for (int64_t d = 0; d < D; ++d) da[p] += double(to_float(dy[row * D + d])) * to_float(pv[at(p, d)]);
      total += a[p] = std::exp(s * default_scale(D));
    }
    for (int64_t p = 0; p < P; ++p) o += (a[p] /= total) * da[p];
    want_dgate[h] += o;
    for (int64_t p = 0; p < P; ++p)
      for (int64_t d = 0; d < D; ++d) {
        const double ds = gate[h] * a[p] * (da[p] - o) * default_scale(D);
        want_y[row * D + d] += gate[h] * a[p] * to_float(pv[at(p, d)]);
        want_dq[row * D + d] += ds * to_float(pk[at(p, d)]);
        want_dpk[at(p, d)] += ds * to_float(q[row * D + d]);
        want_dpv[at(p, d)] += gate[h] * a[p] * to_float(dy[row * D + d]);
      }
  }
  const std::string name = "prompts T=" + std::to_string(tokens);
  judge<T>(name, y, want_y);
  judge<T>(name + "'s dq", dq, want_dq, 2.0);
  judge<T>(name + "'s dk", dpk, want_dpk, 2.0);
  judge<T>(name + "'s dv", dpv, want_dpv, 2.0);
  judge<T>(name + "'s dgate", dgate, want_dgate, 2.0);
}

}  // namespace

void check_attention() {
  for_types([]<typename T>() {
    check_training<T>({2, 45, 61, 6, 2, 20});
    check_training<T>({1, 3, 75, 4, 1, 33});
    check_decoding<T>();
    check_prompts<T>(45);
    check_prompts<T>(3);
  });
}

}  // namespace smoke
