// Cache lines, and prefetches of them.
#pragma once

#include "cpu/prelude.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

constexpr int kIntoL1 = 3;  // __builtin_prefetch()'s degree of locality
constexpr int64_t kLineBytes = 64;

MASKED_SOFTMAX_INLINE void prefetch_lines(const void* first, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(first) + i, 0, kIntoL1);
  }
}

// For cached stores: lines of padding that miss the cache would stall the stores behind them.
MASKED_SOFTMAX_INLINE void prefetch_padding(const void* first, int64_t bytes) {
  constexpr int64_t kMaxBytes = 4096;  // beyond, hardware prefetchers recognize the stores as a stream
  prefetch_lines(first, bytes < kMaxBytes ? bytes : kMaxBytes);
}

// Prefetches the first lines of every page that begins in [first, first + bytes). The page's address is then in the
// TLB, and its stream of lines has begun: hardware prefetchers stop at the end of a page. Pages have 4 KiB unless the
// operating system was asked for huge ones. Nothing is read, so the range may be outside of the tensor.
MASKED_SOFTMAX_INLINE void prefetch_page_starts(const void* first, int64_t bytes, int64_t lines) {
  constexpr uintptr_t kPageBytes = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(first);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  for (uintptr_t page = (begin + kPageBytes - 1) / kPageBytes * kPageBytes; page < end; page += kPageBytes) {
    prefetch_lines(reinterpret_cast<const void*>(page), lines * kLineBytes);
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
