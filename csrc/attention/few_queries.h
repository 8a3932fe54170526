// Attention of a few query rows over many keys: decoding. Keys and values are read once, where they lie and in their
// order, so that memory streams: each row, as it comes, is multiplied with all the query rows of its head (stream.h).
//
// The keys of a sequence are cut into ranges, each a task that leaves each head's maximum, sum and output; these are
// joined in their order.
#pragma once
#include "attention.h"

namespace llamakern::LK_ISA {

constexpr int64_t kFewRows = 32;  // query rows of a group; with more of them, packing all keys at first is faster

template <typename T>
void few_queries(const AttentionForward<T>& p);

}  // namespace llamakern::LK_ISA
