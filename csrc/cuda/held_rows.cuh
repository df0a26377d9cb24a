// Held rows: rows that a group of threads holds in registers, so that global memory is read once.
//
//   forward   softmax      y = e / sum(e),  e = 2^((x - max) * scale * log2(e))
//             log_softmax  y = scale * (x - max) - log(sum(e))
//             a sink is one more term of the sum: sink.cuh
//   backward  common/formulas.h
//
// Four kernels, by the group of threads and the layout of the rows:
//
//   plain_lanes      up to 32 lanes of a warp hold a plain row, or each of a few (PlainRows in kernel_problem.h)
//   plain_block      a block holds a plain row
//   plain_cluster    a cluster of blocks holds a plain row, each block a chunk of it
//   any_held_rows    all of these for contiguous rows in any place; and split rows, plain or not, whose chunks are held
//                    by the blocks of a launch for each reduction and one for the results
//
// plain_lanes and plain_block have separate versions for rows with sinks: a branch would cost every call instructions.
// any_held_rows takes the sinks of all other rows.
//
// plain_lanes and plain_block are launched with as many blocks as run at once. These loop over the rows, and load the
// lengths of the next ones ahead.
//
// Who holds what. A vector is kElems elements, 16 bytes of the widest operand. Thread t of the n that share a chunk
// holds its vectors t, t + n, t + 2n, ..., counted from the row's first valid column. A warp that holds none but absent
// elements of a vector skips it.
//
// Bytes moved. Forward in float32: 4 read for each valid element, 4 written for each element; padding is written and
// never read. Backward reads twice as much. 16-bit types move half.
//
// Accumulation type: float32. A sum is kept with its rounding error, and taken in the order of SumOrder
// (launch_plan.h). The maximum comes first, then the sum: the online normalizer (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018) saves reads, and a held row has none to save.
//
// Absent elements of a forward pass are -inf, so that their exponentials are 0. Those of a backward pass are zeros. In
// an empty row and in an invalid one the results may be NaN, which is harmless: nothing of them is stored.
//
// Preconditions: every operand's columns are contiguous; every row fits (length <= n * kVectors * kElems per chunk);
// all 32 lanes of a warp call together, those without a row with an empty one.
#pragma once

#include "common/formulas.h"
#include "cuda/exp2.cuh"
#include "cuda/groups.cuh"
#include "cuda/row.cuh"
#include "cuda/sink.cuh"
#include "cuda/vector_access.cuh"

namespace masked_softmax::cuda {

// A thread's share of kRows rows, or of a chunk of one row, in memory and in registers.
template <class input_t, class output_t, int kInputs, int kRows, int kVectors, class Group, bool kIsPlain,
          bool kHasSinks = false>
class HeldRows {
 public:
  using Types = RowTypes<input_t, output_t>;
  using acc_t = typename Types::acc_t;
  static constexpr int kElems = Types::kElems;
  static constexpr int kRowCount = kRows;
  static constexpr bool kMayHaveSinks = kInputs == 1 && (kHasSinks || !kIsPlain);
  // has_plain_sinks() in kernel_problem.h
  static constexpr bool takes(Operation operation) {
    return !(kIsPlain && kHasSinks) || operation == Operation::kSoftmax;
  }
  using Values = acc_t[kVectors][kElems];

  MASKED_SOFTMAX_DEVICE explicit HeldRows(const Group& group)
      : thread_(static_cast<int>(group.thread())),
        threads_(static_cast<int>(group.threads())),
        share_(VectorShare::of<kElems>(thread_, threads_)) {}

  // Begins the loads of plain row `index` of kRows, or of the group's chunk of it.
  MASKED_SOFTMAX_DEVICE void begin_loads(const Group& group, const KernelProblem& kernel_problem, int index,
                                         const PlainRow& row, input_t absent) {
    const Problem& problem = kernel_problem.problem;
    int begin = 0;
    lengths_[index] = row.length;
    cols_ = static_cast<int>(problem.cols);
    if constexpr (Group::kHasChunks) {
      is_single_ = row.length == 1;
      const int chunk_elems = kernel_problem.order.vectors * share_.stride;
      begin = group.chunk() * chunk_elems;
      cols_ = clamp(cols_ - begin, chunk_elems);
      if (row.length >= 0) {
        lengths_[index] = clamp(row.length - begin, chunk_elems);
      }
    }
    if constexpr (kHasSinks) {
      numbers_[index] = row.number(kernel_problem);
      sinks_[index] = load_plain_sink<input_t>(kernel_problem, numbers_[index]);
    }
    outputs_[index] =
        computed_once(row.at(static_cast<output_t*>(problem.output.data), kernel_problem.plain_rows.output) + begin);
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kInputs; ++k) {
      const auto* x = row.at(static_cast<const input_t*>(problem.inputs[k].data), kernel_problem.plain_rows.inputs[k]);
      loads_[index][k].begin_loads(x + begin, lengths_[index], share_, absent);
    }
  }

