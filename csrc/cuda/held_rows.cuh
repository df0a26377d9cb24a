// Held rows: rows that a group of threads holds in registers, so that global memory is read once.
//
//   forward   softmax      y = e / sum(e),  e = 2^((x - max) * scale * log2(e))
//             log_softmax  y = scale * (x - max) - log(sum(e))
//   backward  common/formulas.h
//
// Who holds what. A vector is kElems elements, as many as 16 bytes hold of the narrowest operand. Thread t of the
// group's n holds the vectors t, t + n, t + 2n, ... of a chunk of the row's valid columns, kVectors of them, counted
// from the first valid column. The group (groups.cuh) is a part of a warp, a warp or a block, and the row is one chunk;
// or it is a cluster of blocks, each of which holds a chunk.
//
// Bytes moved. Forward in float32: 4 read for each valid element, 4 written for each element; padding is written and
// never read. Backward reads twice as much. 16-bit types move half.
//
// Accumulation type: float32, or float64 if an operand is float64. A sum is kept with its rounding error, and taken in
// the order of SumOrder (launch_plan.h). The maximum comes first, then the sum: the online normalizer (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018) saves reads, and a held row has none to save.
//
// Empty rows and absent elements are computed like the others. Their values may be NaN or infinite (an empty row has
// the maximum -inf and the reciprocal of a sum of 0), which is harmless: nothing of them is stored.
//
// Preconditions: every operand's columns are contiguous; every row fits (length <= n * kVectors * kElems per chunk);
// all 32 lanes of a warp call together, those without a row with an empty one.
#pragma once

#include "common/formulas.h"
#include "cuda/exp2.cuh"
#include "cuda/groups.cuh"
#include "cuda/row.cuh"
#include "cuda/vector_access.cuh"

namespace masked_softmax::cuda {

// Loads vector `index` of the `count` elements from `first` on; elements from `count` on are zeros.
template <class acc_t, int kElems, class T>
MASKED_SOFTMAX_DEVICE void load_vector(const T* first, int64_t count, int64_t index, acc_t (&values)[kElems]) {
  constexpr int kPackets = kElems / Packet<T>::kElems;
  MASKED_SOFTMAX_UNROLL
  for (int p = 0; p < kPackets; ++p) {
    const Packet<T> packet = load_packet(first, count, index * kPackets + p);
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < Packet<T>::kElems; ++i) {
      values[p * Packet<T>::kElems + i] = widen(packet.elems[i]);
    }
  }
}

// Stores vector `index` of the `count` elements from `first` on. kLanes lanes call together, with consecutive vectors.
template <unsigned kLanes, class acc_t, int kElems, class T>
MASKED_SOFTMAX_DEVICE void store_vector(T* first, int64_t count, int64_t index, bool is_aligned,
                                        const acc_t (&values)[kElems]) {
  constexpr int kPackets = kElems / Packet<T>::kElems;
  Packet<T> packets[kPackets];
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    packets[i / Packet<T>::kElems].elems[i % Packet<T>::kElems] = narrow<T>(values[i]);
  }
  if (is_aligned) {
    MASKED_SOFTMAX_UNROLL
    for (int p = 0; p < kPackets; ++p) {
      store_aligned_packet(first, count, index * kPackets + p, packets[p]);
    }
    return;
  }
  const unsigned lane = thread_index() % kLanes;
  Packet<T> previous = previous_packet(packets[kPackets - 1], kLanes);
  MASKED_SOFTMAX_UNROLL
  for (int p = 0; p < kPackets; ++p) {
    store_packet(first, count, index * kPackets + p, packets[p], previous, lane == 0 && p == 0,
                 lane == kLanes - 1 && p == kPackets - 1);
    previous = packets[p];
  }
}

// The part of a row that this thread holds.
template <class input_t, class output_t, int kVectors, int kInputs, class Group>
class HeldRow {
 public:
  using Types = RowTypes<input_t, output_t>;
  using acc_t = typename Types::acc_t;
  static constexpr int kElems = Types::kElems;

 protected:
  using Values = acc_t[kVectors][kElems];

