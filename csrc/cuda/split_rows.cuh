// Rows that neither a block nor a cluster can hold, cut into chunks with a block for each, in three launches: two for a
// gradient, which needs no maximum. Each launch but the last stores a partial (groups.cuh) of every chunk in the
// workspace, and the next one loads all partials of a row. No block waits for another, so a grid may have any number of
// blocks.
//
//   split_maxima     the maximum of each chunk
//   split_sums       the sum of each chunk, and how many of its elements equal the row's maximum
//   split_results    the output, from the sum over all chunks in their order: SumOrder in launch_plan.h
//
// Bytes moved. Valid elements are read three times (twice for a gradient), the output is written once. The later reads
// come from L2 where the rows fit it: 64 rows of 131072 floats are 32 MiB, an A100's L2 holds 40 MB, an H200's 60 MB.
//
// Workspace: PartialSlots for each row, with a slot for each chunk, of the accumulation type.
//
// A chunk is held in registers as in held_rows.cuh, whose preconditions hold.
#pragma once

#include "cuda/held_rows.cuh"

namespace masked_softmax::cuda {

// A block with its chunk of a row. reduce(), as BlockGroup's, is over the chunk only.
template <class acc_t>
class SplitGroup : public BlockGroup<acc_t> {
 public:
  // `number` counts the chunks of all rows.
  MASKED_SOFTMAX_DEVICE SplitGroup(const KernelProblem& kernel_problem, int64_t number)
      : row_(number / kernel_problem.split_chunks),
        chunk_(number % kernel_problem.split_chunks),
        partials_{in_device_memory(static_cast<acc_t*>(kernel_problem.workspace)) +
                      row_ * kPartialWords * kernel_problem.split_chunks,
                  kernel_problem.split_chunks} {}

  MASKED_SOFTMAX_DEVICE int64_t row() const { return row_; }
  MASKED_SOFTMAX_DEVICE int64_t chunk() const { return chunk_; }
  MASKED_SOFTMAX_DEVICE int64_t chunks() const { return partials_.slots; }

  // Stores the chunk's partial in the workspace, given this thread's.
  template <class Partial>
  MASKED_SOFTMAX_DEVICE void publish(const Partial& partial) const {
    const Partial of_chunk = BlockGroup<acc_t>::reduce(partial);
    if (thread_index() == 0) {
      partials_.store(chunk_, of_chunk);
    }
  }

  // Returns the total over the chunks' partials that an earlier launch has published.
  template <class Partial>
  MASKED_SOFTMAX_DEVICE Partial reduce_published() const {
    Partial total;
    if constexpr (std::is_same_v<Partial, Max<acc_t>>) {  // in any order, so the threads share the chunks
      for (int64_t chunk = thread_index(); chunk < chunks(); chunk += block_threads()) {
        total.combine(partials_.template load<Partial>(chunk));
      }
      return BlockGroup<acc_t>::reduce(total);
    } else {  // every thread combines all chunks, in their order
      for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
        total.combine(partials_.template load<Partial>(chunk));
      }
      return total;
    }
  }

 private:
  const int64_t row_;
  const int64_t chunk_;
  const PartialSlots<acc_t> partials_;
};

template <Pass kPass, bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_DEVICE void split_pass(const KernelProblem& kernel_problem) {
  const int64_t count = kernel_problem.problem.rows * kernel_problem.split_chunks;
  for (int64_t number = block_index(); number < count; number += grid_blocks()) {
    const SplitGroup<typename RowTypes<input_t, output_t>::acc_t> group(kernel_problem, number);
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
Status launch_strategy(StrategyConstant<Strategy::kSplit>, const KernelProblem& kernel_problem, const LaunchPlan& plan,
                       Stream stream) {
  constexpr int kVectors = RowTypes<input_t, output_t>::kBlockVectors;
  Status status = kSuccess;
  if constexpr (kForward) {
    status = launch(split_maxima<input_t, output_t, kVectors>, plan, stream, kernel_problem);
  }
  if (status == kSuccess) {
    status = launch(split_sums<kForward, input_t, output_t, kVectors>, plan, stream, kernel_problem);
  }
  return status == kSuccess ? launch(split_results<kForward, input_t, output_t, kVectors>, plan, stream, kernel_problem)
                            : status;
}

}  // namespace masked_softmax::cuda
