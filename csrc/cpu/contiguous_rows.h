// Runs rows that are contiguous and of types that the vectors load and store.
#pragma once

#include "cpu/block_kernel.h"
#include "cpu/derivative_rows.h"
#include "cpu/long_row.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// Rows of up to max_narrow_cols() columns have block kernels without loops. Rows of two types and of float64 have none:
// they are rare, and their kernels took an eighth of the time that this file compiles (GCC 12). Without loops every
// vector is masked, which pays off for fewer columns where masked loads of 16-bit types take several instructions.
template <class V, Operation kOperation, class T, class U>
constexpr int64_t max_narrow_cols() {
  if (!is_tuned(kOperation) || !V::kHasShortRowKernels || !std::is_same_v<T, U> || sizeof(T) > sizeof(float)) {
    return 0;
  }
  const bool is_slow = !is_forward(kOperation) && sizeof(T) == 2 && !V::kHasMaskedLoads16Bit;
  return is_slow && kTileElems<V> > 16 ? 16 : kTileElems<V>;
}

template <class V, Operation kOperation, class T, class U>
void run_contiguous_rows(const Problem& problem, int64_t begin, int64_t end) {
  const MemoryHints hints = memory_hints_of(problem);
  const int64_t longest = problem.longest();
  constexpr bool kHasBlocks = is_tuned(kOperation) || V::kHasShortRowKernels;
  if (longest > kMaxBlockCols || !kHasBlocks) {
    return run_long_rows<V, kOperation>(problem, begin, end);
  }
  if constexpr (is_tuned(kOperation) && V::kHasShortRowKernels) {
    if constexpr (!is_forward(kOperation) && std::is_same_v<T, float> && std::is_same_v<U, float>) {
      if (hints.is_cached) {
        return longest <= kTileElems<V> && problem.starts.is_always_0() && !problem.packing.is_packed
                   ? run_narrow_derivative_rows<V, kOperation, T>(problem, begin, end)
                   : DerivativeRows<V, kOperation, T>(problem, hints.prefetch).run(begin, end);
      }
    }
  }
  if constexpr (max_narrow_cols<V, kOperation, T, U>() > 0) {
    if (longest <= max_narrow_cols<V, kOperation, T, U>()) {
      return BlockKernel<V, kOperation, T, U, true>(problem, hints).run(begin, end);
    }
  }
  if constexpr (kHasBlocks) {
    BlockKernel<V, kOperation, T, U, false>(problem, hints).run(begin, end);
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
