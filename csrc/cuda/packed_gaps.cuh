// Packed rows: NaN in the elements that no valid row covers, before the rows' own kernels run.
//
// Packed rows should tile their buffer: the first begins at position 0, each other one where the one before it ends,
// and the last ends at the buffer's end. Then nothing is written here. Offsets that the caller computed on the GPU may
// be wrong, and then every element that no valid row covers must become NaN, without a synchronisation.
//
// It is enough to fill the gaps, the positions from the end of one row to the start of the next. Proof: the positions
//
//   0, start of row 0, end of row 0, start of row 1, ..., end of the last row, end of the buffer
//
// lead from 0 past every element. A step from a row's start to its end passes only elements that the row covers. So an
// element that no row covers is passed by a step from an end to the next start, which is a gap. An invalid row covers
// nothing: it starts and ends at one position.
//
// Rows may lie in any order. Then a gap may contain elements of other rows, which their kernels overwrite, and gaps may
// overlap: all store the same value.
//
// A thread finds the gap in front of one row; a block fills its threads' gaps one after another. Bytes moved: starts
// and lengths are read; if there are no gaps, nothing is written.
//
// Precondition: the output is contiguous.
#pragma once

#include "cuda/device.cuh"
#include "cuda/row.cuh"
#include "cuda/vector_access.cuh"

namespace masked_softmax::cuda {

constexpr int kGapThreads = 256;

// The positions that a packed row covers.
MASKED_SOFTMAX_DEVICE RowBounds packed_bounds(const Problem& problem, int64_t row) {
  const int64_t start = load_row_index(problem.starts, row * problem.starts.row_strides[0]);
  const int64_t length = load_row_index(problem.lengths, row * problem.lengths.row_strides[0]);
  if (bounds_are_valid(problem, start, length)) {
    return {start, start + length};
  }
  const int64_t position = start < 0 ? 0 : start < problem.cols ? start : problem.cols;
  return {position, position};
}

// The positions in front of a row: behind the last one, if `row` is the number of rows.
MASKED_SOFTMAX_DEVICE RowBounds gap_before(const Problem& problem, int64_t row) {
  const int64_t rows = problem.packing.count;
  if (row > rows) {
    return {0, 0};
  }
  return {row == 0 ? 0 : packed_bounds(problem, row - 1).end,
          row == rows ? problem.cols : packed_bounds(problem, row).start};
}

// Fills these positions at every index of the other dimensions. All threads of the block call.
MASKED_SOFTMAX_DEVICE void fill_positions(const Problem& problem, const RowBounds& positions) {
  const int64_t inner = problem.output.col_stride;  // elements of a position that are adjacent
  const int64_t outer_stride = problem.cols * inner;
  visit_element_type_of<ElementKind::kFloating>(problem.output.type, [&](auto element) MASKED_SOFTMAX_DEVICE_LAMBDA {
    using T = decltype(element);
    T* const output = in_device_memory(static_cast<T*>(problem.output.data));
    const T value = narrow<T>(std::numeric_limits<float>::quiet_NaN());
    for (int64_t first = 0; first < problem.packing.output_elems; first += outer_stride) {
      fill_columns<16 / sizeof(T)>(output + first, positions.start * inner, positions.end * inner, value,
                                   thread_index(), kGapThreads);
    }
  });
}

MASKED_SOFTMAX_KERNEL(kGapThreads, 1)
fill_packed_gaps(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  const Problem& problem = kernel_problem.problem;
  MASKED_SOFTMAX_SHARED(RowBounds, gaps, kGapThreads);
  const RowBounds gap = gap_before(problem, int64_t{block_index()} * kGapThreads + thread_index());
  if (!any_in_block(gap.start < gap.end)) {
    return;
  }
  gaps[thread_index()] = gap;
  sync_block();
  for (const RowBounds& found : gaps) {
    if (found.start < found.end) {
      fill_positions(problem, found);
    }
  }
}

inline Status launch_packed_gaps(const KernelProblem& kernel_problem, Stream stream) {
  LaunchPlan plan;
  plan.threads_per_block = kGapThreads;
  plan.blocks = limited_blocks(ceil_divide(kernel_problem.problem.packing.count + 1, kGapThreads));
  return launch(fill_packed_gaps, plan, stream, kernel_problem);
}

}  // namespace masked_softmax::cuda