  // Takes plain row 0 from shared memory: a StagedElems (vector_access.cuh) for each input.
  template <class Sources>
  MASKED_SOFTMAX_DEVICE void take_staged(const KernelProblem& kernel_problem, const PlainRow& row,
                                         const Sources& sources, input_t absent) {
    const Problem& problem = kernel_problem.problem;
    lengths_[0] = row.length;
    cols_ = static_cast<int>(problem.cols);
    outputs_[0] = computed_once(row.at(static_cast<output_t*>(problem.output.data), kernel_problem.plain_rows.output));
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kInputs; ++k) {
      loads_[0][k].take_staged(sources[k], row.length, share_, absent);
    }
  }

  // Begins the loads of the group's chunk of a row.
  MASKED_SOFTMAX_DEVICE void begin_loads(const Group& group, const KernelProblem& kernel_problem, const Row& row,
                                         input_t absent) {
    const Problem& problem = kernel_problem.problem;
    const int chunk_elems = kernel_problem.order.vectors * share_.stride;
    const int64_t begin = group.chunk() * chunk_elems;
    lengths_[0] = clamp(row.length - begin, chunk_elems);
    is_single_ = row.length == 1;
    numbers_[0] = group.row();
    exists_ = row.exists;
    is_valid_ = row.is_valid;
    outputs_[0] = static_cast<output_t*>(problem.output.data) + row.output_offset + row.start + begin;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kInputs; ++k) {
      const auto* x = static_cast<const input_t*>(problem.inputs[k].data) + row.input_offsets[k] + row.start + begin;
      loads_[0][k].begin_loads(x, lengths_[0], share_, absent);
    }
  }

  MASKED_SOFTMAX_DEVICE void finish_loads() {
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kInputs; ++k) {
        loads_[row][k].finish_loads();
      }
    }
  }

  MASKED_SOFTMAX_DEVICE acc_t value(int row, int input, int k, int i) const {
    return loads_[row][input].vector(k).widened(i);
  }

  // Whether the row has one valid column.
  MASKED_SOFTMAX_DEVICE bool is_single(int row) const { return Group::kHasChunks ? is_single_ : lengths_[row] == 1; }

  // Whether the row, of which this is the first chunk, has no valid column.
  MASKED_SOFTMAX_DEVICE bool is_empty(int row) const { return lengths_[row] <= 0; }

  MASKED_SOFTMAX_DEVICE bool exists(int row) const { return kIsPlain ? lengths_[row] != kNoRow : exists_; }
  MASKED_SOFTMAX_DEVICE bool is_valid(int row) const { return kIsPlain ? lengths_[row] != kInvalidLength : is_valid_; }

  // Precondition: kMayHaveSinks.
  MASKED_SOFTMAX_DEVICE bool have_sinks(const Problem& problem) const {
    return kIsPlain || problem.row_input.data != nullptr;
  }
  // NaN for an invalid plain row: so the row and its weight become NaN.
  MASKED_SOFTMAX_DEVICE double sink(const KernelProblem& kernel_problem, int row) const {
    if constexpr (kIsPlain) {
      return is_valid(row) ? static_cast<double>(sinks_[row]) : std::numeric_limits<double>::quiet_NaN();
    } else {
      return exists_ ? load_row_input(kernel_problem, numbers_[0]) : -std::numeric_limits<double>::infinity();
    }
  }
  MASKED_SOFTMAX_DEVICE void store_weight(const RowResult& weights, int row, acc_t weight) const {
    if constexpr (kIsPlain) {
      in_device_memory(static_cast<acc_t*>(weights.data))[numbers_[row]] = weight;
    } else {
      store_row_result(weights, numbers_[row], is_valid(row), weight);
    }
  }

  // Calls visit(k) for the vectors of which a lane of this thread's warp holds an element.
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void for_each_vector(int row, const Visitor& visit) const {
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      if (is_active(row, k)) {
        visit(k);
      }
    }
  }

  // Stores a row's results, result(k, i), and, of a plain row, its padding. is_absent_padding: the results of absent
  // elements are the value of padding.
  template <class Result>
  MASKED_SOFTMAX_DEVICE void store(const KernelProblem& kernel_problem, int row, bool is_absent_padding,
                                   const Result& result) const {
    using VectorType = Vector<output_t, kElems>;
    if constexpr (kIsPlain) {
      const auto padding = padding_of<acc_t>(kernel_problem, lengths_[row] != kInvalidLength);
      const auto padding_vector = VectorType::filled(narrow<output_t>(padding));
      output_t* const p = outputs_[row] + share_.begin;
      const int rest = lengths_[row] - share_.begin;
      const int cols = lengths_[row] == kNoRow ? 0 : cols_ - share_.begin;
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        const bool is_within = k * share_.stride < cols;
        if (is_active(row, k)) {
          acc_t values[kElems];
          MASKED_SOFTMAX_UNROLL
          for (int i = 0; i < kElems; ++i) {
            values[i] = result(k, i);
          }
          if (!is_absent_padding && k * share_.stride + kElems > rest) {
            keep_branch();
            MASKED_SOFTMAX_UNROLL
            for (int i = 0; i < kElems; ++i) {
              values[i] = k * share_.stride + i < rest ? values[i] : padding;
            }
          }
          store_vector_if(is_within, p + k * share_.stride, VectorType::narrowed(values));
        } else {
          store_vector_if(is_within, p + k * share_.stride, padding_vector);
        }
      }
    } else {
      const bool is_first_lane = thread_index() % kWarpThreads == 0 || thread_ == 0;
      const bool is_last_lane = thread_index() % kWarpThreads == kWarpThreads - 1 || thread_ == threads_ - 1;
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        acc_t values[kElems] = {};
        if (is_active(row, k)) {
          MASKED_SOFTMAX_UNROLL
          for (int i = 0; i < kElems; ++i) {
            values[i] = result(k, i);
          }
        }
        const auto vector = VectorType::narrowed(values);
        store_vector(outputs_[0], lengths_[0], k * share_.stride + share_.begin, vector, previous_vector(vector),
                     is_first_lane, is_last_lane);
      }
    }
  }

 private:
  MASKED_SOFTMAX_DEVICE static int clamp(int64_t elems, int max_elems) {
    return elems < 0 ? 0 : elems < max_elems ? static_cast<int>(elems) : max_elems;
  }
  MASKED_SOFTMAX_DEVICE bool is_active(int row, int k) const {
    // Groups of fewer lanes than a warp have few vectors: a warp would seldom skip one.
    return (Group::kMinThreads < kWarpThreads && threads_ < kWarpThreads) ||
           k * share_.stride + thread_ / kWarpThreads * kWarpThreads * kElems < lengths_[row];
  }

  const int thread_;
  const int threads_;
  const VectorShare share_;
  int lengths_[kRows];  // of the rows, or of the chunk
  bool is_single_;
  // Of rows in any place.
  bool exists_;
  bool is_valid_;
  // Of rows with sinks.
  std::conditional_t<kIsPlain, uint32_t, int64_t> numbers_[kRows];
  float sinks_[kRows];
  int cols_;
  output_t* outputs_[kRows];  // of the first valid column
  VectorLoads<input_t, kElems, kVectors, kIsPlain> loads_[kRows][kInputs];
};

