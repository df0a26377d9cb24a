#include "cpu/store_hint.h"

#include <atomic>
#include <cstdio>

namespace masked_softmax {
namespace {

// The size of a cache of cpu0: index 2 is L2, 3 the last-level cache. From sysfs, because sysconf may report the sum of
// all cores' caches. Called from compute threads while others write results, so it must not throw: plain C stdio
// reports a failed allocation by a null pointer.
int64_t cache_bytes(int index, int64_t otherwise) {
  char path[64];
  std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
  std::FILE* const file = std::fopen(path, "r");
  if (file == nullptr) {
    return otherwise;
  }
  long long size = 0;
  char unit = 0;
  const bool is_read = std::fscanf(file, "%lld%c", &size, &unit) == 2 && size > 0;
  std::fclose(file);
  return is_read && unit == 'M' ? size << 20 : is_read && unit == 'K' ? size << 10 : otherwise;
}

// What one core can use of the last-level cache. A larger one is shared by many cores, and a virtual machine reports
// all of it. (Xeon, 480 MiB reported, float32 rows of 512 and 4096 columns, non-temporal over cached time: operands of
// 64 MiB 0.91 to 1.03, 128 MiB 0.66, 256 MiB 0.70 to 0.80.)
int64_t usable_llc_bytes() {
  constexpr int64_t kMaxUsable = 128 << 20;
  const int64_t reported = cache_bytes(3, 32 << 20);
  return reported < kMaxUsable ? reported : kMaxUsable;
}

constexpr int kNotForced = -1;
std::atomic<int> forced{kNotForced};

int64_t operand_bytes(const Problem& problem) {
  int64_t element_bytes = size_bytes(problem.output.type);
  for (int k = 0; k < problem.input_count; ++k) {
    element_bytes += size_bytes(problem.inputs[k].type);
  }
  return problem.output_elems() * element_bytes;
}

}  // namespace

void force_store_hint(std::optional<StoreHint> hint) {
  forced.store(hint.has_value() ? static_cast<int>(*hint) : kNotForced, std::memory_order_relaxed);
}

StoreHint store_hint_of(const Problem& problem) {
  const int hint = forced.load(std::memory_order_relaxed);
  if (hint != kNotForced) {
    return static_cast<StoreHint>(hint);
  }
  static const int64_t llc_bytes = usable_llc_bytes();
  const bool is_large = operand_bytes(problem) >= llc_bytes / 4 * 3;
  const bool is_in_place = problem.output.data == problem.inputs[0].data;
  return is_large && !is_in_place ? StoreHint::kNonTemporal : StoreHint::kCached;
}

MemoryHints memory_hints_of(const Problem& problem) {
  static const int64_t l2_bytes = cache_bytes(2, 1 << 20);
  // Xeon, forward: without prefetches, 64 MiB took 2.0 times as long, 16 MiB 0.93 to 1.06.
  constexpr int64_t kMaxCached = 24 << 20;
  const int64_t bytes = operand_bytes(problem);
  const StoreHint store = store_hint_of(problem);
  return {bytes > l2_bytes, store == StoreHint::kCached && bytes <= kMaxCached, store};
}

}  // namespace masked_softmax
