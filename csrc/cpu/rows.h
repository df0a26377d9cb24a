// Runs a problem's rows [begin, end) with one instruction set: the choice of the kernels.
//
// A map of csrc/cpu, from the call to the arithmetic:
//
//   dispatch, isa_table.inc, isa_*.cpp   the instruction set; each compiles all that follows once, in its own namespace
//   rows.h                               the operation and its types: contiguous or other rows
//   contiguous_rows.h                    blocks of rows, single rows, or long rows
//   block_kernel.h, row_block.h          the passes over a block of rows
//   derivative_rows.h                    derivatives in the caches, a row at a time
//   long_row.h, staging.h, gather        the passes over one long row, or one of any other type and stride
//   column_tiles.h                       column tiles (dim != -1), transposed into contiguous rows on the stack
//   row_kernel.h, derivative_kernel.h    the expressions of the passes; row_kernel.h begins with the algorithm
//   row_passes.h, exp2.h                 loops over a row, sums, the exponential
//   vector_defaults.h, vec_*.h           vectors
//   partition, store_hint, huge_pages    rows to threads; how results are written
//   prefetch.h                           prefetches of lines and pages
#pragma once

#include "cpu/column_tiles.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// Whether a pair of type_pairs.inc has contiguous kernels for an operation: the accumulation types for all operations;
// others, if the vectors load and store them, for tuned ones, where a pair that widens serves forward passes only, and
// one that narrows derivatives only.
template <Operation kOperation, class input_t, class output_t>
constexpr bool has_contiguous_kernel() {
  if (kOperation != Operation::kRowScale && std::is_same_v<input_t, output_t> &&
      (std::is_same_v<input_t, float> || std::is_same_v<input_t, double>)) {
    return true;
  }
  constexpr bool kIsUseful =
      is_forward(kOperation) ? sizeof(input_t) <= sizeof(output_t) : sizeof(input_t) >= sizeof(output_t);
  constexpr bool kIsLoadable = is_loadable<Float, input_t> && is_loadable<Float, output_t> && Float::kLoads16Bit;
  return is_tuned(kOperation) && kIsLoadable && kIsUseful;
}

// Rows of any types and strides. Column tiles write results of the scores' shape, and take no number a row but a sink.
// Not inlined, so that only these rows pay for the stack of column tiles.
template <class V, Operation kOperation>
MASKED_SOFTMAX_NOINLINE void run_other_rows(const Problem& problem, int64_t begin, int64_t end) {
  if constexpr (!returns_or_takes_row_numbers(info_of(kOperation).signature)) {
    ColumnTiles<V, kOperation> tiles(problem);
    if (tiles.is_possible()) {
      return tiles.run(begin, end);
    }
  }
  run_long_rows<V, kOperation>(problem, begin, end);
}

template <Operation kOperation>
void run_operation(const Problem& problem, int64_t begin, int64_t end) {
  if (has_contiguous_columns(problem) && input_types_agree(problem) && !is_scale_extreme(problem) &&
      input_factor(problem) == 1) {
#define MASKED_SOFTMAX_TYPE_PAIR(input_t, output_t, cuda)                                \
  if constexpr (has_contiguous_kernel<kOperation, input_t, output_t>()) {                \
    if (problem.inputs[0].type == ElementTraits<input_t>::kType &&                       \
        problem.output.type == ElementTraits<output_t>::kType) {                         \
      using V = std::conditional_t<std::is_same_v<input_t, double>, Double, Float>;      \
      return run_contiguous_rows<V, kOperation, input_t, output_t>(problem, begin, end); \
    }                                                                                    \
  }
#include "common/type_pairs.inc"
#undef MASKED_SOFTMAX_TYPE_PAIR
  }
  if (accumulates_in_double(problem)) {
    run_other_rows<Double, kOperation>(problem, begin, end);
  } else {
    run_other_rows<Float, kOperation>(problem, begin, end);
  }
}

void run_rows(const Problem& problem, int64_t begin, int64_t end) {
  visit_operation(problem.operation,
                  [&](auto operation) { run_operation<decltype(operation)::value>(problem, begin, end); });
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
