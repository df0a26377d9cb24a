// Rows of any types and layout, for every operation, read again in every pass: element by element, as each may be in
// another cache line.
//
//   column_rows      unit row stride (the softmax dimension is not the last): a block takes 32 rows, one for each lane;
//                    a warp loads 32 adjacent elements at a time, and the warps share the columns
//   strided_lanes    everything else, short rows: a part of a warp takes a row
//   strided_rows     everything else, long rows: a block takes a row
//
// Formulas: softmax and log_softmax as in held_rows.cuh, derivatives in common/formulas.h. A row's sums are taken in
// the order of the strategy that can hold rows of its size (SumOrder in launch_plan.h), so a row has the same bits in
// any layout.
//
// Bytes moved. A forward pass reads each valid element three times, a derivative once for each sum and once for the
// result. Later reads come from L2 where the rows under way fit it. Where adjacent elements are not in one cache line,
// a read moves the line: 1/8 of it is used by float32 with a stride of 8.
//
// Accumulation type: acc_t, which is float64 for extreme scales too.
#pragma once

#include "common/formulas.h"
#include "cuda/exp2.cuh"
#include "cuda/groups.cuh"
#include "cuda/row.cuh"
#include "cuda/sink.cuh"

namespace masked_softmax::cuda {

// Elements that a thread loads at a time: a part of one of SumOrder's vectors.
template <class acc_t>
constexpr int kTileElems = sizeof(acc_t) == 8 ? 2 : 4;

// Behind a row's last element there are absent ones: -inf in a forward pass, 0 in a derivative. Their terms are zeros,
// which do not change a sum. (A scale of 0 would make the exponential of -inf NaN.)
template <class acc_t>
using TileValues = acc_t[kTileElems<acc_t>];

// Loads `count` elements from `offset` on, and `absent` after them. The type is dispatched once for all of them, so
// that their loads overlap.
template <class acc_t>
MASKED_SOFTMAX_DEVICE void load_elements(const Operand& operand, int64_t offset, int count, acc_t absent,
                                         TileValues<acc_t>& values) {
  visit_element_type(operand.type, [&](auto element) MASKED_SOFTMAX_DEVICE_LAMBDA {
    const auto* p = in_device_memory(static_cast<const decltype(element)*>(operand.data)) + offset;
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kTileElems<acc_t>; ++i) {
      values[i] = absent;
      if (i < count) {
        values[i] = static_cast<acc_t>(widen(*p));
      }
      p += operand.col_stride;
    }
  });
}

template <class acc_t>
MASKED_SOFTMAX_DEVICE void store_elements(const Operand& operand, int64_t offset, int count,
                                          const TileValues<acc_t>& values) {
  visit_element_type_of<ElementKind::kFloating>(operand.type, [&](auto element) MASKED_SOFTMAX_DEVICE_LAMBDA {
    using T = decltype(element);
    T* p = in_device_memory(static_cast<T*>(operand.data)) + offset;
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kTileElems<acc_t>; ++i) {
      if (i < count) {
        *p = narrow<T>(values[i]);
      }
      p += operand.col_stride;
    }
  });
}

// One row, its columns distributed over the group's threads.
template <class acc_t, class Group>
class StridedRow {
 public:
  // Row `row_number` of the problem; an empty row if the number is past the last one.
  MASKED_SOFTMAX_DEVICE StridedRow(const Group& group, const KernelProblem& kernel_problem, int64_t row_number)
      : group_(group),
        kernel_problem_(kernel_problem),
        problem_(kernel_problem.problem),
        order_(kernel_problem.order),
        constants_(constants_of<acc_t>(kernel_problem)),
        is_approximate_(std::is_same_v<acc_t, float> && kernel_problem.output_is_16_bit),
        row_number_(row_number),
        row_(find_row<kMaxInputs>(kernel_problem, row_number)),
        row_input_(row_.exists && problem_.row_input.data != nullptr ? load_row_input(kernel_problem, row_number)
                                                                     : -std::numeric_limits<double>::infinity()),
        absent_(!is_forward(problem_.operation) ? acc_t{0}
                : constants_.factor < 0         ? std::numeric_limits<acc_t>::infinity()
                                                : -std::numeric_limits<acc_t>::infinity()) {}

