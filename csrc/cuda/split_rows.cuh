// Rows that neither a block nor a cluster can hold: cut into pieces, a block to each, in three launches (two for a
// gradient, which needs no maximum). Each leaves one result a piece in the workspace, and the next one reads all of a
// row's results. Nothing waits for another block, so any number of blocks may be under way.
//
//   split_maxima     the largest element of each piece
//   split_sums       the sum of each piece: SumOrder in launch_plan.h
//   split_results    the results
//
// What moves: valid elements are read three times (twice), the output is written once. 64 rows of 131072 floats are 32
// MiB, which an A100 (40 MB) and an H200 (60 MB) hold in their second-level cache: there two of the reads are from it.
// On paper (H200, as compiled for 9.0): 62 to 96 registers, 1.5 KiB of shared memory, two blocks of 512 threads for the
// maxima and one for the rest, with 32 to 64 KiB in flight. Out of that cache half of a copy's bandwidth, 0.75 within.
//
// Workspace: for each row and piece four values of the computing type.
//
// A piece is held in registers as in register_rows.cuh, whose preconditions hold.
#pragma once

#include "cuda/register_rows.cuh"

namespace masked_softmax {
namespace cuda {

// One row's part of the workspace.
template <class acc_t>
class PieceResults {
 public:
  MASKED_SOFTMAX_DEVICE PieceResults(const KernelProblem& problem, int64_t row)
      : pieces_(problem.pieces),
        results_(in_device_memory(static_cast<acc_t*>(problem.workspace)) + row * kPieceResults * pieces_) {}

  MASKED_SOFTMAX_DEVICE acc_t& maximum(int64_t piece) const { return results_[piece]; }
  MASKED_SOFTMAX_DEVICE acc_t& sum_high(int64_t piece) const { return results_[pieces_ + piece]; }
  MASKED_SOFTMAX_DEVICE acc_t& sum_low(int64_t piece) const { return results_[2 * pieces_ + piece]; }
  MASKED_SOFTMAX_DEVICE acc_t& count(int64_t piece) const { return results_[3 * pieces_ + piece]; }

 private:
  int64_t pieces_;
  acc_t* results_;
};

// A block with its piece of a row.
template <class acc_t>
class PieceGroup : public BlockGroup<acc_t> {
 public:
  MASKED_SOFTMAX_DEVICE PieceGroup(const WarpResults<acc_t>& warp_results, const KernelProblem& problem, int64_t block)
      : BlockGroup<acc_t>(warp_results),
        row_(block / problem.pieces),
        piece_(block % problem.pieces),
        pieces_(problem.pieces),
        results_(problem, row_) {}

  MASKED_SOFTMAX_DEVICE int64_t row() const { return row_; }
  MASKED_SOFTMAX_DEVICE int64_t piece() const { return piece_; }
  MASKED_SOFTMAX_DEVICE int64_t pieces() const { return pieces_; }

  MASKED_SOFTMAX_DEVICE void leave_max(acc_t largest) const {
    largest = this->max(largest);
    if (thread_index() == 0) {
      results_.maximum(piece_) = largest;
    }
  }
  MASKED_SOFTMAX_DEVICE void leave_sum(const Sum<acc_t>& sum) const {
    const Sum<acc_t> of_piece = this->sum(sum);
    if (thread_index() == 0) {
      results_.sum_high(piece_) = of_piece.high;
      results_.sum_low(piece_) = of_piece.low;
    }
  }
  MASKED_SOFTMAX_DEVICE void leave_count(acc_t count) const {
    count = this->count(count);
    if (thread_index() == 0) {
      results_.count(piece_) = count;
    }
  }

  MASKED_SOFTMAX_DEVICE acc_t row_max() const {
    acc_t largest = -std::numeric_limits<acc_t>::infinity();
    for (int64_t piece = thread_index(); piece < pieces_; piece += block_threads()) {
      largest = larger(largest, results_.maximum(piece));
    }
    return this->max(largest);
  }
  // In the pieces' order; every thread takes the same steps.
  MASKED_SOFTMAX_DEVICE Sum<acc_t> row_sum() const {
    Sum<acc_t> sum;
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      Sum<acc_t> of_piece;
      of_piece.high = results_.sum_high(piece);
      of_piece.low = results_.sum_low(piece);
      sum.add(of_piece);
    }
    return sum;
  }
  MASKED_SOFTMAX_DEVICE acc_t row_count() const {
    acc_t count = 0;
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      count += results_.count(piece);
    }
    return count;
  }

 private:
  int64_t row_;
  int64_t piece_;
  int64_t pieces_;
  PieceResults<acc_t> results_;
};

// Calls visit(group) for every piece of every row that this block has.
template <class acc_t, class Visitor>
MASKED_SOFTMAX_DEVICE void for_each_piece(const KernelProblem& problem, const Visitor& visit) {
  MASKED_SOFTMAX_SHARED(acc_t, maxima, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_highs, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_lows, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, counts, WarpResults<acc_t>::kMostWarps);
  const int64_t blocks = problem.problem.rows * problem.pieces;
  for (int64_t block = block_index(); block < blocks; block += grid_blocks()) {
    const PieceGroup<acc_t> group({maxima, sum_highs, sum_lows, counts}, problem, block);
    visit(group);
    group.meet();  // the next piece's results go where this one's were read
  }
}

template <class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kSplitThreads, 1)
split_maxima(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  using Group = PieceGroup<acc_t>;
  for_each_piece<acc_t>(kernel_problem, [&](const Group& group) {
    ForwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, group.row());
    group.leave_max(row.load());
  });
}

template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kSplitThreads, 1)
split_sums(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  using Group = PieceGroup<acc_t>;
  for_each_piece<acc_t>(kernel_problem, [&](const Group& group) {
    if constexpr (kForward) {
      ForwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, group.row());
      row.load();
      const acc_t row_max = group.row_max();
      if (kernel_problem.problem.operation == Operation::kLogSoftmax) {
        acc_t maxima = 0;
        group.leave_sum(row.take_distances(row_max, maxima));
        group.leave_count(maxima);
      } else {
        group.leave_sum(row.take_exponentials(row_max));
      }
    } else {
      BackwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, group.row());
      group.leave_sum(row.sum());
    }
  });
}

template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kSplitThreads, 1)
split_results(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  using Group = PieceGroup<acc_t>;
  for_each_piece<acc_t>(kernel_problem, [&](const Group& group) {
    if constexpr (kForward) {
      ForwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, group.row());
      row.load();
      const acc_t row_max = group.row_max();
      if (kernel_problem.problem.operation == Operation::kLogSoftmax) {
        acc_t maxima = 0;
        row.take_distances(row_max, maxima);
        row.store_log_softmax(log_of_sum(group.row_sum().total(), group.row_count()));
      } else {
        row.take_exponentials(row_max);
        row.store_softmax(group.row_sum().total());
      }
    } else {
      BackwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, group.row());
      row.store(group.row_sum().total());
    }
  });
}

}  // namespace cuda
}  // namespace masked_softmax
