// Runs rows that are contiguous and of types that the vectors load and store.
#pragma once

#include "cpu/block_kernel.h"
#include "cpu/derivative_rows.h"
#include "cpu/long_row.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class V, Operation kOperation, class T, class U>
void run_contiguous_rows(const Problem& problem, int64_t begin, int64_t end) {
  const MemoryHints hints = memory_hints_of(problem);
  const int64_t longest = problem.longest();
  if (longest > kMaxBlockCols) {
    return run_long_rows<V, kOperation>(problem, begin, end);
  }
  if constexpr (is_tuned(kOperation) && V::kHasShortRowKernels) {
    if constexpr (!is_forward(kOperation) && std::is_same_v<T, float> && std::is_same_v<U, float>) {
      if (hints.is_cached) {
        return longest <= kTileElems<V>
                   ? DerivativeRows<V, kOperation, T, true>(problem, hints.prefetch).run(begin, end)
                   : DerivativeRows<V, kOperation, T, false>(problem, hints.prefetch).run(begin, end);
      }
    }
    if (longest <= kTileElems<V>) {
      return BlockKernel<V, kOperation, T, U, true>(problem, hints).run(begin, end);
    }
  }
  BlockKernel<V, kOperation, T, U, false>(problem, hints).run(begin, end);
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