  MASKED_SOFTMAX_DEVICE void compute() const {
    if (is_forward(problem_.operation)) {
      forward();
    } else {
      derivative();
    }
    if (row_.exists && !problem_.packing.is_packed && !is_reduction(problem_.operation)) {
      fill_padding();
    }
  }

 private:
  using Values = TileValues<acc_t>;
  static constexpr bool kCanApproximate = std::is_same_v<acc_t, float>;

  // Valid columns [first, first + count).
  MASKED_SOFTMAX_DEVICE void load(int k, int64_t first, int count, Values& values) const {
    const Operand& operand = problem_.inputs[k];
    load_elements(operand, row_.input_offsets[k] + (row_.start + first) * operand.col_stride, count, absent_, values);
  }
  MASKED_SOFTMAX_DEVICE void store(int64_t first, int count, const Values& values) const {
    const Operand& operand = problem_.output;
    store_elements(operand, row_.output_offset + (row_.start + first) * operand.col_stride, count, values);
  }

  MASKED_SOFTMAX_DEVICE int count_from(int64_t first) const {
    const int64_t rest = row_.length - first;
    return rest < kTileElems<acc_t> ? static_cast<int>(rest < 0 ? 0 : rest) : kTileElems<acc_t>;
  }

  // Calls visit(first, count) for this thread's share of the valid columns, a tile at a time.
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void for_each_tile(const Visitor& visit) const {
    const int64_t step = int64_t{group_.threads()} * kTileElems<acc_t>;
    for (int64_t first = int64_t{group_.thread()} * kTileElems<acc_t>; first < row_.length; first += step) {
      visit(first, count_from(first));
    }
  }

  template <class Partial>
  MASKED_SOFTMAX_DEVICE Partial reduced(const Partial& partial) const {
    Partial partials[1] = {partial};
    group_.reduce(partials);
    return partials[0];
  }

  // The sum over the valid columns. compute_terms(first, count, terms) sets the terms of a tile. All threads of a block
  // run equally many iterations, whatever their rows.
  template <class ComputeTerms>
  MASKED_SOFTMAX_DEVICE acc_t sum(const ComputeTerms& compute_terms) const {
    if constexpr (Group::kHasOneChunk) {
      return reduced(partial_of_chunk(0, compute_terms)).value();
    }
    Sum<acc_t> sum;
    const int64_t step = kMaxClusterBlocks * order_.chunk_elems();
    for (int64_t first = 0; first < problem_.longest(); first += step) {
      Tree<Sum<acc_t>, 4> tree;
      static_assert(kMaxClusterBlocks == 8, "a tree of four levels");
      for (int64_t chunk_begin = first; chunk_begin < first + step && chunk_begin < problem_.longest();
           chunk_begin += order_.chunk_elems()) {
        tree.add(reduced(partial_of_chunk(chunk_begin, compute_terms)));
        group_.sync();
      }
      sum.combine(tree.total());
    }
    return sum.value();
  }

  // This thread's partial of the chunk that begins at valid column `chunk_begin`: that of one of the order's threads,
  // or those of a few consecutive ones.
  template <class ComputeTerms>
  MASKED_SOFTMAX_DEVICE Sum<acc_t> partial_of_chunk(int64_t chunk_begin, const ComputeTerms& compute_terms) const {
    Tree<Sum<acc_t>, Group::kTreeLevels> tree;
    const unsigned count = order_threads_per_thread();
    for (unsigned i = 0; i < count; ++i) {
      const unsigned order_thread = group_.thread() * count + i;
      Sum<acc_t> sum;
      for (int k = 0; order_thread < static_cast<unsigned>(order_.threads) && k < order_.vectors; ++k) {
        const int64_t vector_begin = chunk_begin + (int64_t{k} * order_.threads + order_thread) * order_.elems;
        if (vector_begin >= row_.length) {
          break;
        }
        acc_t of_vector = 0;
        for (int first = 0; first < order_.elems; first += kTileElems<acc_t>) {
          Values terms;
          compute_terms(vector_begin + first, count_from(vector_begin + first), terms);
          const acc_t of_tile = Sum<acc_t>::pairwise(terms);
          of_vector = first == 0 ? of_tile : of_vector + of_tile;
        }
        sum.add(of_vector);
      }
      tree.add(sum);
    }
    return tree.total();
  }

