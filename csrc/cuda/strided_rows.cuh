// Rows of any layout and any types, for every operation: element by element, each read again for every sweep.
//
//   column_rows     the rows lie side by side (the softmax dimension is not the last): 32 neighbours to a warp, which
//                   reads 32 adjacent elements at a time; a block's warps share the columns
//   strided_rows    everything else: a part of a warp or a block to a row
//
// A row's sums are taken in the order of the strategy that holds rows of its size in registers (SumOrder in
// launch_plan.h), so that it has the same bits in any layout.
//
// What moves. A forward pass reads each valid element three times, a backward pass twice; the second and third time
// from the second-level cache as long as the rows under way fit it: 32 rows of 512 columns in float32 are 64 KiB a
// block, 8 MiB for 132 multiprocessors (an H200 has 60 MiB). On paper, two thirds of a copy's bandwidth at best.
//
// Formulas: Operation in common/problem.h. Everything runs in acc_t; extreme scales come here in float64.
#pragma once

#include "cuda/exp2.cuh"
#include "cuda/groups.cuh"
#include "cuda/row.cuh"

namespace masked_softmax {
namespace cuda {

MASKED_SOFTMAX_DEVICE bool is_16_bit(ElementType type) {
  return type == ElementType::kBFloat16 || type == ElementType::kFloat16;
}

template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t load_element(const Operand& operand, int64_t offset) {
  switch (operand.type) {
    case ElementType::kFloat64: return static_cast<acc_t>(static_cast<const double*>(operand.data)[offset]);
    case ElementType::kBFloat16: return widen(static_cast<const bfloat16_t*>(operand.data)[offset]);
    case ElementType::kFloat16: return widen(static_cast<const float16_t*>(operand.data)[offset]);
    case ElementType::kInt8: return static_cast<const int8_t*>(operand.data)[offset];
    case ElementType::kUInt8: return static_cast<const uint8_t*>(operand.data)[offset];
    case ElementType::kInt16: return static_cast<const int16_t*>(operand.data)[offset];
    case ElementType::kInt32: return static_cast<acc_t>(static_cast<const int32_t*>(operand.data)[offset]);
    case ElementType::kInt64: return static_cast<acc_t>(static_cast<const int64_t*>(operand.data)[offset]);
    case ElementType::kBool: return static_cast<const uint8_t*>(operand.data)[offset];
    default: return static_cast<const float*>(operand.data)[offset];
  }
}

template <class T, class acc_t>
MASKED_SOFTMAX_DEVICE void store_narrow(void* data, int64_t offset, acc_t value) {
  const T narrowed = narrow<T>(value);  // the emulator does not see a store of what a call returns
  static_cast<T*>(data)[offset] = narrowed;
}

template <class acc_t>
MASKED_SOFTMAX_DEVICE void store_element(const Operand& operand, int64_t offset, acc_t value) {
  switch (operand.type) {
    case ElementType::kFloat64: store_narrow<double>(operand.data, offset, value); break;
    case ElementType::kBFloat16: store_narrow<bfloat16_t>(operand.data, offset, value); break;
    case ElementType::kFloat16: store_narrow<float16_t>(operand.data, offset, value); break;
    default: store_narrow<float>(operand.data, offset, value); break;
  }
}

// One row, its columns dealt out to the group's threads.
template <class acc_t, class Group>
class StridedRow {
 public:
  MASKED_SOFTMAX_DEVICE StridedRow(const Group& group, const KernelProblem& kernel_problem, int64_t index)
      : group_(group),
        problem_(kernel_problem.problem),
        order_(kernel_problem.order),
        scaling_(kernel_problem),
        approximate_(std::is_same_v<acc_t, float> && is_16_bit(kernel_problem.problem.output.type)),
        exists_(index < kernel_problem.problem.rows),
        row_(exists_ ? find_row<kMaxInputs>(kernel_problem, index) : Row{}) {}

  MASKED_SOFTMAX_DEVICE void compute() const {
    switch (problem_.operation) {
      case Operation::kSoftmax: softmax(); break;
      case Operation::kLogSoftmax: log_softmax(); break;
      default: derivative(); break;
    }
    if (exists_) {
      fill_padding();
    }
  }

 private:
  MASKED_SOFTMAX_DEVICE acc_t input(int k, int64_t col) const {
    const Operand& operand = problem_.inputs[k];
    return load_element<acc_t>(operand, row_.input_offsets[k] + col * operand.col_stride);
  }
  MASKED_SOFTMAX_DEVICE void set_output(int64_t col, acc_t value) const {
    store_element(problem_.output, row_.output_offset + col * problem_.output.col_stride, value);
  }
  MASKED_SOFTMAX_DEVICE acc_t score(int64_t col) const { return input(0, col) * scaling_.factor; }

