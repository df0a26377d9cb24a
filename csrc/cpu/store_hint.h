// How results are stored.
#pragma once

#include <optional>

#include "common/problem.h"

namespace masked_softmax {

// Non-temporal stores skip the read-for-ownership of the destination line, which is a third of a large copy's traffic,
// and leave no line in the caches.
enum class StoreHint { kCached, kNonTemporal };

// Non-temporal where inputs and output together come near to what a core can use of the last-level cache: the output's
// first lines would be evicted before its last are written. Not in place, where the lines to write have just been read.
// (Zen 4, backward, 4096 x 512 floats, November 2026: 210 ns a row cached, 120 non-temporal.)
StoreHint store_hint_of(const Problem& problem);

// How rows are read and written.
struct MemoryHints {
  bool prefetch;   // the operands leave L2
  bool is_cached;  // they stay in the last-level cache, and hardware prefetchers are enough
  StoreHint store;
};

MemoryHints memory_hints_of(const Problem& problem);

// For tests: the result of store_hint_of() for every problem from now on; with nullopt, its own choice again.
void force_store_hint(std::optional<StoreHint> hint);

}  // namespace masked_softmax