// One launch reduces over all of the row. The others: see Pass.
template <bool kHasPasses, class Group, class Partial, int kRows>
MASKED_SOFTMAX_DEVICE void reduce_or_load(const Group& group, const KernelProblem& kernel_problem,
                                          Partial (&partials)[kRows]) {
  if constexpr (kHasPasses) {
    if (kernel_problem.pass != Pass::kAll) {
      group.reduce_published(partials);
      return;
    }
  }
  group.reduce(partials);
}

// Adds the terms of a thread's vector k.
template <class acc_t, int kElems>
MASKED_SOFTMAX_DEVICE void add_to(Sum<acc_t>& sum, int k, const acc_t (&terms)[kElems]) {
  if (k == 0) {
    sum.set(terms);
  } else {
    sum.add(terms);
  }
}

// softmax and log_softmax, step by step: maximum, exponentials, sum, sink, results.
template <class Rows, class Group, bool kHasPasses>
class Forward {
  using acc_t = typename Rows::acc_t;
  static constexpr int kRows = Rows::kRowCount;

 public:
  MASKED_SOFTMAX_DEVICE Forward(const Group& group, const KernelProblem& kernel_problem, const Rows& rows)
      : group_(group), kernel_problem_(kernel_problem), constants_(constants_of<acc_t>(kernel_problem)), rows_(rows) {}

