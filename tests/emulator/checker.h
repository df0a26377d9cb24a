// Who may touch which byte, and in which order.
//
// Kernels are compiled with -fsanitize=thread but not linked with that sanitizer's runtime: the compiler then announces
// every load and store to functions of ours (tsan_hooks.cpp), which look it up here. A byte of device memory may be
// read or written where a buffer says so; a byte of shared memory where an array lies. Two accesses to one byte by
// different threads, one of them a store, must have a meeting between them: a barrier of their block or cluster, or,
// for a load before a store within a warp, a shuffle, which waits for what was loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

enum Permission : uint8_t {
  kMayRead = 1,
  kMayWrite = 2,
  kMustBeWritten = 4,  // see count_unwritten()
  kHoldsNothing = 8,   // until it is written, reading it is a mistake
};

// Device memory from p on. Bytes may be covered twice: what either allows is allowed. Without any buffer, nothing is
// checked.
void allow(const void* p, size_t size_bytes, uint8_t permission);
void forget_buffers();

// How many bytes that must be written have not been, since they were allowed.
size_t count_unwritten();

// Where the launch's arguments lie.
void remember_host_stack();

void add_shared_array(const void* p, size_t size_bytes, unsigned block);
void begin_checked_cluster();

// return_address: of the call that announces the access.
void check_access(const void* p, size_t size_bytes, bool is_store, const void* return_address);

}  // namespace simt
