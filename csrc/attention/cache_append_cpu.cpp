// New keys and values into the cache: each task copies some tokens.
#include "../common/parallel.h"
#include "attention.h"

namespace llamakern::LK_ISA {

template <typename T>
static void cache_append(const CacheAppend<T>& p) {
  const int64_t tokens_per_task = max64(1, 16384 / max64(1, p.Hkv * p.D));
  parallel_ranges(p.B * p.T_, tokens_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t bt = begin; bt < end; ++bt) {
      const int64_t b = bt / p.T_, t = bt % p.T_, j = p.lengths[b] - p.T_ + t;
      const int64_t row = p.block_table ? p.block_table[b * p.table_width + j / p.block] : b;
      const int64_t place = p.block_table ? j % p.block : j;
      for (int64_t h = 0; h < p.Hkv; ++h) {
        memcpy(p.k_cache.at(row, place, h), p.k.at(b, t, h), size_t(p.D) * sizeof(T));
        memcpy(p.v_cache.at(row, place, h), p.v.at(b, t, h), size_t(p.D) * sizeof(T));
      }
    }
  });
}

LK_KERNEL(CacheAppend<float>, cache_append<float>);
LK_KERNEL(CacheAppend<bfloat16>, cache_append<bfloat16>);
LK_KERNEL(CacheAppend<float16>, cache_append<float16>);

}  // namespace llamakern::LK_ISA