  MASKED_SOFTMAX_DEVICE void compute() {
    Max<acc_t> max[kRows];
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      rows_.for_each_vector(row, [&](int k) MASKED_SOFTMAX_DEVICE_LAMBDA {
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < Rows::kElems; ++i) {
          values_[row][k][i] = rows_.value(row, 0, k, i);
        }
        if (constants_.factor != 1) {
          MASKED_SOFTMAX_UNROLL
          for (int i = 0; i < Rows::kElems; ++i) {
            values_[row][k][i] *= constants_.factor;
          }
        }
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < Rows::kElems; ++i) {
          max[row].add(values_[row][k][i]);
        }
      });
    }
    if (is_pass(Pass::kMaxima)) {
      publish(max);
      return;
    }
    reduce_or_load<kHasPasses>(group_, kernel_problem_, max);
    if constexpr (Rows::kMayHaveSinks) {
      if (rows_.have_sinks(kernel_problem_.problem)) {
        MASKED_SOFTMAX_UNROLL
        for (int row = 0; row < kRows; ++row) {
          max[row] = {{max_beside_sink(max[row].value())}};
        }
      }
    }
    visit_operation(kernel_problem_.problem.operation, [&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA {
      constexpr Operation kOperation = decltype(operation)::value;
      if constexpr (is_tuned(kOperation) && is_forward(kOperation) && Rows::takes(kOperation)) {
        finish(operation, max);
      }
    });
  }

 private:
  MASKED_SOFTMAX_DEVICE bool is_pass(Pass pass) const { return kHasPasses && kernel_problem_.pass == pass; }

  template <class Partial>
  MASKED_SOFTMAX_DEVICE void publish(Partial (&partials)[kRows]) const {
    if constexpr (kHasPasses) {
      group_.publish(partials);
    }
  }

  // If rows have sinks, returns add(sink).value, and stores the sink's weight; otherwise, without_sink().
  template <class Add, class WithoutSink>
  MASKED_SOFTMAX_DEVICE acc_t with_sink(int row, acc_t row_max, const Add& add, const WithoutSink& without_sink) const {
    if constexpr (Rows::kMayHaveSinks) {
      const Problem& problem = kernel_problem_.problem;
      if (rows_.have_sinks(problem)) {
        const double number = rows_.sink(kernel_problem_, row);
        const SumWithSink<acc_t> result = add(Sink<acc_t>(kernel_problem_, number, row_max, rows_.is_empty(row)));
        if (problem.row_result.data != nullptr && is_first_thread() && rows_.exists(row)) {
          rows_.store_weight(problem.row_result, row, result.weight);
        }
        return result.value;
      }
    }
    return without_sink();
  }
  MASKED_SOFTMAX_DEVICE bool is_first_thread() const {
    if constexpr (Group::kHasChunks) {
      return group_.thread() == 0 && group_.chunk() == 0;
    } else {
      return group_.thread() == 0;
    }
  }

  MASKED_SOFTMAX_DEVICE void finish(OperationConstant<Operation::kSoftmax>, const Max<acc_t> (&max)[kRows]) {
    using Exponential = SoftmaxExponential<Rows::Types::kApproximate, acc_t>;
    Sum<acc_t> sum[kRows];
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Exponential exponential(constants_, max[row].value(), rows_.is_single(row));
      rows_.for_each_vector(row, [&](int k) MASKED_SOFTMAX_DEVICE_LAMBDA {
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < Rows::kElems; ++i) {
          values_[row][k][i] = exponential(values_[row][k][i]);
        }
        add_to(sum[row], k, values_[row][k]);
      });
    }
    if (is_pass(Pass::kSums)) {
      publish(sum);
      return;
    }
    reduce_or_load<kHasPasses>(group_, kernel_problem_, sum);
    group_.release();
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const acc_t of_elements = sum[row].value();
      const acc_t row_max = max[row].value();
      const acc_t inverse = with_sink(
          row, row_max,
          [&](const Sink<acc_t>& sink) MASKED_SOFTMAX_DEVICE_LAMBDA {
            return sink.added_to(of_elements, Exponential(constants_, row_max, rows_.is_single(row)));
          },
          [&]() MASKED_SOFTMAX_DEVICE_LAMBDA { return reciprocal(of_elements); });
      // An absent element's exponential is 0, and so is its product with a finite number.
      rows_.store(kernel_problem_, row, /*is_absent_padding=*/inverse - inverse == 0,
                  [&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA { return values_[row][k][i] * inverse; });
    }
  }

  MASKED_SOFTMAX_DEVICE void finish(OperationConstant<Operation::kLogSoftmax>, const Max<acc_t> (&max)[kRows]) {
    Sum<acc_t> rest[kRows];
    Count<acc_t> max_count[kRows];
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const LogSum<acc_t> log_sum(constants_, max[row].value(), rows_.is_single(row));
      rows_.for_each_vector(row, [&](int k) MASKED_SOFTMAX_DEVICE_LAMBDA {
        acc_t terms[Rows::kElems];
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < Rows::kElems; ++i) {
          terms[i] = log_sum.rest_term(values_[row][k][i], max_count[row]);
        }
        add_to(rest[row], k, terms);
      });
    }
    if (is_pass(Pass::kSums)) {
      publish(rest);
      publish(max_count);
      return;
    }
    reduce_or_load<kHasPasses>(group_, kernel_problem_, rest);
    reduce_or_load<kHasPasses>(group_, kernel_problem_, max_count);
    group_.release();
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const acc_t row_max = max[row].value();
      const acc_t of_elements =
          LogSum<acc_t>(constants_, row_max, rows_.is_single(row)).value(rest[row].value(), max_count[row].value());
      const LogResult<acc_t> log_result(
          constants_, row_max,
          with_sink(
              row, row_max,
              [&](const Sink<acc_t>& sink) MASKED_SOFTMAX_DEVICE_LAMBDA { return sink.added_to_log(of_elements); },
              [&]() MASKED_SOFTMAX_DEVICE_LAMBDA { return of_elements; }));
      rows_.store(kernel_problem_, row, /*is_absent_padding=*/false,
                  [&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA { return log_result(values_[row][k][i]); });
    }
  }

  const Group& group_;
  const KernelProblem& kernel_problem_;
  const RowConstants<acc_t>& constants_;
  const Rows& rows_;
  typename Rows::Values values_[kRows];
};

