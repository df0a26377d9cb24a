// The functions that code compiled with -fsanitize=thread calls before each access to memory, instead of the
// sanitizer's runtime.
#include "checker.h"

#define SIMT_HOOK(name, size, is_store) \
  void name(void* p) { simt::check_access(p, size, is_store, __builtin_return_address(0)); }
#define SIMT_HOOKS(size)                              \
  SIMT_HOOK(__tsan_read##size, size, false)           \
  SIMT_HOOK(__tsan_write##size, size, true)           \
  SIMT_HOOK(__tsan_unaligned_read##size, size, false) \
  SIMT_HOOK(__tsan_unaligned_write##size, size, true) \
  SIMT_HOOK(__tsan_volatile_read##size, size, false)  \
  SIMT_HOOK(__tsan_volatile_write##size, size, true)

extern "C" {
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, size_t size_bytes) {
  simt::check_access(p, size_bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size_bytes) {
  simt::check_access(p, size_bytes, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
