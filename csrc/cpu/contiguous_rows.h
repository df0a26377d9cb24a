// Runs rows that are contiguous and of types that the vectors load and store.
#pragma once

#include "cpu/block_kernel.h"
#include "cpu/long_row.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class V, Operation kOperation, class T, class U>
void run_contiguous_rows(const Problem& problem, int64_t begin, int64_t end) {
  const MemoryHints hints = memory_hints_of(problem);
  const int64_t longest = problem.longest();
  if (longest > kMaxBlockCols) {
    return run_long_rows<V, kOperation>(problem, begin, end);
  }
  if constexpr (is_tuned(kOperation)) {
    if (longest <= kTileElems<V>) {
      return BlockKernel<V, kOperation, T, U, true>(problem, hints).run(begin, end);
    }
  }
  BlockKernel<V, kOperation, T, U, false>(problem, hints).run(begin, end);
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
