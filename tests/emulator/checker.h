// Checks which bytes a kernel accesses, and in which order.
//
// Kernels are compiled with -fsanitize=thread but not linked with that sanitizer's runtime: the compiler announces
// every load and store to the functions in tsan_hooks.cpp, which check it here. A byte of device memory may be read or
// written if a buffer allows it, a byte of shared memory if an array covers it. Two accesses to one byte by different
// threads, one of them a store, must be ordered by a barrier of their block or cluster. Within a warp, a shuffle orders
// a load before a store, since it waits for the loaded value.
//
// An asynchronous copy accesses its memory from its call on, until a thread waits for it: other accesses must be
// ordered before the call, or be of a thread that has waited, or has met at a barrier one that had. An mbarrier orders
// copies before loads; it does not order the threads' own accesses. What threads store in shared memory is visible to a
// bulk copy after fence.proxy.async by the thread that stored it, and a barrier.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt.h"

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

void add_shared_array(const void* p, size_t size_bytes);
void begin_checked_cluster(unsigned blocks);

// return_address: that of the call that announces the access.
void check_access(const void* p, size_t size_bytes, bool is_store, const void* return_address);

struct Copy;
// Checks both sides of a copy that the current thread issues: number `number` of machine().copies, counted from 1.
void check_copy(const Copy& copy, uint32_t number);

// Checks the initialization of an mbarrier object, which no thread may load or store afterwards, or another use of one.
enum class MBarrierUse { kInit, kByThread, kByCopy };
void check_mbarrier(const void* barrier, MBarrierUse use, const Location& location);

}  // namespace simt