  // Calls visit(column) for this thread's share of the valid columns.
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void for_each_valid(const Visitor& visit) const {
    for (int64_t i = group_.thread(); i < row_.length; i += group_.threads()) {
      visit(row_.start + i);
    }
  }

  MASKED_SOFTMAX_DEVICE acc_t row_max() const {
    acc_t largest = -std::numeric_limits<acc_t>::infinity();
    for_each_valid([&](int64_t col) { largest = larger(largest, score(col)); });
    return group_.max(largest);
  }

  // The sum of term(column) over the valid columns. All threads of a block take as many turns, whatever their rows.
  template <class Term>
  MASKED_SOFTMAX_DEVICE acc_t sum(const Term& term) const {
    Sum<acc_t> sum;
    for (int64_t piece = 0; piece < problem_.cols; piece += order_.piece_elems()) {
      sum.add(group_.sum(part_of_piece(piece, term)));
      group_.meet();  // before the results' memory is used again
    }
    return sum.total();
  }

  // What this thread adds to the piece that begins with valid column `piece`. It has the part of one thread of the
  // order, or those of a few that follow one another.
  template <class Term>
  MASKED_SOFTMAX_DEVICE Sum<acc_t> part_of_piece(int64_t piece, const Term& term) const {
    TreeSum<acc_t, Group::kSumLevels> sums;
    const unsigned parts = parts_of_thread();
    for (unsigned i = 0; i < parts; ++i) {
      const unsigned thread = group_.thread() * parts + i;
      Sum<acc_t> sum;
      for (int k = 0; thread < static_cast<unsigned>(order_.threads) && k < order_.vectors; ++k) {
        const int64_t first = piece + (int64_t{k} * order_.threads + thread) * order_.elems;
        constexpr int kMostElems = 8;
        acc_t terms[kMostElems];
        MASKED_SOFTMAX_UNROLL
        for (int e = 0; e < kMostElems; ++e) {
          terms[e] = e < order_.elems && first + e < row_.length ? term(row_.start + first + e) : acc_t{0};
        }
        sum.add(terms);
      }
      sums.add(sum);
    }
    return sums.total();
  }

  MASKED_SOFTMAX_DEVICE unsigned parts_of_thread() const {
    unsigned parts = 1;
    while (parts * group_.threads() < static_cast<unsigned>(order_.threads)) {
      parts *= 2;
    }
    return parts;
  }

  MASKED_SOFTMAX_DEVICE acc_t exp_of_distance(acc_t t) const {
    return approximate_ ? exponential<kCanApproximate>(t, scaling_) : exponential<false>(t, scaling_);
  }
  MASKED_SOFTMAX_DEVICE acc_t exp_of(acc_t y) const {
    return approximate_ ? exponential_of_log<kCanApproximate>(y, scaling_) : exponential_of_log<false>(y, scaling_);
  }

  MASKED_SOFTMAX_DEVICE void softmax() const {
    const acc_t largest = row_max();
    const auto e = [&](int64_t col) { return exp_of_distance(score(col) - largest); };
    const acc_t reciprocal = 1 / sum(e);
    for_each_valid([&](int64_t col) { set_output(col, e(col) * reciprocal); });
  }

  // See ForwardRow in register_rows.cuh.
  MASKED_SOFTMAX_DEVICE void log_softmax() const {
    const acc_t largest = row_max();
    acc_t maxima = 0;
    const acc_t rest = sum([&](int64_t col) {
      const Distance<acc_t> distance(score(col), largest);
      maxima += distance.t == 0 ? acc_t{1} : acc_t{0};
      return distance.t == 0 ? acc_t{0} : rest_term(distance, scaling_);
    });
    const acc_t log_sum = log_of_sum(rest, group_.count(maxima));
    for_each_valid([&](int64_t col) { set_output(col, (score(col) - largest) * scaling_.scale - log_sum); });
  }

  // What is summed over the row: `first`, and `second` for the one derivative that has two.
  MASKED_SOFTMAX_DEVICE acc_t first_term(int64_t col) const {
    switch (problem_.operation) {
      case Operation::kSoftmaxBackward: return input(0, col) * input(1, col);
      case Operation::kLogSoftmaxBackward: return input(0, col);
      case Operation::kLogSoftmaxJvp: return input(0, col) * exp_of(input(1, col));
      case Operation::kSoftmaxBackwardWrtY: return input(1, col) * input(2, col);
      default: return input(1, col);  // kLogSoftmaxBackwardWrtY
    }
  }
  MASKED_SOFTMAX_DEVICE acc_t second_term(int64_t col) const { return input(0, col) * input(2, col); }

