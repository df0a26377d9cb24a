#include "cpu/store_hint.h"

#include <atomic>
#include <cstdio>

namespace masked_softmax {
namespace {

// From sysfs, because sysconf may report the sum of all cores' caches. Called from compute threads while others write
// results, so it must not throw: plain C stdio, no allocation.
int64_t find_llc_bytes() {
  constexpr int64_t kDefault = 32 << 20;
  std::FILE* const file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
  if (file == nullptr) {
    return kDefault;
  }
  long long size = 0;
  char unit = 0;
  const bool is_read = std::fscanf(file, "%lld%c", &size, &unit) == 2 && size > 0;
  std::fclose(file);
  return is_read && unit == 'M' ? size << 20 : is_read && unit == 'K' ? size << 10 : kDefault;
}

constexpr int kNotForced = -1;
std::atomic<int> forced{kNotForced};

}  // namespace

void force_store_hint(std::optional<StoreHint> hint) {
  forced.store(hint.has_value() ? static_cast<int>(*hint) : kNotForced, std::memory_order_relaxed);
}

int64_t operand_bytes(const Problem& problem) {
  int64_t element_bytes = size_bytes(problem.output.type);
  for (int k = 0; k < problem.input_count; ++k) {
    element_bytes += size_bytes(problem.inputs[k].type);
  }
  return problem.output_elems() * element_bytes;
}

StoreHint store_hint_of(const Problem& problem) {
  const int hint = forced.load(std::memory_order_relaxed);
  if (hint != kNotForced) {
    return static_cast<StoreHint>(hint);
  }
  static const int64_t llc_bytes = find_llc_bytes();
  const bool is_large = operand_bytes(problem) >= llc_bytes / 4 * 3;
  const bool is_in_place = problem.output.data == problem.inputs[0].data;
  return is_large && !is_in_place ? StoreHint::kNonTemporal : StoreHint::kCached;
}

MemoryHints memory_hints_of(const Problem& problem) {
  constexpr int64_t kL2Bytes = 1 << 20;
  return {operand_bytes(problem) > kL2Bytes, store_hint_of(problem)};
}

}  // namespace masked_softmax