// A tuned derivative of two inputs, the incoming gradient g and the saved result y.
template <class Rows, class Group, bool kHasPasses>
class Backward {
  using acc_t = typename Rows::acc_t;
  static constexpr int kRows = Rows::kRowCount;

 public:
  MASKED_SOFTMAX_DEVICE Backward(const Group& group, const KernelProblem& kernel_problem, const Rows& rows)
      : group_(group), kernel_problem_(kernel_problem), constants_(constants_of<acc_t>(kernel_problem)), rows_(rows) {}

  MASKED_SOFTMAX_DEVICE void compute() {
    visit_operation(kernel_problem_.problem.operation, [&](auto operation) MASKED_SOFTMAX_DEVICE_LAMBDA {
      constexpr Operation kOperation = decltype(operation)::value;
      if constexpr (is_tuned(kOperation) && !is_forward(kOperation)) {
        static_assert(input_count(kOperation) == 2 && Formula<kOperation>::kSums == 1,
                      "held rows have two inputs and one sum");
        differentiate<Formula<kOperation>>();
      }
    });
  }

 private:
  template <class F>
  MASKED_SOFTMAX_DEVICE void differentiate() {
    const auto exp = [&](acc_t y)
                         MASKED_SOFTMAX_DEVICE_LAMBDA { return exp_of_log<Rows::Types::kApproximate>(y, constants_); };
    Sum<acc_t> sum[kRows];
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      rows_.for_each_vector(row, [&](int k) MASKED_SOFTMAX_DEVICE_LAMBDA {
        acc_t terms[Rows::kElems];
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < Rows::kElems; ++i) {
          const acc_t in[2] = {rows_.value(row, 0, k, i), rows_.value(row, 1, k, i)};
          F::terms(in, exp, &terms[i]);
        }
        add_to(sum[row], k, terms);
      });
    }
    if constexpr (kHasPasses) {
      if (kernel_problem_.pass == Pass::kSums) {
        group_.publish(sum);
        return;
      }
    }
    reduce_or_load<kHasPasses>(group_, kernel_problem_, sum);
    group_.release();
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const acc_t total = sum[row].value();
      rows_.store(kernel_problem_, row, /*is_absent_padding=*/false, [&](int k, int i) MASKED_SOFTMAX_DEVICE_LAMBDA {
        const acc_t in[2] = {rows_.value(row, 0, k, i), rows_.value(row, 1, k, i)};
        return F::result(in, &total, constants_.scale, exp);
      });
    }
  }

  const Group& group_;
  const KernelProblem& kernel_problem_;
  const RowConstants<acc_t>& constants_;
  const Rows& rows_;
};

