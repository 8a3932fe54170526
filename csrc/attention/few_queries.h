// Attention of a few query rows over many keys: decoding. The roles turn around: keys, then channels, are the lanes of the
// tile, and the query rows are its rows, so that each key and value is read once, where it lies, and packed in the L1 cache.
//
// The keys of a group are cut into ranges of kRangeKeys, each a task that leaves its own maximum, sum and output; these are
// joined in their order.
#pragma once
#include "attention.h"

namespace llamakern::LK_ISA {

constexpr int64_t kFewRows = 32;  // query rows of a group; with more of them, packing all keys at first is faster

template <typename T>
void few_queries(const AttentionForward<T>& p);

}  // namespace llamakern::LK_ISA
