// What ranks tell each other, for callers that have addresses. Each is told rank, ranks and the memory that they share, which begins
// as zeros; what it returns is `tandem::Told`. Sums set the floating-point mode: ranks may have callers with different ones.

#include "sums.h"

#define TANDEM_EXPORT extern "C" __attribute__((visibility("default")))

using tandem::Exchange;

TANDEM_EXPORT size_t tandem_meeting_size(int ranks) { return tandem::Meeting::size(ranks); }

TANDEM_EXPORT int tandem_add_float32(void* memory, int rank, int ranks, float* x, size_t size) {
  tandem::FloatMode mode;
  return int(Exchange(memory, rank, ranks).add<tandem::F32>(x, size));
}

TANDEM_EXPORT int tandem_add_bfloat16(void* memory, int rank, int ranks, tandem::bf16* x, size_t size) {
  tandem::FloatMode mode;
  return int(Exchange(memory, rank, ranks).add<tandem::BF16>(x, size));
}

TANDEM_EXPORT int tandem_gather(void* memory, int rank, int ranks, const void* x, size_t size, void* every) {
  return int(Exchange(memory, rank, ranks).gather(x, size, every));
}

TANDEM_EXPORT void tandem_leave(void* memory) { Exchange(memory, 0, 0).leave(); }

// Of one rank: parts, bytes, nanoseconds.
TANDEM_EXPORT void tandem_told(const void* memory, int rank, uint64_t counters[3]) {
  const tandem::Meeting::Rank& own = ((const tandem::Meeting*)memory)->ranks[rank];
  counters[0] = own.parts.load(), counters[1] = own.bytes, counters[2] = own.nanoseconds;
}
