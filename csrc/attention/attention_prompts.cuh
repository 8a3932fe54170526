// LLaMA-Adapter's prompts on the GPU: attention over the prompts alone, as keys that all queries see, by the kernels of
// the words; its result is added, times the gate, where theirs leaves the registers.
#pragma once
#include "attention_rows.cuh"

namespace llamakern::cuda {

// What is added to each row of queries: gate[h] times that of `rows`, or once where gate is null. Nothing where `rows`
// is null.
template <typename T>
struct Added {
  Heads<const T> rows;  // [B, T, H, D]
  const float* gate;

  LK_DEVICE const T* row(const Operands<T>& o, const Tile& tile, int row) const {
    return query_row(rows, o, tile, row);
  }
  LK_DEVICE float by(const Operands<T>& o, const Tile& tile, int row) const {
    if (row >= tile.T * int(o.group.d)) return 0.0f;
    return gate ? gate[query_head(o, tile, row)] : 1.0f;
  }
};

// Whether prompts weigh so much in y that its rounding hides what the words' delta is made of.
template <typename T>
LK_DEVICE bool drowned(const Operands<T>& o, int kv) {
  const float* const gates = sizeof(T) == 2 ? o.in.prompts.gate : nullptr;
  const int G = int(o.group.d);
  bool some = false;
  for (int g = 0; gates && g < G; ++g) some = some || fabsf(gates[kv * G + g]) > 1.0f;
  return some;
}

// The queries over the prompts. Packed sequences are one batch row here: all see the same prompts.
template <typename T>
Attended<T> over_prompts(Attended<T> in) {
  in.sequences = in.starts_q ? 1 : in.sequences;
  in.starts_q = in.starts_k = in.lengths = in.block_table = nullptr;
  in.k = in.prompts.k;
  in.v = in.prompts.v;
  in.S = in.prompts.P;
  in.mask = {};
  in.sight = {};
  in.prompts = {};
  return in;
}

// A piece of workspace after another, each aligned to 256 bytes.
class Workspace {
 public:
  explicit Workspace(void* at) : at_(reinterpret_cast<uintptr_t>(at)) {}
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t piece = at_;
    at_ += uintptr_t(round_up(count * int64_t(sizeof(T)), 256));
    return reinterpret_cast<T*>(piece);
  }
  void* rest() const { return reinterpret_cast<void*>(at_); }
  int64_t bytes() const { return int64_t(at_); }  // where it began at null

 private:
  uintptr_t at_;
};

// Queries over prompts: [B, T, H, D] and [B, H, T].
template <typename T>
struct PromptOutputs {
  T* y;
  float* lse;

  PromptOutputs(const Attended<T>& in, Workspace& space)
      : y(space.take<T>(all_rows(in) * in.D)), lse(space.take<float>(all_rows(in))) {}
};
template <typename T>
Heads<T> dense_queries(T* data, const Attended<std::remove_const_t<T>>& in) {
  return {data, in.T_ * in.H * in.D, in.H * in.D, in.D};
}

}  // namespace llamakern::cuda
