// Rows that neither a block nor a cluster can hold, cut into chunks with a block for each, in three launches: two for a
// gradient, which needs no maximum. Each launch leaves a result for every chunk in the workspace, and the next one
// loads all results of a row. No block waits for another, so a grid may have any number of blocks.
//
//   split_maxima     the maximum of each chunk
//   split_sums       the sum of each chunk, and the number of maxima
//   split_results    the results, from the sum over all chunks in their order: SumOrder in launch_plan.h
//
// Bytes moved. Valid elements are read three times (twice for a gradient), the output is written once. The later reads
// come from L2 where the rows fit it: 64 rows of 131072 floats are 32 MiB, an A100's L2 holds 40 MB, an H200's 60 MB.
//
// Workspace: ResultSlots for each row, with a slot for each chunk, of the accumulation type.
//
// A chunk is held in registers as in register_rows.cuh, whose preconditions hold.
#pragma once

#include "cuda/register_rows.cuh"

namespace masked_softmax::cuda {

// A block with its chunk of a row. reduce() is over the results that all chunks have left.
template <class acc_t>
class SplitGroup : public BlockGroup<acc_t> {
 public:
  // `index` counts the chunks of all rows.
  MASKED_SOFTMAX_DEVICE SplitGroup(const KernelProblem& problem, int64_t index)
      : row_(index / problem.chunks),
        chunk_(index % problem.chunks),
        results_{in_device_memory(static_cast<acc_t*>(problem.workspace)) + row_ * kResultWords * problem.chunks,
                 problem.chunks} {}

  MASKED_SOFTMAX_DEVICE int64_t row() const { return row_; }
  MASKED_SOFTMAX_DEVICE int64_t chunk() const { return chunk_; }
  MASKED_SOFTMAX_DEVICE int64_t chunks() const { return results_.slots; }

  // Leaves the chunk's result, given this thread's part of it.
  template <class Result>
  MASKED_SOFTMAX_DEVICE void leave(const Result& part) const {
    const Result of_chunk = BlockGroup<acc_t>::reduce(part);
    if (thread_index() == 0) {
      results_.store(chunk_, of_chunk);
    }
  }

  MASKED_SOFTMAX_DEVICE Max<acc_t> reduce(const Max<acc_t>& /*part*/) const {
    Max<acc_t> max;
    for (int64_t chunk = thread_index(); chunk < chunks(); chunk += block_threads()) {
      max.combine(results_.template load<Max<acc_t>>(chunk));
    }
    return BlockGroup<acc_t>::reduce(max);
  }
  // Every thread combines all chunks, in their order.
  template <class Result>
  MASKED_SOFTMAX_DEVICE Result reduce(const Result& /*part*/) const {
    Result result;
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      result.combine(results_.template load<Result>(chunk));
    }
    return result;
  }

 private:
  const int64_t row_;
  const int64_t chunk_;
  const ResultSlots<acc_t> results_;
};

template <Pass kPass, bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_DEVICE void split_pass(const KernelProblem& kernel_problem) {
  const int64_t count = kernel_problem.problem.rows * kernel_problem.chunks;
  for (int64_t index = block_index(); index < count; index += grid_blocks()) {
    const SplitGroup<typename RowTypes<input_t, output_t>::acc_t> group(kernel_problem, index);
    compute_row<kPass, kForward, input_t, output_t, kVectors>(group, kernel_problem, group.row());
    group.sync();
  }
}

template <class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kSplitThreads, 1)
split_maxima(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  split_pass<Pass::kMaxima, true, input_t, output_t, kVectors>(kernel_problem);
}

template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kSplitThreads, 1)
split_sums(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  split_pass<Pass::kSums, kForward, input_t, output_t, kVectors>(kernel_problem);
}

template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kSplitThreads, 1)
split_results(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  split_pass<Pass::kResults, kForward, input_t, output_t, kVectors>(kernel_problem);
}

template <bool kForward, class input_t, class output_t>
Status launch_split(const KernelProblem& problem, const LaunchPlan& plan, Stream stream) {
  constexpr int kVectors = RowTypes<input_t, output_t>::kBlockVectors;
  Status status = kSuccess;
  if constexpr (kForward) {
    status = launch(split_maxima<input_t, output_t, kVectors>, plan, stream, problem);
  }
  if (status == kSuccess) {
    status = launch(split_sums<kForward, input_t, output_t, kVectors>, plan, stream, problem);
  }
  return status == kSuccess ? launch(split_results<kForward, input_t, output_t, kVectors>, plan, stream, problem)
                            : status;
}

}  // namespace masked_softmax::cuda
