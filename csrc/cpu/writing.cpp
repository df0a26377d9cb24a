#include "cpu/writing.h"

#include <atomic>
#include <cstdio>

namespace masked_softmax {
namespace {

// As the kernel lists it: the C library's own answer may be that of all cores' caches together. Asked for by threads
// that compute, while others write: so by functions that throw nothing where memory is short.
int64_t find_last_cache_bytes() {
  constexpr int64_t kUsual = 32 << 20;
  std::FILE* const file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
  if (file == nullptr) {
    return kUsual;
  }
  long long size = 0;
  char unit = 0;
  const bool is_read = std::fscanf(file, "%lld%c", &size, &unit) == 2 && size > 0;
  std::fclose(file);
  return is_read && unit == 'M' ? size << 20 : is_read && unit == 'K' ? size << 10 : kUsual;
}

constexpr int kOwnChoice = -1;
std::atomic<int> forced{kOwnChoice};

}  // namespace

void force_writing(std::optional<Writing> writing) {
  forced.store(writing.has_value() ? static_cast<int>(*writing) : kOwnChoice, std::memory_order_relaxed);
}

Writing writing_of(const Problem& problem) {
  const int answer = forced.load(std::memory_order_relaxed);
  if (answer != kOwnChoice) {
    return static_cast<Writing>(answer);
  }
  static const int64_t last_cache_bytes = find_last_cache_bytes();
  int64_t element_bytes = size_bytes(problem.output.type);
  for (int k = 0; k < problem.input_count; ++k) {
    element_bytes += size_bytes(problem.inputs[k].type);
  }
  const bool is_large = problem.output_elems() * element_bytes >= last_cache_bytes / 4 * 3;
  const bool is_in_place = problem.output.data == problem.inputs[0].data;
  return is_large && !is_in_place ? Writing::kPastCaches : Writing::kToCache;
}

}  // namespace masked_softmax