template <bool kForward, bool kHasPasses, class Rows, class Group>
MASKED_SOFTMAX_DEVICE void compute_rows(const Group& group, const KernelProblem& kernel_problem, const Rows& rows) {
  if constexpr (kForward) {
    Forward<Rows, Group, kHasPasses>(group, kernel_problem, rows).compute();
  } else {
    Backward<Rows, Group, kHasPasses>(group, kernel_problem, rows).compute();
  }
}

// The value of absent elements: after the multiplication by the factor, -inf in a forward pass.
template <bool kForward, class input_t>
MASKED_SOFTMAX_DEVICE input_t absent_value(const KernelProblem& kernel_problem) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return narrow<input_t>(kForward ? kernel_problem.constants_float.factor < 0 ? kInfinity : -kInfinity : 0.0f);
}

// kStep of kLanesSteps lanes hold a row. The lengths of the next rows are loaded ahead.
template <bool kForward, class input_t, class output_t, size_t kStep, bool kHasSinks>
MASKED_SOFTMAX_KERNEL(kLanesThreads,
                      plain_threads_per_sm(kLanesSteps[kStep].threads_per_row, kLanesSteps[kStep].elems_per_thread) /
                          kLanesThreads)
plain_lanes(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  constexpr int kInputs = kForward ? 1 : 2;
  constexpr LanesStep kLanes = kLanesSteps[kStep];
  constexpr int kRows = rows_per_group(kLanes.elems_per_thread, kInputs);
  constexpr int kVectors = kLanes.elems_per_thread / RowTypes<input_t, output_t>::kElems;
  constexpr unsigned kGroups = kWarpThreads / kLanes.threads_per_row;  // of a warp
  using Group = LaneGroup<kLanes.threads_per_row>;
  const Group group;
  const auto absent = absent_value<kForward, input_t>(kernel_problem);
  const unsigned warp = block_index() * (kLanesThreads / kWarpThreads) + thread_index() / kWarpThreads;
  const unsigned step = grid_blocks() * (kLanesThreads / kWarpThreads) * kGroups * kRows;
  PlainRow next[kRows];
  const auto find_next = [&](unsigned warp_first) MASKED_SOFTMAX_DEVICE_LAMBDA {
    const unsigned first = warp_first + thread_index() % kWarpThreads / kLanes.threads_per_row;
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      next[row] = PlainRow(kernel_problem, first + row * kGroups);
    }
  };
  find_next(warp * kGroups * kRows);
  // All lanes of a warp leave the loop together.
  for (unsigned warp_first = warp * kGroups * kRows; warp_first < kernel_problem.plain_rows.rows; warp_first += step) {
    HeldRows<input_t, output_t, kInputs, kRows, kVectors, Group, true, kHasSinks> rows(group);
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      rows.begin_loads(group, kernel_problem, row, next[row], absent);
    }
    find_next(warp_first + step);
    rows.finish_loads();
    compute_rows<kForward, false>(group, kernel_problem, rows);
  }
}