  // A power of two, so that a thread's partial is a subtree of the order's tree.
  MASKED_SOFTMAX_DEVICE unsigned order_threads_per_thread() const {
    unsigned count = 1;
    while (count * group_.threads() < static_cast<unsigned>(order_.threads)) {
      count *= 2;
    }
    return count;
  }

  MASKED_SOFTMAX_DEVICE acc_t exp_of(acc_t y) const {
    return is_approximate_ ? exp_of_log<kCanApproximate>(y, constants_) : exp_of_log<false>(y, constants_);
  }

  // Calls visit(OperationConstant<operation>()) with the problem's operation, in a forward pass or in a derivative.
  template <bool kForward, class Visitor>
  MASKED_SOFTMAX_DEVICE void visit_own_operation(const Visitor& visit) const {
    visit_operation(problem_.operation, [&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA {
      if constexpr (is_forward(decltype(operation)::value) == kForward) {
        visit(operation);
      }
    });
  }

  MASKED_SOFTMAX_DEVICE void forward() const {
    Max<acc_t> max;
    for_each_tile([&](int64_t first, int count) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kTileElems<acc_t>; ++i) {
        max.add(x[i] * constants_.factor);
      }
    });
    const acc_t max_of_elements = reduced(max).value();
    const acc_t row_max = problem_.row_input.data != nullptr ? max_beside_sink(max_of_elements) : max_of_elements;
    visit_own_operation<true>([&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA { finish(operation, row_max); });
  }

  MASKED_SOFTMAX_DEVICE void finish(OperationConstant<Operation::kSoftmax>, acc_t row_max) const {
    if (is_approximate_) {
      finish_softmax(SoftmaxExponential<kCanApproximate, acc_t>(constants_, row_max, row_.length == 1), row_max);
    } else {
      finish_softmax(SoftmaxExponential<false, acc_t>(constants_, row_max, row_.length == 1), row_max);
    }
  }