  // Row `row_number` of the problem; an empty row if the number is past the last one.
  MASKED_SOFTMAX_DEVICE HeldRow(const Group& group, const KernelProblem& kernel_problem, int64_t row_number)
      : group_(group),
        kernel_problem_(kernel_problem),
        scaling_(kernel_problem),
        exists_(row_number < kernel_problem.problem.rows),
        row_(exists_ ? find_row<kInputs>(kernel_problem, row_number) : Row{}),
        chunk_begin_(int64_t{group.chunk()} * kVectors * kElems * group.threads()),
        chunk_length_(clamped_to_chunk(row_.length - chunk_begin_)) {}

  MASKED_SOFTMAX_DEVICE int clamped_to_chunk(int64_t length) const {
    const int max_length = kVectors * kElems * static_cast<int>(group_.threads());
    return length < 0 ? 0 : length < max_length ? static_cast<int>(length) : max_length;
  }
  // The number, within the chunk, of this thread's k-th vector.
  MASKED_SOFTMAX_DEVICE int vector_number(int k) const {
    return k * static_cast<int>(group_.threads()) + static_cast<int>(group_.thread());
  }
  // The number of its elements that are valid columns.
  MASKED_SOFTMAX_DEVICE int present(int k) const {
    const int rest = chunk_length_ - vector_number(k) * kElems;
    return rest < kElems ? (rest < 0 ? 0 : rest) : kElems;
  }

  // Calls visit(k, i) for all of this thread's values.
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE static void for_each_value(const Visitor& visit) {
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        visit(k, i);
      }
    }
  }
  // The sum of term(k, i) over this thread's values.
  template <class Term>
  MASKED_SOFTMAX_DEVICE static Sum<acc_t> sum_of(const Term& term) {
    Sum<acc_t> sum;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      acc_t terms[kElems];
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        terms[i] = term(k, i);
      }
      sum.add(terms);
    }
    return sum;
  }

  MASKED_SOFTMAX_DEVICE void load(int input, Values& values) const {
    const Operand& operand = kernel_problem_.problem.inputs[input];
    const auto* data = in_device_memory(static_cast<const input_t*>(operand.data));
    const input_t* valid = data + row_.input_offsets[input] + row_.start;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      load_vector(valid + chunk_begin_, chunk_length_, vector_number(k), values[k]);
    }
  }

  MASKED_SOFTMAX_DEVICE void store(const Values& values) const {
    const Problem& problem = kernel_problem_.problem;
    output_t* const output = in_device_memory(static_cast<output_t*>(problem.output.data)) + row_.output_offset;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      store_vector<Group::kShuffleLanes>(output + row_.start + chunk_begin_, chunk_length_, vector_number(k),
                                         kernel_problem_.output_rows_are_aligned, values[k]);
    }
    if (exists_ && !problem.packing.is_packed) {
      const auto padding = narrow<output_t>(padding_of<acc_t>(problem, row_));
      const int64_t thread = int64_t{group_.chunk()} * group_.threads() + group_.thread();
      const int64_t threads = int64_t{group_.chunks()} * group_.threads();
      fill_columns(output, 0, row_.start, padding, thread, threads);
      fill_columns(output, row_.start + row_.length, problem.cols, padding, thread, threads);
    }
  }

  const Group& group_;
  const KernelProblem& kernel_problem_;
  const Scaling<acc_t> scaling_;
  const bool exists_;
  const Row row_;
  // The chunk's part of the valid columns. Nothing else is accessed, not even as part of a vector: in place, another
  // block may be writing there.
  const int64_t chunk_begin_;
  const int chunk_length_;
};

// softmax and log_softmax, step by step: load, exponentiate, normalize, store.
template <class input_t, class output_t, int kVectors, class Group>
class ForwardRow : public HeldRow<input_t, output_t, kVectors, 1, Group> {
  using Base = HeldRow<input_t, output_t, kVectors, 1, Group>;
  using Base::for_each_value, Base::present, Base::scaling_, Base::sum_of;

 public:
  using typename Base::acc_t;

  MASKED_SOFTMAX_DEVICE ForwardRow(const Group& group, const KernelProblem& kernel_problem, int64_t row_number)
      : Base(group, kernel_problem, row_number) {}