  MASKED_SOFTMAX_DEVICE acc_t derivative_value(int64_t col, acc_t first, acc_t second) const {
    switch (problem_.operation) {
      case Operation::kSoftmaxBackward: return scaling_.scale * input(1, col) * (input(0, col) - first);
      case Operation::kLogSoftmaxBackward: return scaling_.scale * (input(0, col) - exp_of(input(1, col)) * first);
      case Operation::kLogSoftmaxJvp: return scaling_.scale * (input(0, col) - first);
      case Operation::kSoftmaxBackwardWrtY:
        return scaling_.scale * (input(0, col) * (input(1, col) - first) - input(1, col) * second);
      default: return -(scaling_.scale * (input(0, col) * exp_of(input(2, col)) * first));
    }
  }

  MASKED_SOFTMAX_DEVICE void derivative() const {
    const acc_t first = sum([&](int64_t col) { return first_term(col); });
    acc_t second = 0;
    if (problem_.operation == Operation::kSoftmaxBackwardWrtY) {
      second = sum([&](int64_t col) { return second_term(col); });
    }
    for_each_valid([&](int64_t col) { set_output(col, derivative_value(col, first, second)); });
  }

  MASKED_SOFTMAX_DEVICE void fill_padding() const {
    const acc_t value = padding_value<acc_t>(problem_.operation, row_);
    for (int64_t col = group_.thread(); col < problem_.cols; col += group_.threads()) {
      if (col < row_.start || col >= row_.start + row_.length) {
        set_output(col, value);
      }
    }
  }

  static constexpr bool kCanApproximate = std::is_same_v<acc_t, float>;

  const Group& group_;
  const Problem& problem_;
  const SumOrder& order_;
  const Scaling<acc_t> scaling_;
  const bool approximate_;  // as RowTypes in register_rows.cuh does
  const bool exists_;
  const Row row_;
};

template <class acc_t, unsigned kThreads>
MASKED_SOFTMAX_KERNEL(kStridedThreads)
strided_lanes(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using Group = LaneGroup<kThreads, acc_t>;
  const Group group;
  const int64_t rows_per_block = block_threads() / kThreads;
  const int64_t step = rows_per_block * grid_blocks();
  // The loop's end is the same for all lanes of a warp.
  for (int64_t first = block_index() * rows_per_block; first < kernel_problem.problem.rows; first += step) {
    StridedRow<acc_t, Group>(group, kernel_problem, first + thread_index() / kThreads).compute();
  }
}

template <class acc_t>
MASKED_SOFTMAX_KERNEL(kStridedThreads)
strided_rows(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  MASKED_SOFTMAX_SHARED(acc_t, maxima, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_highs, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_lows, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, counts, WarpResults<acc_t>::kMostWarps);
  using Group = BlockGroup<acc_t>;
  const Group group({maxima, sum_highs, sum_lows, counts});
  for (int64_t row = block_index(); row < kernel_problem.problem.rows; row += grid_blocks()) {
    StridedRow<acc_t, Group>(group, kernel_problem, row).compute();
    group.meet();  // the next row's results go where this one's were read
  }
}

constexpr unsigned kColumnWarps = kStridedThreads / kWarpThreads;

template <class acc_t>
MASKED_SOFTMAX_KERNEL(kStridedThreads)
column_rows(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  MASKED_SOFTMAX_SHARED(acc_t, maxima, kColumnWarps * kWarpThreads);
  MASKED_SOFTMAX_SHARED(acc_t, sum_highs, kColumnWarps * kWarpThreads);
  MASKED_SOFTMAX_SHARED(acc_t, sum_lows, kColumnWarps * kWarpThreads);
  MASKED_SOFTMAX_SHARED(acc_t, counts, kColumnWarps * kWarpThreads);
  using Group = WarpsGroup<kColumnWarps, acc_t>;
  const Group group({maxima, sum_highs, sum_lows, counts});
  const int64_t step = int64_t{kWarpThreads} * grid_blocks();
  for (int64_t first = int64_t{block_index()} * kWarpThreads; first < kernel_problem.problem.rows; first += step) {
    StridedRow<acc_t, Group>(group, kernel_problem, first + thread_index() % kWarpThreads).compute();
    group.meet();
  }
}

}  // namespace cuda
}  // namespace masked_softmax