  template <class Exponential>
  MASKED_SOFTMAX_DEVICE void finish_softmax(const Exponential& exponential, acc_t row_max) const {
    const acc_t row_sum = sum([&](int64_t first, int count, Values& terms) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kTileElems<acc_t>; ++i) {
        terms[i] = select(i < count, exponential(x[i] * constants_.factor), acc_t{0});
      }
    });
    acc_t inverse = reciprocal(row_sum);
    if (problem_.row_input.data != nullptr) {
      const auto with_sink = sink(row_max).added_to(row_sum, exponential);
      store_row_result(with_sink.weight);
      inverse = with_sink.value;
    }
    for_each_tile([&](int64_t first, int count) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kTileElems<acc_t>; ++i) {
        x[i] = exponential(x[i] * constants_.factor) * inverse;
      }
      store(first, count, x);
    });
  }

  MASKED_SOFTMAX_DEVICE Sink<acc_t> sink(acc_t row_max) const {
    return {kernel_problem_, row_input_, row_max, row_.length == 0};
  }

  MASKED_SOFTMAX_DEVICE void store_row_result(acc_t value) const {
    const RowResult& result = problem_.row_result;
    if (result.data == nullptr || !row_.exists || group_.thread() != 0) {
      return;
    }
    masked_softmax::cuda::store_row_result(result, row_number_, row_.is_valid, value);
  }

  MASKED_SOFTMAX_DEVICE void finish(OperationConstant<Operation::kLogSoftmax>, acc_t row_max) const {
    const LogSum<acc_t> terms_of(constants_, row_max, row_.length == 1);
    Count<acc_t> max_count;
    const acc_t rest = sum([&](int64_t first, int count, Values& terms) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kTileElems<acc_t>; ++i) {
        terms[i] = select(i < count, terms_of.rest_term(x[i] * constants_.factor, max_count), acc_t{0});
      }
    });
    acc_t log_sum = terms_of.value(rest, reduced(max_count).value());
    if (problem_.row_input.data != nullptr) {
      const auto with_sink = sink(row_max).added_to_log(log_sum);
      store_row_result(with_sink.weight);
      log_sum = with_sink.value;
    }
    const LogResult<acc_t> log_result(constants_, row_max, log_sum);
    for_each_tile([&](int64_t first, int count) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kTileElems<acc_t>; ++i) {
        x[i] = log_result(x[i] * constants_.factor);
      }
      store(first, count, x);
    });
  }

  // As in torch.logsumexp, infinite where that is the maximum, unless an element is NaN.
  MASKED_SOFTMAX_DEVICE void finish(OperationConstant<Operation::kLogSumExp>, acc_t row_max) const {
    constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
    const bool is_infinite = row_max == kInfinity || row_max == -kInfinity;
    const LogSum<acc_t> terms_of(constants_, row_max, row_.length == 1);
    Count<acc_t> max_count;
    const acc_t rest = sum([&](int64_t first, int count, Values& terms) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kTileElems<acc_t>; ++i) {
        const acc_t term = terms_of.rest_term(x[i] * constants_.factor, max_count);
        const acc_t nan_or_zero = select(x[i] == x[i], acc_t{0}, x[i]);
        terms[i] = select(i < count, is_infinite ? nan_or_zero : term, acc_t{0});
      }
    });
    const acc_t log_sum = terms_of.value(rest, reduced(max_count).value());
    store_row_result(fused_multiply_add(constants_.scale, row_max, is_infinite ? rest : log_sum));
  }

  // Calls visit(formula, i, in) for the vector's elements, with the inputs of each in the order of operations.inc.
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void for_each_input(int64_t first, int count, const Visitor& visit) const {
    Values a;
    Values b = {};
    Values c = {};
    load(0, first, count, a);
    if (problem_.input_count > 1) {
      load(1, first, count, b);
    }
    if (problem_.input_count > 2) {
      load(2, first, count, c);
    }
    visit_own_operation<false>([&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kTileElems<acc_t>; ++i) {
        const acc_t in[kMaxInputs] = {a[i], b[i], c[i]};
        visit(Formula<decltype(operation)::value>(), i, in);
      }
    });
  }

  MASKED_SOFTMAX_DEVICE void derivative() const {
    const auto exp = [&](acc_t y) MASKED_SOFTMAX_DEVICE_LAMBDA { return exp_of(y); };
    int sum_count = 1;
    visit_own_operation<false>(
        [&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA { sum_count = Formula<decltype(operation)::value>::kSums; });
    // A loop, so that the code for a sum is there once. All indices into `sums` are constants, which keeps it in
    // registers.
    acc_t sums[2] = {0, 0};
    if (problem_.operation == Operation::kRowScale) {
      sum_count = 0;
      sums[0] = static_cast<acc_t>(row_input_);
    }
    for (int s = 0; s < sum_count; ++s) {
      const acc_t total = sum([&](int64_t first, int count, Values& terms) MASKED_SOFTMAX_DEVICE_LAMBDA {
        for_each_input(first, count, [&](auto formula, int i, const acc_t* in) MASKED_SOFTMAX_DEVICE_LAMBDA {
          constexpr int kSums = decltype(formula)::kSums;
          static_assert(kSums <= 2, "`sums` has two");
          acc_t of_element[kSums];
          decltype(formula)::terms(in, exp, of_element);
          terms[i] = s == 0 ? of_element[0] : of_element[kSums - 1];
        });
      });
      sums[0] = s == 0 ? total : sums[0];
      sums[1] = total;
    }
    if (problem_.operation == Operation::kRowDot) {
      return store_row_result(constants_.scale * sums[0]);
    }
    for_each_tile([&](int64_t first, int count) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values results;
      for_each_input(first, count, [&](auto formula, int i, const acc_t* in) MASKED_SOFTMAX_DEVICE_LAMBDA {
        results[i] = decltype(formula)::result(in, sums, constants_.scale, exp);
      });
      store(first, count, results);
    });
  }

  MASKED_SOFTMAX_DEVICE void fill_padding() const {
    Values padding;
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kTileElems<acc_t>; ++i) {
      padding[i] = row_.is_valid ? constants_.padding : std::numeric_limits<acc_t>::quiet_NaN();
    }
    const int64_t end = row_.start + row_.length;
    for (int64_t col = group_.thread(); col < row_.start; col += group_.threads()) {
      store(col - row_.start, 1, padding);
    }
    for (int64_t col = end + group_.thread(); col < problem_.cols; col += group_.threads()) {
      store(col - row_.start, 1, padding);
    }
  }

  const Group& group_;
  const KernelProblem& kernel_problem_;
  const Problem& problem_;
  const SumOrder& order_;
  const RowConstants<acc_t>& constants_;
  const bool is_approximate_;  // RowTypes::kApproximate, for types known at run time
  const int64_t row_number_;
  const Row row_;
  const double row_input_;
  const acc_t absent_;
};