// A group of threads holds a row. `next` is the row, and finds the following one while the loads are in flight.
template <bool kForward, class input_t, class output_t, int kVectors, bool kHasSinks, class Group, class FindNext>
MASKED_SOFTMAX_DEVICE void compute_plain_row(const Group& group, const KernelProblem& kernel_problem, PlainRow& next,
                                             const FindNext& find_next) {
  HeldRows<input_t, output_t, kForward ? 1 : 2, 1, kVectors, Group, true, kHasSinks> rows(group);
  rows.begin_loads(group, kernel_problem, 0, next, absent_value<kForward, input_t>(kernel_problem));
  find_next();
  rows.finish_loads();
  compute_rows<kForward, false>(group, kernel_problem, rows);
  group.sync();
}

// A block holds a row. The length of the next row is loaded ahead.
template <bool kForward, class input_t, class output_t, bool kHasSinks>
MASKED_SOFTMAX_KERNEL(plain_threads_per_sm(kWarpThreads, kMaxThreadElems), 1)
plain_block(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using Types = RowTypes<input_t, output_t>;
  constexpr int kVectors = held_vectors(Types::kElems, kForward ? 1 : 2);
  const BlockGroup<typename Types::acc_t> group;
  PlainRow next(kernel_problem, block_index());
  for (unsigned row = block_index(); row < kernel_problem.plain_rows.rows; row += grid_blocks()) {
    compute_plain_row<kForward, input_t, output_t, kVectors, kHasSinks>(
        group, kernel_problem, next,
        [&]() MASKED_SOFTMAX_DEVICE_LAMBDA { next = PlainRow(kernel_problem, row + grid_blocks()); });
  }
}

// A cluster of blocks holds a row: one cluster for each row.
template <bool kForward, class input_t, class output_t>
MASKED_SOFTMAX_KERNEL(plain_threads_per_sm(kWarpThreads, kMaxThreadElems), 1)
plain_cluster(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
#if MASKED_SOFTMAX_HAS_CLUSTERS
  using Types = RowTypes<input_t, output_t>;
  constexpr int kVectors = cluster_vectors(Types::kElems, kForward ? 1 : 2);
  const ClusterGroup<typename Types::acc_t> group;
  PlainRow row(kernel_problem, block_index() >> kernel_problem.cluster_shift);
  compute_plain_row<kForward, input_t, output_t, kVectors, false>(group, kernel_problem, row,
                                                                  []() MASKED_SOFTMAX_DEVICE_LAMBDA {});
#endif
}

// Lanes, a block, a cluster of blocks or the blocks of several launches hold a row.
template <bool kForward, class input_t, class output_t>
MASKED_SOFTMAX_KERNEL(kMaxBlockThreads, 1)
any_held_rows(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  constexpr int kElems = RowTypes<input_t, output_t>::kElems;
  constexpr int kInputs = kForward ? 1 : 2;
  const Problem& problem = kernel_problem.problem;
  const auto absent = absent_value<kForward, input_t>(kernel_problem);
  const auto order_threads = static_cast<unsigned>(kernel_problem.order.threads);
  const int64_t groups = order_threads < kWarpThreads    ? block_threads() / order_threads
                         : order_threads == kWarpThreads ? block_threads() / kWarpThreads
                                                         : 1;
  const int64_t count = kernel_problem.pass == Pass::kAll ? problem.rows : problem.rows * kernel_problem.split_chunks;
  const int64_t step = (grid_blocks() >> kernel_problem.cluster_shift) * groups;
  // All lanes of a warp leave the loop together.
  for (int64_t first = (block_index() >> kernel_problem.cluster_shift) * groups; first < count; first += step) {
    const int64_t number = first + (groups > 1 ? thread_index() / order_threads : 0);
    const AnyGroup<acc_t> group(kernel_problem, number);
    const Row row = find_row<kInputs>(kernel_problem, group.row());
    HeldRows<input_t, output_t, kInputs, 1, held_vectors(kElems, kInputs), AnyGroup<acc_t>, false> rows(group);
    rows.begin_loads(group, kernel_problem, row, absent);
    rows.finish_loads();
    compute_rows<kForward, true>(group, kernel_problem, rows);
    const bool stores = kernel_problem.pass == Pass::kAll || kernel_problem.pass == Pass::kResults;
    if (stores && row.exists && !problem.packing.is_packed) {
      output_t* const output = in_device_memory(static_cast<output_t*>(problem.output.data)) + row.output_offset;
      const auto padding = narrow<output_t>(padding_of<acc_t>(kernel_problem, row.is_valid));
      const int64_t thread = int64_t{group.chunk()} * group.threads() + group.thread();
      const int64_t threads = int64_t{group.chunks()} * group.threads();
      fill_columns<kElems>(output, 0, row.start, padding, thread, threads);
      fill_columns<kElems>(output, row.start + row.length, problem.cols, padding, thread, threads);
    }
    group.sync();
  }
}

