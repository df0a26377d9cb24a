// Runs rows that are contiguous and of types that the vectors load and store: chooses between the kernels for narrow,
// short and long rows, and fills the padding.
#pragma once

#include "cpu/long_row.h"
#include "cpu/narrow_rows.h"
#include "cpu/short_rows.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// valid: the row's first valid element. The columns [-before, 0) and [written, row_end), counted from it, are padding
// that is not written yet.
template <class V, class U>
MASKED_SOFTMAX_INLINE void fill_padding(U* valid, int64_t before, int64_t written, int64_t row_end,
                                        typename V::acc_t value, StoreHint hint) {
  if (before > 0) {
    fill<V>(valid - before, before, value, hint);
  }
  if (row_end > written) {
    fill<V>(valid + written, row_end - written, value, hint);
  }
}

template <class V, Operation kOperation, class input_t, class output_t>
MASKED_SOFTMAX_NOINLINE void run_short_and_long_rows(const Problem& problem, int64_t begin, int64_t end) {
  using acc_t = typename V::acc_t;
  constexpr int kInputs = input_count(kOperation);
  constexpr auto kPadding = static_cast<acc_t>(padding_value(kOperation));
  const KernelScale<kOperation, acc_t> scale(problem.scale);
  const bool is_packed = problem.packing.is_packed;
  const StoreHint hint = store_hint_of(problem);
  constexpr int64_t kScratchElems = kOperation == Operation::kSoftmax ? kMaxShortElems : 1;
  alignas(64) acc_t scratch[kScratchElems];

  // Rows are added to `next`. Once it is full, `current` is computed, which prefetches the rows of `next`; then `next`
  // becomes `current`. At first `current` is empty.
  Batch<V, input_t, output_t> batches[2];
  auto* next = &batches[0];
  auto* current = &batches[1];
  const auto run_current_batch = [&]() MASKED_SOFTMAX_NOINLINE {
    run_batch<kOperation>(*current, *next, scale, scratch, hint);
    for (int r = 0; r < (current->has_padding ? current->rows : 0); ++r) {
      const int64_t row_end = current->lengths[r] + current->after[r];
      fill_padding<V>(current->outputs[r], current->before[r], current->written[r], row_end, kPadding, hint);
    }
    current->clear();
    std::swap(next, current);
  };

  const auto add_row = [&](const RowRun& run, int64_t i, RowBounds bounds) MASKED_SOFTMAX_LAMBDA_INLINE {
    const int64_t length = bounds.length();
    const int64_t before = is_packed ? 0 : bounds.start;
    const int64_t after = is_packed ? 0 : problem.cols - bounds.end;
    output_t* const output = static_cast<output_t*>(problem.output.data) + run.output_offset(i) + bounds.start;
    if (length == 0) {
      fill_padding<V>(output, before, 0, after, kPadding, hint);
      return;
    }
    const auto input = [&](int k) MASKED_SOFTMAX_LAMBDA_INLINE {
      return static_cast<const input_t*>(problem.inputs[k].data) + run.input_offset(k, i) + bounds.start;
    };
    if (length > kMaxShortElems) {
      const void* inputs[kInputs];
      for (int k = 0; k < kInputs; ++k) {
        inputs[k] = input(k);
      }
      run_long_row<V, kOperation, acc_t>(problem, inputs, output, length, scale, acc_t{1});
      fill_padding<V>(output, before, length, length + after, kPadding, hint);
      return;
    }
    if (!next->has_room(length)) {
      run_current_batch();
    }
    auto& batch = *next;
    const int row = batch.rows++;
    batch.elems += batch.scratch_elems(length);
    for (int k = 0; k < kInputs; ++k) {
      batch.inputs[k][row] = input(k);
    }
    batch.outputs[row] = output;
    batch.lengths[row] = length;
    batch.before[row] = before;
    batch.after[row] = after;
    batch.has_padding |= before + after > 0;
  };

  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run);) {
    for (int64_t first = 0; first < run.rows; first += kBatchRows) {
      RowBounds bounds[kBatchRows];
      const int64_t count = run.rows - first < kBatchRows ? run.rows - first : kBatchRows;
      run.read_bounds(first, count, bounds);
      for (int64_t i = 0; i < count; ++i) {
        add_row(run, first + i, bounds[i]);
      }
    }
  }
  run_current_batch();
  run_current_batch();  // the last rows, which were in `next`
  if (hint == StoreHint::kNonTemporal) {
    V::store_fence();
  }
}

template <class V, Operation kOperation, class input_t, class output_t>
void run_contiguous_rows(const Problem& problem, int64_t begin, int64_t end) {
  constexpr auto run_others = run_short_and_long_rows<V, kOperation, input_t, output_t>;
  if constexpr (has_narrow_kernel(kOperation) && V::kMaxNarrowVectors > 0) {
    if (is_narrow<V>(problem)) {
      return run_narrow_rows<V, input_t, output_t, kOperation, V::kMaxNarrowVectors>(
          problem, begin, end, [&](int64_t row) { run_others(problem, row, row + 1); });
    }
  }
  run_others(problem, begin, end);
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
