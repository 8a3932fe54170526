// What a machine can do at most, as work of a known size under a benchmark's clock: multiply-adds between registers,
// bytes read, bytes copied. All threads take part, on the instruction set in use.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llamakern {

// Each of `tasks` runs `rounds` times acc += a·b over as many accumulators as hide the latency.
struct MultiplyAdds {
  bool pairs;  // of bfloat16 where the set multiplies those at once; else, and in sets without them, of float32
  int64_t tasks, rounds;
  int64_t* flops;  // out, two for each multiply-add
};

struct ReadMemory {
  const void* from;  // [bytes]
  int64_t bytes;     // a multiple of 4096
  int32_t* sum;      // out, so that every word counts
};

struct CopyMemory {
  void* to;          // [bytes]  out
  const void* from;  // [bytes]
  int64_t bytes;     // a multiple of 4096
};

LK_EXPORT int64_t multiply_adds(bool pairs, int64_t tasks, int64_t rounds);
LK_EXPORT int32_t read_memory(const void* from, int64_t bytes);
LK_EXPORT void copy_memory(void* to, const void* from, int64_t bytes);

}  // namespace llamakern