// Launches plain_lanes for the step of kLanesSteps, from kStep on, that the plan has.
template <bool kForward, class input_t, class output_t, bool kHasSinks, size_t kStep = 0>
Status launch_plain_lanes(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  if constexpr (kStep < sizeof(kLanesSteps) / sizeof(kLanesSteps[0])) {
    constexpr LanesStep kLanes = kLanesSteps[kStep];
    constexpr int kElems = RowTypes<input_t, output_t>::kElems;
    constexpr SumOrder kOrder = {kLanes.threads_per_row, kLanes.elems_per_thread / kElems, kElems};
    if constexpr (kOrder.vectors <= held_vectors(kElems, kForward ? 1 : 2) &&
                  (!kHasSinks || plain_rows_take_sinks(Strategy::kLanes, kOrder))) {
      if (plan.order.threads == kLanes.threads_per_row &&
          plan.order.vectors * plan.order.elems == kLanes.elems_per_thread) {
        return launch(plain_lanes<kForward, input_t, output_t, kStep, kHasSinks>, plan, stream, kernel_problem);
      }
    }
    return launch_plain_lanes<kForward, input_t, output_t, kHasSinks, kStep + 1>(kernel_problem, plan, stream);
  }
  return kInvalidLaunch;
}

// Defined in staged_rows.cuh and plain_columns.cuh.
template <bool kForward, class input_t, class output_t>
Status launch_staged_rows(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream);
template <bool kForward, class input_t, class output_t>
Status launch_plain_columns(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream);

// Launches the kernels of one pair of types.
template <bool kForward, class input_t, class output_t>
Status launch_held_rows(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  if (plan.is_plain && kernel_problem.problem.row_input.data != nullptr) {
    if constexpr (kForward && std::is_same_v<input_t, output_t>) {
      return plan.strategy == Strategy::kBlock
                 ? launch(plain_block<true, input_t, output_t, true>, plan, stream, kernel_problem)
                 : launch_plain_lanes<true, input_t, output_t, true>(kernel_problem, plan, stream);
    } else {
      return kInvalidLaunch;
    }
  }
  if (plan.is_plain) {
    switch (plan.strategy) {
      case Strategy::kLanes:
        return launch_plain_lanes<kForward, input_t, output_t, false>(kernel_problem, plan, stream);
      case Strategy::kBlock:
        return launch(plain_block<kForward, input_t, output_t, false>, plan, stream, kernel_problem);
      case Strategy::kStaged: return launch_staged_rows<kForward, input_t, output_t>(kernel_problem, plan, stream);
      case Strategy::kCluster: return launch(plain_cluster<kForward, input_t, output_t>, plan, stream, kernel_problem);
      case Strategy::kColumn: return launch_plain_columns<kForward, input_t, output_t>(kernel_problem, plan, stream);
      case Strategy::kAutomatic:
      case Strategy::kSplit:
      case Strategy::kStrided: return kInvalidLaunch;
    }
  }
  if (plan.strategy != Strategy::kSplit) {
    return launch(any_held_rows<kForward, input_t, output_t>, plan, stream, kernel_problem);
  }
  KernelProblem split = kernel_problem;
  Status status = kSuccess;
  for (Pass pass : {Pass::kMaxima, Pass::kSums, Pass::kResults}) {
    if (status == kSuccess && (kForward || pass != Pass::kMaxima)) {
      split.pass = pass;
      status = launch(any_held_rows<kForward, input_t, output_t>, plan, stream, split);
    }
  }
  return status;
}

// What the runtime reports of the kernel that clusters run.
template <bool kForward, class input_t, class output_t>
Status query_clusters(ClusterSupport& support) {
  return query_cluster_kernel(plain_cluster<kForward, input_t, output_t>, largest_cluster_plan(), support);
}

}  // namespace masked_softmax::cuda
