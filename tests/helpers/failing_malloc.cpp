// Lets one allocation fail, as where memory is short. To be preloaded; glibc's own functions do the work.
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

bool fails() { return is_counting.load() && ++count == failing.load(); }

void* out_of_memory() {
  errno = ENOMEM;
  return nullptr;
}

}  // namespace

// From now on allocations of all threads count, from 1; that of the given number fails.
void fail_allocation(long number) {
  count = 0;
  failing = number;
  is_counting = true;
}

// How many there were. None fails any more.
long stop_failing() {
  is_counting = false;
  return count;
}

void* malloc(size_t size) { return fails() ? out_of_memory() : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails() ? out_of_memory() : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return fails() ? out_of_memory() : __libc_realloc(old, size); }
void* memalign(size_t alignment, size_t size) { return fails() ? out_of_memory() : __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** result, size_t alignment, size_t size) {
  if (fails()) {
    return ENOMEM;
  }
  *result = __libc_memalign(alignment, size);
  return *result == nullptr ? ENOMEM : 0;
}
}