  MASKED_SOFTMAX_DEVICE Max<acc_t> load() {
    constexpr acc_t kAbsent = -std::numeric_limits<acc_t>::infinity();
    Base::load(0, values_);
    Max<acc_t> max;
    for_each_value([&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA {
      values_[k][i] = i < present(k) ? values_[k][i] * scaling_.factor : kAbsent;
      max.add(values_[k][i]);
    });
    return max;
  }

  // softmax: holds the exponentials and returns their sum. log_softmax: holds the distances to the maximum; max_count
  // counts the elements equal to it, and the sum is the biased rest: the exponentials of all other elements, times
  // 2^kRestBias (common/exponential.h).
  template <Operation kOperation>
  MASKED_SOFTMAX_DEVICE Sum<acc_t> exponentiate(acc_t row_max, Count<acc_t>& max_count) {
    return sum_of([&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA {
      const Distance<acc_t> distance(values_[k][i], row_max);
      const bool is_present = i < present(k);
      if constexpr (kOperation == Operation::kLogSoftmax) {
        values_[k][i] = distance.t;
        max_count.add(is_present && distance.t == 0 ? acc_t{1} : acc_t{0});
        return is_present && distance.t != 0 ? rest_term(distance, scaling_) : acc_t{0};
      } else {
        static_assert(kOperation == Operation::kSoftmax, "no other forward operation is known");
        const acc_t e = exp_of_distance<Base::Types::kApproximate>(distance, scaling_);
        values_[k][i] = is_present ? e : acc_t{0};
        return values_[k][i];
      }
    });
  }

  // Stores the results, given the totals of exponentiate()'s sum and max_count over the row.
  template <Operation kOperation>
  MASKED_SOFTMAX_DEVICE void normalize_and_store(acc_t sum, acc_t max_count) {
    if constexpr (kOperation == Operation::kLogSoftmax) {
      const acc_t log_sum = log_of_sum(sum, max_count);
      for_each_value([&](int k, int i)
                         MASKED_SOFTMAX_DEVICE_LAMBDA { values_[k][i] = values_[k][i] * scaling_.scale - log_sum; });
    } else {
      static_assert(kOperation == Operation::kSoftmax, "no other forward operation is known");
      const acc_t reciprocal = 1 / sum;
      for_each_value([&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA { values_[k][i] *= reciprocal; });
    }
    Base::store(values_);
  }

 private:
  typename Base::Values values_;
};

constexpr int kOperationCount = sizeof(kOperations) / sizeof(kOperations[0]);

// The index of the first tuned derivative in kOperations[first...], or kOperationCount.
constexpr int find_tuned_derivative(int first) {
  while (first < kOperationCount && (is_forward(kOperations[first]) || !is_tuned(kOperations[first]))) {
    ++first;
  }
  return first;
}

// visit_operation() for tuned derivatives. Precondition: the operation is one (launch.cu). For the two that there are,
// a comparison takes fewer registers than a switch.
template <int kFirst = 0, class Visitor>
MASKED_SOFTMAX_DEVICE void visit_tuned_derivative(Operation operation, const Visitor& visit) {
  constexpr int kFound = find_tuned_derivative(kFirst);
  constexpr Operation kOperation = kOperations[kFound];
  constexpr bool kIsLast = find_tuned_derivative(kFound + 1) == kOperationCount;
  if (kIsLast || operation == kOperation) {
    visit(OperationConstant<kOperation>());
  } else if constexpr (!kIsLast) {
    visit_tuned_derivative<kFound + 1>(operation, visit);
  }
}

// A tuned derivative of two inputs, the incoming gradient g and the saved result y. Absent elements are zeros.
template <class input_t, class output_t, int kVectors, class Group>
class BackwardRow : public HeldRow<input_t, output_t, kVectors, 2, Group> {
  using Base = HeldRow<input_t, output_t, kVectors, 2, Group>;
  using Base::for_each_value, Base::scaling_;

 public:
  using typename Base::acc_t;

  MASKED_SOFTMAX_DEVICE BackwardRow(const Group& group, const KernelProblem& kernel_problem, int64_t row_number)
      : Base(group, kernel_problem, row_number), operation_(kernel_problem.problem.operation) {
    Base::load(0, g_);
    Base::load(1, y_);
  }

  MASKED_SOFTMAX_DEVICE Sum<acc_t> sum() const {
    return Base::sum_of([&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA {
      acc_t term = 0;
      visit_formula(k, i, [&](auto formula, const acc_t* in, const auto& exp) MASKED_SOFTMAX_DEVICE_LAMBDA {
        formula.terms(in, exp, &term);
      });
      return term;
    });
  }

  // Stores the results, given the row's sum.
  MASKED_SOFTMAX_DEVICE void differentiate_and_store(acc_t sum) {
    for_each_value([&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA {
      visit_formula(k, i, [&](auto formula, const acc_t* in, const auto& exp) MASKED_SOFTMAX_DEVICE_LAMBDA {
        g_[k][i] = formula.result(in, &sum, scaling_.scale, exp);
      });
    });
    Base::store(g_);
  }

 private:
  // Calls visit(formula, in, exp) with the operation's Formula and the inputs of one element. A branch for each element
  // takes half the registers that a loop over all elements in each branch would.
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void visit_formula(int k, int i, const Visitor& visit) const {
    const acc_t in[2] = {g_[k][i], y_[k][i]};
    const auto exp = [&](acc_t y)
                         MASKED_SOFTMAX_DEVICE_LAMBDA { return exp_of_log<Base::Types::kApproximate>(y, scaling_); };
    visit_tuned_derivative(operation_, [&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA {
      constexpr Operation kOperation = decltype(operation)::value;
      using F = Formula<kOperation>;
      static_assert(input_count(kOperation) == 2 && F::kSums == 1, "held rows have two inputs and one sum");
      visit(F(), in, exp);
    });
  }

  const Operation operation_;
  typename Base::Values g_;
  typename Base::Values y_;
};

// kAll: one launch does all of a row's reductions. The others: a launch for each reduction, and one for the results;
// see split_rows.cuh.
enum class Pass { kAll, kMaxima, kSums, kResults };

// Returns the total over the row, given this thread's partial. If an earlier launch has published the chunks' partials,
// it is the total of those, and `partial` is not used.
template <bool kIsPublished, class Group, class Partial>
MASKED_SOFTMAX_DEVICE Partial total_of(const Group& group, const Partial& partial) {
  if constexpr (kIsPublished) {
    return group.template reduce_published<Partial>();
  } else {
    return group.reduce(partial);
  }
}

template <Pass kPass, class input_t, class output_t, int kVectors, class Group>
MASKED_SOFTMAX_DEVICE void forward_row(const Group& group, const KernelProblem& kernel_problem, int64_t row_number) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  ForwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, row_number);
  const Max<acc_t> max = row.load();
  if constexpr (kPass == Pass::kMaxima) {
    group.publish(max);
  } else {
    const acc_t row_max = total_of<kPass != Pass::kAll>(group, max).value();
    visit_operation(kernel_problem.problem.operation, [&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA {
      constexpr Operation kOperation = decltype(operation)::value;
      if constexpr (is_tuned(kOperation) && is_forward(kOperation)) {
        Count<acc_t> max_count;
        const Sum<acc_t> sum = row.template exponentiate<kOperation>(row_max, max_count);
        constexpr bool kCounts = kOperation == Operation::kLogSoftmax;
        if constexpr (kPass == Pass::kSums) {
          group.publish(sum);
          if constexpr (kCounts) {
            group.publish(max_count);
          }
        } else {
          constexpr bool kIsPublished = kPass == Pass::kResults;
          const acc_t row_sum = total_of<kIsPublished>(group, sum).value();
          row.template normalize_and_store<kOperation>(
              row_sum, kCounts ? total_of<kIsPublished>(group, max_count).value() : acc_t{0});
        }
      }
    });
  }
}

template <Pass kPass, class input_t, class output_t, int kVectors, class Group>
MASKED_SOFTMAX_DEVICE void backward_row(const Group& group, const KernelProblem& kernel_problem, int64_t row_number) {
  BackwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, row_number);
  if constexpr (kPass == Pass::kSums) {
    group.publish(row.sum());
  } else {
    row.differentiate_and_store(total_of<kPass == Pass::kResults>(group, row.sum()).value());
  }
}

// Computes one row, or one pass over it.
template <Pass kPass, bool kForward, class input_t, class output_t, int kVectors, class Group>
MASKED_SOFTMAX_DEVICE void compute_row(const Group& group, const KernelProblem& kernel_problem, int64_t row_number) {
  if constexpr (kForward) {
    forward_row<kPass, input_t, output_t, kVectors>(group, kernel_problem, row_number);
  } else {
    backward_row<kPass, input_t, output_t, kVectors>(group, kernel_problem, row_number);
  }
}

// kThreads lanes of a warp hold a row; a block holds several rows. At least 4 blocks on an SM, which leaves a thread
// 128 registers: kMaxValueRegisters in launch_plan.h.
template <bool kForward, class input_t, class output_t, unsigned kThreads, int kVectors>
MASKED_SOFTMAX_KERNEL(kLanesThreads, 4)
lanes_per_row(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  const LaneGroup<kThreads> group;
  const int64_t rows_per_block = block_threads() / kThreads;
  const int64_t step = rows_per_block * grid_blocks();
  // All lanes of a warp leave the loop together.
  for (int64_t first = block_index() * rows_per_block; first < kernel_problem.problem.rows; first += step) {
    const int64_t row = first + thread_index() / kThreads;
    compute_row<Pass::kAll, kForward, input_t, output_t, kVectors>(group, kernel_problem, row);
  }
}

// A block holds a row.
template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kMaxBlockThreads, 1)
block_per_row(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  const BlockGroup<typename RowTypes<input_t, output_t>::acc_t> group;
  for (int64_t row = block_index(); row < kernel_problem.problem.rows; row += grid_blocks()) {
    compute_row<Pass::kAll, kForward, input_t, output_t, kVectors>(group, kernel_problem, row);
    group.sync();
  }
}

// A cluster of blocks holds a row: one cluster for each row.
template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kMaxBlockThreads, 1)
cluster_per_row(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
#if MASKED_SOFTMAX_HAS_CLUSTERS
  const ClusterGroup<typename RowTypes<input_t, output_t>::acc_t> group;
  const int64_t row = block_index() / cluster_size();
  compute_row<Pass::kAll, kForward, input_t, output_t, kVectors>(group, kernel_problem, row);
  group.sync();
#endif
}

// Launches the kernel of the step kStep of kLanesSteps, or of a later one, that the plan has.
template <bool kForward, class input_t, class output_t, size_t kStep = 0>
Status launch_lanes(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  using Types = RowTypes<input_t, output_t>;
  constexpr RowShape kShape{1, 1, Types::kElems, sizeof(typename Types::acc_t), kForward ? 1 : 2};
  constexpr LanesStep kLanes = kLanesSteps[kStep];
  if (plan.order.threads == kLanes.threads_per_row && plan.order.vectors == kLanes.vectors) {
    return launch(lanes_per_row<kForward, input_t, output_t, kLanes.threads_per_row, kLanes.vectors>, plan, stream,
                  kernel_problem);
  }
  // Steps that need too many registers are not compiled: no plan has them.
  if constexpr (kStep + 1 < sizeof(kLanesSteps) / sizeof(kLanesSteps[0])) {
    if constexpr (lanes_hold(kLanesSteps[kStep + 1], kShape)) {
      return launch_lanes<kForward, input_t, output_t, kStep + 1>(kernel_problem, plan, stream);
    }
  }
  return kInvalidLaunch;
}

template <bool kForward, class input_t, class output_t>
Status launch_strategy(StrategyConstant<Strategy::kLanes>, const KernelProblem& kernel_problem, const LaunchPlan& plan,
                       Stream stream) {
  return launch_lanes<kForward, input_t, output_t>(kernel_problem, plan, stream);
}

template <bool kForward, class input_t, class output_t>
Status launch_strategy(StrategyConstant<Strategy::kBlock>, const KernelProblem& kernel_problem, const LaunchPlan& plan,
                       Stream stream) {
  return launch(block_per_row<kForward, input_t, output_t, RowTypes<input_t, output_t>::kBlockVectors>, plan, stream,
                kernel_problem);
}

template <bool kForward, class input_t, class output_t>
Status launch_strategy(StrategyConstant<Strategy::kCluster>, const KernelProblem& kernel_problem,
                       const LaunchPlan& plan, Stream stream) {
  return launch(cluster_per_row<kForward, input_t, output_t, RowTypes<input_t, output_t>::kBlockVectors>, plan, stream,
                kernel_problem);
}

}  // namespace masked_softmax::cuda