template <class acc_t>
MASKED_SOFTMAX_KERNEL(kStridedThreads, 2)
strided_lanes(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  const AnyLaneGroup group(static_cast<unsigned>(strided_lanes_of(kernel_problem.order)));
  const int64_t rows_per_block = block_threads() / group.threads();
  const int64_t step = rows_per_block * grid_blocks();
  // All lanes of a warp leave the loop together.
  for (int64_t first = block_index() * rows_per_block; first < kernel_problem.problem.rows; first += step) {
    StridedRow<acc_t, AnyLaneGroup>(group, kernel_problem, first + thread_index() / group.threads()).compute();
  }
}

// float64 has one block on an SM: with two, sm_100 spills.
template <class acc_t>
MASKED_SOFTMAX_KERNEL(kStridedThreads, sizeof(acc_t) == 8 ? 1 : 2)
strided_rows(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using Group = BlockGroup<acc_t>;
  const Group group;
  for (int64_t row = block_index(); row < kernel_problem.problem.rows; row += grid_blocks()) {
    StridedRow<acc_t, Group>(group, kernel_problem, row).compute();
    group.sync();
  }
}

template <class acc_t>
MASKED_SOFTMAX_KERNEL(kStridedThreads, sizeof(acc_t) == 8 ? 1 : 2)
column_rows(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using Group = ColumnGroup<kStridedThreads / kWarpThreads, acc_t>;
  const Group group;
  const int64_t step = int64_t{kWarpThreads} * grid_blocks();
  for (int64_t first = int64_t{block_index()} * kWarpThreads; first < kernel_problem.problem.rows; first += step) {
    StridedRow<acc_t, Group>(group, kernel_problem, first + thread_index() % kWarpThreads).compute();
    group.sync();
  }
}

// Rows are summed in the order of held ones.
template <class input_t, class output_t>
constexpr bool has_whole_tiles() {
  using Types = RowTypes<input_t, output_t>;
  constexpr int kElems = kTileElems<typename Types::acc_t>;
  return Types::kElems % kElems == 0 && Types::kElems / kElems <= 2;
}
#define MASKED_SOFTMAX_TYPE_PAIR(input_t, output_t, cuda) \
  static_assert(has_whole_tiles<input_t, output_t>(), "a vector of held rows is added up in one or two tiles");
#include "common/type_pairs.inc"
#undef MASKED_SOFTMAX_TYPE_PAIR

template <class acc_t>
Status launch_strategy(StrategyConstant<Strategy::kColumn>, const KernelProblem& kernel_problem, const LaunchPlan& plan,
                       Stream stream) {
  return launch(column_rows<acc_t>, plan, stream, kernel_problem);
}

template <class acc_t>
Status launch_strategy(StrategyConstant<Strategy::kStrided>, const KernelProblem& kernel_problem,
                       const LaunchPlan& plan, Stream stream) {
  // Lanes take rows of one chunk. In the order of a forced cluster, a row may have several, of 32 threads each.
  const bool has_one_chunk = plan.order.chunk_elems() >= kernel_problem.problem.longest();
  const bool fits_a_warp = has_one_chunk && plan.order.threads <= kWarpThreads;
  return launch(fits_a_warp ? strided_lanes<acc_t> : strided_rows<acc_t>, plan, stream, kernel_problem);
}

// Launches the kernels of one accumulation type.
template <class acc_t>
Status launch_any_rows(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  return visit_strategy(plan.strategy, [&](auto strategy) -> Status {
    if constexpr (info_of(strategy).rows == StrategyRows::kAny && strategy != Strategy::kAutomatic) {
      return launch_strategy<acc_t>(strategy, kernel_problem, plan, stream);
    }
    return kInvalidLaunch;
  });
}

}  // namespace masked_softmax::cuda
