// Checks which bytes a kernel accesses, and in which order.
//
// Kernels are compiled with -fsanitize=thread but not linked with that sanitizer's runtime: the compiler announces
// every load and store to the functions in tsan_hooks.cpp, which check it here. A byte of device memory may be read or
// written if a buffer allows it, a byte of shared memory if an array covers it. Two accesses to one byte by different
// threads, one of them a store, must be ordered by a barrier of their block or cluster. Within a warp, a shuffle orders
// a load before a store, since it waits for the loaded value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

enum Permission : uint8_t {
  kMayRead = 1,
  kMayWrite = 2,
  kMustBeWritten = 4,  // see count_unwritten()
  kUninitialized = 8,  // may be read only after it is written
  kManyWriters = 16,   // threads may store to it without a barrier between them: they store the same value
};

// Declares a buffer in device memory. Overlapping buffers add their permissions. Without any buffer, device memory is
// not checked.
void allow(const void* p, size_t size_bytes, uint8_t permission);
void forget_buffers();

// The number of kMustBeWritten bytes that no store has reached.
size_t count_unwritten();
// The number of stores to kMustBeWritten bytes that another thread's store, or an earlier launch's, had reached.
size_t count_rewritten();

// Kernels may read the host's stack, which holds the launch's arguments.
void remember_host_stack();

void add_shared_array(const void* p, size_t size_bytes, unsigned block);
void begin_checked_cluster();

// return_address: that of the call that announces the access.
void check_access(const void* p, size_t size_bytes, bool is_store, const void* return_address);

}  // namespace simt
