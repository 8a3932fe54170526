// The prompts of LLaMA-Adapter on the CPU: a pass over the same strips of queries, after the words in forward and
// before them in backward.
#pragma once
#include "band.h"

namespace llamakern::LK_ISA {

enum class Pass { kForward, kBackward };

// All prompts of a call, packed once for the matmuls; empty where there are none.
template <typename T>
class PackedPrompts {
  using W = Words<T>;

 public:
  struct Head {
    uint32_t *k, *v;    // rows; v in pair panels where forward
    uint32_t* k_pairs;  // pair panels, in backward only
  };

  PackedPrompts(const Attended<T>& in, Pass pass);
  Head head(int64_t b, int64_t kv) const {
    uint32_t* at = const_cast<Scratch<uint32_t>&>(room_).get() + (b % B_ * Hkv_ + kv) * size_;
    return {at, at + rows_, at + rows_ + max64(rows_, panels_)};
  }

 private:
  int64_t B_, Hkv_, rows_, panels_, size_;
  Scratch<uint32_t> room_;
};

// o [channels, kStrip] += divisor·g Σ_p a_p pv_p, so that o / divisor is y. Where divisor is 0, for a query that sees
// no word, it becomes 1. Nothing changes where the gates of the group's heads are all 0.
template <typename T>
void add_prompts(float* o, float* divisor, const uint32_t* q, const PackedPrompts<T>& prompts, const Group<T>& group,
                 const Strip& strip);

// What the prompts of one key/value head receive: dk and dv, chunks of [rows, channels], and dg.
struct PromptSums {
  float *dk, *dv;  // dk before its scale
  float* dgate;    // [G]

  PromptSums(float* room, int64_t P, int64_t D)
      : dk(room), dv(room + chunk_rows(P) * round_up(D, kLanes)), dgate(dv + chunk_rows(P) * round_up(D, kLanes)) {}
  static int64_t chunk_rows(int64_t P) { return round_up(P, kTileRows); }
  static int64_t size(int64_t P, int64_t D, int64_t G) {
    return 2 * chunk_rows(P) * round_up(D, kLanes) + round_up(G, kLanes);
  }
};

// Adds a packed band's gradients to `sums` and to its strips' dq, and takes the prompts' part out of their delta.
template <typename T>
void prompts_backward(const PromptSums& sums, const PackedPrompts<T>& prompts, const Group<T>& group,
                      const Strip* strips, int64_t count, const BandData<Words<T>>& band);

// The gradients of the prompts, which are the sums of groups [first, first + groups), `parts` for each, in their order:
// sums [groups, parts][PromptSums::size]. totals [B, Hkv][PromptSums::size] hold the sums of groups before `first`.
template <typename T>
void add_prompt_sums(float* totals, const Attended<T>& in, const float* sums, int64_t first, int64_t groups,
                     int64_t parts);
template <typename T>
void store_prompt_sums(const AttentionBackward<T>& p, const float* totals);

}  // namespace llamakern::LK_ISA
