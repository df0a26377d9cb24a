// Makes one chosen allocation of the process fail (LD_PRELOAD); all others go to glibc.
#include <atomic>
#include <cerrno>
#include <cstddef>

extern "C" {

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

namespace {

std::atomic<bool> is_counting{false};
std::atomic<long> count{0};
std::atomic<long> failing{0};

bool must_fail() { return is_counting.load() && ++count == failing.load(); }

void* out_of_memory() {
  errno = ENOMEM;
  return nullptr;
}

}  // namespace

// Numbers the allocations of all threads from 1 on; the given one fails.
void fail_allocation(long number) {
  count = 0;
  failing = number;
  is_counting = true;
}

// Ends that, and returns the number of allocations.
long stop_failing() {
  is_counting = false;
  return count;
}

void* malloc(size_t size) { return must_fail() ? out_of_memory() : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return must_fail() ? out_of_memory() : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return must_fail() ? out_of_memory() : __libc_realloc(old, size); }
void* memalign(size_t alignment, size_t size) {
  return must_fail() ? out_of_memory() : __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** result, size_t alignment, size_t size) {
  if (must_fail()) {
    return ENOMEM;
  }
  *result = __libc_memalign(alignment, size);
  return *result == nullptr ? ENOMEM : 0;
}
}
