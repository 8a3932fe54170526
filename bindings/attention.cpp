// torch.ops.llamakern.attention, attention_backward, attention_prompt_backward, attention_decode, cache_append_: check,
// allocate, fill the params, run. Over 400 lines, because all doors share one Call and its checks.
#include "../csrc/attention/attention.h"

#include "engine.h"

namespace llamakern {
namespace {

using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;
using MaybeFloat = std::optional<double>;

// The arguments of one call, checked and with contiguous last dimensions; everything but the storage type.
struct Call {
  Tensor q, k, v;
  MaybeTensor mask, starts_q, starts_k, lengths, block_table;
  Sight sight;
  float scale;
  MaybeTensor prompt_k = {}, prompt_v = {}, prompt_gate = {};
};

// What a door calls itself and its arguments, and which dimensions of its tensors are tokens and heads.
struct Door {
  const char *op, *q, *k, *v, *mask;
  int token = 1, head = 2;
  bool top_left = false;  // causal as torch's
};
constexpr Door kAttention{"attention", "q", "k", "v", "mask"};
constexpr Door kTorchs{"scaled_dot_product_attention", "query", "key", "value", "attn_mask", 2, 1, true};
constexpr Door kBackward{"attention_backward", "q", "k", "v", "mask"};
constexpr Door kTorchsBackward{"attention_backward", "query", "key", "value", "attn_mask", 2, 1, true};
constexpr Door kPromptBackward{"attention_prompt_backward", "q", "k", "v", "mask"};
constexpr Door kTorchsPromptBackward{"attention_prompt_backward", "query", "key", "value", "attn_mask", 2, 1, true};
constexpr Door kDecode{"attention_decode", "q", "k_cache", "v_cache", "mask"};

template <typename T>
Heads<T> heads(const Tensor& x, const Door& door = kAttention) {
  return {ptr<std::remove_const_t<T>>(x), x.stride(0), x.stride(door.token), x.stride(door.head)};
}

void check_heads(const Door& door, const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto [op, q_name, k_name, v_name, mask_name, token, head, top_left] = door;
  check(q.dim() == 4, op, ": ", q_name, " must have shape ", head == 2 ? "(B, T, H, D)" : "(B, H, T, D)", ", got ",
        shape_text(q.sizes()));
  check(k.dim() == 4, op, ": ", k_name, " must have 4 dimensions, got ", shape_text(k.sizes()));
  const int64_t H = q.size(head), D = q.size(3), Hkv = k.size(head);
  check(D >= 1 && D <= kMaxHeadDim, op, ": ", q_name, " must have a head_dim of 1 to ", kMaxHeadDim, ", got ", D);
  check(Hkv >= 1 && H % Hkv == 0, op, ": ", q_name, " must have a multiple of ", k_name, "'s ", Hkv, " heads, got ", H);
  check_shape(op, k_name, k, {k.size(0), k.size(1), k.size(2), D});
  check_shape(op, v_name, v, {k.size(0), k.size(1), k.size(2), D});
  check(q.size(token) * H < INT32_MAX && k.size(token) < INT32_MAX, op, ": ", q_name, " and ", k_name,
        " must have fewer than 2^31 rows, got ", q.size(token) * H, " and ", k.size(token));
  for (const auto& [name, t] : {std::pair{k_name, &k}, {v_name, &v}}) {
    check_same_dtype(op, name, *t, q_name, q);
    check_same_device(op, name, *t, q_name, q);
  }
}

Sight make_sight(const char* op, bool causal, bool top_left, MaybeInt window, MaybeInt chunk) {
  check(!window || *window >= 1, op, ": window must be positive, got ", window.value_or(0));
  check(!chunk || *chunk >= 1, op, ": chunk must be positive, got ", chunk.value_or(0));
  constexpr int64_t kAll = int64_t(1) << 32;  // more than any distance: larger ones would overflow beside a position
  return {causal, top_left, min64(window.value_or(0), kAll), min64(chunk.value_or(0), kAll)};
}

Mask make_mask(const Door& door, const MaybeTensor& mask, const Tensor& q, const Tensor& k) {
  const char *op = door.op, *name = door.mask;
  if (!mask) return {.kind = Mask::kNone, .data = nullptr, .batch = 0, .head = 0, .token = 0, .key = 0};
  check_same_device(op, name, *mask, door.q, q);
  const int64_t want[4] = {q.size(0), q.size(door.head), q.size(door.token), k.size(door.token)},
                missing = 4 - mask->dim();
  bool fits = missing >= 0;
  int64_t stride[4] = {};
  for (int64_t i = missing; fits && i < 4; ++i) {
    const int64_t size = mask->size(i - missing);
    fits = size == want[i] || size == 1;
    stride[i] = size == 1 ? 0 : mask->stride(i - missing);
  }
  check(fits, op, ": ", name, " must be broadcastable to [", want[0], ", ", want[1], ", ", want[2], ", ", want[3],
        "], got ", shape_text(mask->sizes()));
  Mask m{.kind = Mask::kBool,
         .data = cptr<char>(*mask),
         .batch = stride[0],
         .head = stride[1],
         .token = stride[2],
         .key = stride[3]};
  switch (mask->scalar_type()) {
    case ScalarType::Bool: m.kind = Mask::kBool; break;
    case ScalarType::Float: m.kind = Mask::kFloat; break;
    case ScalarType::BFloat16: m.kind = Mask::kBfloat16; break;
    case ScalarType::Half: m.kind = Mask::kFloat16; break;
    default:
      throw_type_error(std::string(op) + ": " + name + " must be bool, float32, bfloat16 or float16, got " +
                       dtype_name(mask->scalar_type()));
  }
  return m;
}

// The prompts: k, v (P, Hkv, D) or (B, P, Hkv, D) and gate (H,), all three or none.
void take_prompts(const Door& door, Call& call, const MaybeTensor& prompt_k, const MaybeTensor& prompt_v,
                  const MaybeTensor& prompt_gate) {
  const char* op = door.op;
  check(prompt_k.has_value() == prompt_v.has_value() && prompt_k.has_value() == prompt_gate.has_value(), op,
        ": prompt_k, prompt_v and prompt_gate must be given together, got ", prompt_k ? "" : "no ", "prompt_k, ",
        prompt_v ? "" : "no ", "prompt_v and ", prompt_gate ? "" : "no ", "prompt_gate");
  if (!prompt_k) return;
  const Tensor& q = call.q;
  const int64_t B = q.size(0), Hkv = call.k.size(door.head), D = q.size(3), dim = prompt_k->dim();
  check(dim == 3 || dim == 4, op, ": prompt_k must have shape (P, Hkv, D) or (B, P, Hkv, D), got ",
        shape_text(prompt_k->sizes()));
  const int64_t P = prompt_k->size(dim - 3);
  check(P >= 1 && P < INT32_MAX, op, ": prompt_k must have at least one prompt, got ", P);
  for (const auto& [name, t] : {std::pair{"prompt_k", &*prompt_k}, {"prompt_v", &*prompt_v}}) {
    dim == 3 ? check_shape(op, name, *t, {P, Hkv, D}) : check_shape(op, name, *t, {B, P, Hkv, D});
    check_same_dtype(op, name, *t, door.q, q);
    check_same_device(op, name, *t, door.q, q);
  }
  check_shape(op, "prompt_gate", *prompt_gate, {q.size(door.head)});
  check_dtype(op, "prompt_gate", *prompt_gate, ScalarType::Float);
  check_same_device(op, "prompt_gate", *prompt_gate, door.q, q);
  call.prompt_k = inner_contiguous(*prompt_k);
  call.prompt_v = inner_contiguous(*prompt_v);
  call.prompt_gate = as_contiguous(*prompt_gate);
}

// (P, Hkv, D) or (B, P, Hkv, D), the first with a batch stride of 0.
template <typename T>
Heads<T> prompt_heads(const Tensor& x) {
  const int64_t dim = x.dim();
  return {ptr<std::remove_const_t<T>>(x), dim == 4 ? x.stride(0) : 0, x.stride(dim - 3), x.stride(dim - 2)};
}

template <typename T>
Prompts<T> prompts(const Call& c) {
  if (!c.prompt_k) return {};
  const int64_t dim = c.prompt_k->dim();
  return {.k = prompt_heads<const T>(*c.prompt_k),
          .v = prompt_heads<const T>(*c.prompt_v),
          .gate = cptr<float>(c.prompt_gate),
          .P = c.prompt_k->size(dim - 3),
          .B = dim == 4 ? c.prompt_k->size(0) : 1};
}

Tensor check_starts(const char* op, const char* name, const Tensor& starts, const Tensor& q, int64_t tokens) {
  check_same_device(op, name, starts, "q", q);
  check_dtype(op, name, starts, ScalarType::Int);
  check(starts.dim() == 1 && starts.size(0) >= 1, op, ": ", name, " must have shape (n+1,), got ",
        shape_text(starts.sizes()));
  const Tensor flat = as_contiguous(starts);
  if (!readable(flat)) return flat;
  const int32_t* at = cptr<int32_t>(flat);
  const int64_t n = flat.size(0) - 1;
  check(at[0] == 0 && at[n] == tokens, op, ": ", name, " must rise from 0 to the ", tokens, " tokens, got ", at[0],
        " to ", at[n]);
  for (int64_t i = 0; i < n; ++i)
    check(at[i] <= at[i + 1], op, ": ", name, " must rise from 0 to the ", tokens, " tokens, got ", at[i + 1],
          " after ", at[i]);
  return flat;
}

Call make_call(const Door& door, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
               bool causal, MaybeFloat scale, MaybeInt window, MaybeInt chunk, const MaybeTensor& cu_seqlens_q,
               const MaybeTensor& cu_seqlens_k) {
  const char* op = door.op;
  check_heads(door, q, k, v);
  check_shape(op, door.k, k, {q.size(0), k.size(1), k.size(2), q.size(3)});
  Call call{.q = inner_contiguous(q),
            .k = inner_contiguous(k),
            .v = inner_contiguous(v),
            .mask = mask,
            .starts_q = std::nullopt,
            .starts_k = std::nullopt,
            .lengths = std::nullopt,
            .block_table = std::nullopt,
            .sight = make_sight(op, causal, door.top_left, window, chunk),
            .scale = scale ? float(*scale) : default_scale(q.size(3))};
  check(cu_seqlens_q || !cu_seqlens_k, op, ": cu_seqlens_q must be given with cu_seqlens_k, got None");
  if (cu_seqlens_q) {
    check(q.size(0) == 1, op, ": q must have B = 1 where cu_seqlens_q is given, got ", q.size(0));
    call.starts_q = check_starts(op, "cu_seqlens_q", *cu_seqlens_q, q, q.size(door.token));
    call.starts_k =
        check_starts(op, "cu_seqlens_k", cu_seqlens_k ? *cu_seqlens_k : *cu_seqlens_q, q, k.size(door.token));
    check_shape(op, "cu_seqlens_k", *call.starts_k, {call.starts_q->size(0)});
  }
  return call;
}

template <typename T>
Attended<T> attended(const Door& door, const Call& c) {
  const int64_t B = c.q.size(0), width = c.block_table ? c.block_table->size(1) : 0;
  return {.q = heads<const T>(c.q, door),
          .k = heads<const T>(c.k, door),
          .v = heads<const T>(c.v, door),
          .starts_q = cptr<int32_t>(c.starts_q),
          .starts_k = cptr<int32_t>(c.starts_k),
          .lengths = cptr<int32_t>(c.lengths),
          .block_table = cptr<int32_t>(c.block_table),
          .table_width = width,
          .block = c.k.size(1),
          .mask = make_mask(door, c.mask, c.q, c.k),
          .sight = c.sight,
          .scale = c.scale,
          .sequences = c.starts_q ? c.starts_q->size(0) - 1 : B,
          .T_ = c.q.size(door.token),
          .S = c.k.size(door.token),
          .H = c.q.size(door.head),
          .Hkv = c.k.size(door.head),
          .D = c.q.size(3),
          .prompts = prompts<T>(c)};
}

std::tuple<Tensor, Tensor> forward(const Door& door, const Call& call) {
  const Tensor& q = call.q;
  const Tensor y = empty(q.sizes(), q.scalar_type(), q);
  const Tensor lse = empty({q.size(0), q.size(door.head), q.size(door.token)}, ScalarType::Float, q);
  dispatch_float(door.op, door.q, call.q, [&]<typename T>() {
    run(AttentionForward<T>{.y = heads<T>(y, door), .lse = ptr<float>(lse), .in = attended<T>(door, call)}, q);
  });
  return {y, lse};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, MaybeTensor mask, bool causal,
                                     MaybeFloat scale, MaybeInt window, MaybeInt chunk, MaybeTensor cu_seqlens_q,
                                     MaybeTensor cu_seqlens_k, bool heads_first, MaybeTensor prompt_k,
                                     MaybeTensor prompt_v, MaybeTensor prompt_gate) {
  const Door& door = heads_first ? kTorchs : kAttention;
  Call call = make_call(door, q, k, v, mask, causal, scale, window, chunk, cu_seqlens_q, cu_seqlens_k);
  take_prompts(door, call, prompt_k, prompt_v, prompt_gate);
  return forward(door, call);
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// dq, dk, dv, and where the call has prompts their gradients: else the last three are dq again, unread.
SixTensors backward(const Door& door, const Call& call, const Tensor& dy, const MaybeTensor& dlse, const Tensor& y,
                    const Tensor& lse) {
  const char* op = door.op;
  const Tensor& q = call.q;
  const int64_t B = q.size(0), T_ = q.size(door.token), H = q.size(door.head);
  for (const auto& [name, t] : {std::pair{"dy", &dy}, {"y", &y}}) {
    check_sizes(op, name, *t, q.sizes());
    check_same_dtype(op, name, *t, door.q, q);
    check_same_device(op, name, *t, door.q, q);
  }
  for (const auto& [name, t] : {std::pair{"lse", &lse}, {"dlse", dlse ? &*dlse : &lse}}) {
    check_shape(op, name, *t, {B, H, T_});
    check_dtype(op, name, *t, ScalarType::Float);
    check_same_device(op, name, *t, door.q, q);
  }
  const Tensor dy_ = inner_contiguous(dy), y_ = inner_contiguous(y), lse_ = as_contiguous(lse);
  const MaybeTensor dlse_ = dlse ? MaybeTensor(as_contiguous(*dlse)) : std::nullopt;
  const Tensor dq = empty(q.sizes(), q.scalar_type(), q);
  const Tensor dk = empty(call.k.sizes(), q.scalar_type(), q), dv = empty(call.v.sizes(), q.scalar_type(), q);
  const bool prompted = call.prompt_k.has_value();
  const Tensor dprompt_k = prompted ? empty(call.prompt_k->sizes(), q.scalar_type(), q) : dq;
  const Tensor dprompt_v = prompted ? empty(call.prompt_v->sizes(), q.scalar_type(), q) : dq;
  const Tensor dprompt_gate = prompted ? empty(call.prompt_gate->sizes(), ScalarType::Float, q) : dq;
  dispatch_float(op, door.q, q, [&]<typename T>() {
    AttentionBackward<T> params{.dq = heads<T>(dq, door),
                                .dk = heads<T>(dk, door),
                                .dv = heads<T>(dv, door),
                                .y = heads<const T>(y_, door),
                                .dy = heads<const T>(dy_, door),
                                .lse = cptr<float>(lse_),
                                .dlse = cptr<float>(dlse_),
                                .in = attended<T>(door, call)};
    if (prompted) {
      params.dprompt_k = prompt_heads<T>(dprompt_k);
      params.dprompt_v = prompt_heads<T>(dprompt_v);
      params.dprompt_gate = ptr<float>(dprompt_gate);
    }
    run(params, q);
  });
  return {dq, dk, dv, dprompt_k, dprompt_v, dprompt_gate};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dy, MaybeTensor dlse, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& y,
                                                      const Tensor& lse, MaybeTensor mask, bool causal,
                                                      MaybeFloat scale, MaybeInt window, MaybeInt chunk,
                                                      MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                                                      bool heads_first) {
  const Door& door = heads_first ? kTorchsBackward : kBackward;
  const Call call = make_call(door, q, k, v, mask, causal, scale, window, chunk, cu_seqlens_q, cu_seqlens_k);
  const SixTensors grads = backward(door, call, dy, dlse, y, lse);
  return {std::get<0>(grads), std::get<1>(grads), std::get<2>(grads)};
}

SixTensors attention_prompt_backward(const Tensor& dy, MaybeTensor dlse, const Tensor& q, const Tensor& k,
                                     const Tensor& v, const Tensor& y, const Tensor& lse, MaybeTensor mask, bool causal,
                                     MaybeFloat scale, MaybeInt window, MaybeInt chunk, MaybeTensor cu_seqlens_q,
                                     MaybeTensor cu_seqlens_k, bool heads_first, const Tensor& prompt_k,
                                     const Tensor& prompt_v, const Tensor& prompt_gate) {
  const Door& door = heads_first ? kTorchsPromptBackward : kPromptBackward;
  Call call = make_call(door, q, k, v, mask, causal, scale, window, chunk, cu_seqlens_q, cu_seqlens_k);
  take_prompts(door, call, prompt_k, prompt_v, prompt_gate);
  return backward(door, call, dy, dlse, y, lse);
}

// What both cache ops check: lengths [B] in [least, room for keys], and that the blocks they reach exist.
struct Cache {
  Tensor lengths;
  MaybeTensor block_table;
};
Cache check_cache(const char* op, const Tensor& k_cache, const Tensor& lengths, const MaybeTensor& block_table,
                  int64_t B, int64_t least) {
  check_same_device(op, "lengths", lengths, "k_cache", k_cache);
  check_dtype(op, "lengths", lengths, ScalarType::Int);
  check_shape(op, "lengths", lengths, {B});
  Cache cache{as_contiguous(lengths), std::nullopt};
  const int64_t block = k_cache.size(1);
  int64_t most = block;
  if (block_table) {
    check_same_device(op, "block_table", *block_table, "k_cache", k_cache);
    check_dtype(op, "block_table", *block_table, ScalarType::Int);
    check(block_table->dim() == 2, op, ": block_table must have shape (B, max_blocks), got ",
          shape_text(block_table->sizes()));
    check_shape(op, "block_table", *block_table, {B, block_table->size(1)});
    check(block >= 1, op, ": k_cache must have blocks of at least one token, got ", block);
    cache.block_table = as_contiguous(*block_table);
    most *= block_table->size(1);
  } else {
    check_shape(op, "k_cache", k_cache, {B, block, k_cache.size(2), k_cache.size(3)});
  }
  for (int64_t b = 0; readable(lengths) && b < B; ++b) {
    const int64_t n = cptr<int32_t>(cache.lengths)[b];
    check(n >= least && n <= most, op, ": lengths must lie in [", least, ", ", most, "], got ", n);
    if (!block_table) continue;
    const int32_t* row = cptr<int32_t>(cache.block_table) + b * block_table->size(1);
    for (int64_t i = 0; i < ceil_div(n, block); ++i)
      check(row[i] >= 0 && row[i] < k_cache.size(0), op, ": block_table must lie in [0, ", k_cache.size(0), "), got ",
            row[i]);
  }
  return cache;
}

Tensor attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
                        MaybeTensor block_table, MaybeInt window, MaybeInt chunk, MaybeFloat scale,
                        MaybeTensor prompt_k, MaybeTensor prompt_v, MaybeTensor prompt_gate) {
  const char* op = kDecode.op;
  check_heads(kDecode, q, k_cache, v_cache);
  const Cache cache = check_cache(op, k_cache, lengths, block_table, q.size(0), 0);
  Call call{.q = inner_contiguous(q),
            .k = inner_contiguous(k_cache),
            .v = inner_contiguous(v_cache),
            .mask = std::nullopt,
            .starts_q = std::nullopt,
            .starts_k = std::nullopt,
            .lengths = cache.lengths,
            .block_table = cache.block_table,
            .sight = make_sight(op, true, false, window, chunk),
            .scale = scale ? float(*scale) : default_scale(q.size(3))};
  take_prompts(kDecode, call, prompt_k, prompt_v, prompt_gate);
  return std::get<0>(forward(kDecode, call));
}

void cache_append_(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                   const Tensor& lengths, MaybeTensor block_table) {
  constexpr auto op = "cache_append_";
  check(k_cache.dim() == 4, op, ": k_cache must have 4 dimensions, got ", shape_text(k_cache.sizes()));
  check(k.dim() == 4, op, ": k must have shape (B, T, Hkv, D), got ", shape_text(k.sizes()));
  const int64_t B = k.size(0), T_ = k.size(1), Hkv = k_cache.size(2), D = k_cache.size(3);
  check_shape(op, "v_cache", v_cache, {k_cache.size(0), k_cache.size(1), Hkv, D});
  check_shape(op, "k", k, {B, T_, Hkv, D});
  check_shape(op, "v", v, {B, T_, Hkv, D});
  for (const auto& [name, t] : {std::pair{"v_cache", &v_cache}, {"k", &k}, {"v", &v}}) {
    check_same_dtype(op, name, *t, "k_cache", k_cache);
    check_same_device(op, name, *t, "k_cache", k_cache);
  }
  for (const auto& [name, t] : {std::pair{"k_cache", &k_cache}, {"v_cache", &v_cache}}) {
    check_not_expanded(op, name, *t);
    check(D <= 1 || t->stride(3) == 1, op, ": ", name, " must have a contiguous last dimension, got a stride of ",
          t->stride(3));
  }
  const Cache cache = check_cache(op, k_cache, lengths, block_table, B, T_);
  const Tensor k_ = inner_contiguous(k), v_ = inner_contiguous(v);
  dispatch_float(op, "k_cache", k_cache, [&]<typename T>() {
    run(CacheAppend<T>{.k_cache = heads<T>(k_cache),
                       .v_cache = heads<T>(v_cache),
                       .k = heads<const T>(k_),
                       .v = heads<const T>(v_),
                       .lengths = cptr<int32_t>(cache.lengths),
                       .block_table = cptr<int32_t>(cache.block_table),
                       .table_width = cache.block_table ? cache.block_table->size(1) : 0,
                       .block = k_cache.size(1),
                       .B = B,
                       .T_ = T_,
                       .Hkv = Hkv,
                       .D = D},
        k_cache);
  });
}

#define LK_SIGHT                                                                                                   \
  "Tensor? mask, bool causal, float? scale, int? window, int? chunk, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, " \
  "bool heads_first"
#define LK_PROMPTS ", Tensor? prompt_k=None, Tensor? prompt_v=None, Tensor? prompt_gate=None)"
#define LK_SIX "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "attention", "(Tensor q, Tensor k, Tensor v, " LK_SIGHT LK_PROMPTS " -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor dy, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, " LK_SIGHT
        ") -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_prompt_backward(Tensor dy, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, " LK_SIGHT
      ", Tensor prompt_k, Tensor prompt_v, Tensor prompt_gate) -> " LK_SIX);
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, int? window, "
      "int? chunk, float? scale" LK_PROMPTS " -> Tensor");
  m.def(
      "cache_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, Tensor? block_table) "
      "-> ()");
}

LK_REGISTER(m) {
  LK_IMPL(m, "attention", attention);
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_prompt_backward", TORCH_BOX(&attention_prompt_backward));
  m.impl("attention_decode", TORCH_BOX(&attention_decode));
  m.impl("cache_append_", TORCH_BOX(&cache_append_));
}

}  // namespace llamakern
