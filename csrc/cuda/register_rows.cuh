// Rows that a group of threads holds in registers: device memory is read once, whatever the operation.
//
//   forward    softmax      y = e / sum(e),  e = 2^((x - max) * scale * log2(e))
//              log_softmax  y = scale * (x - max) - log(sum(e))
//   backward   softmax      dx = scale * y * (g - sum(g * y))
//              log_softmax  dx = scale * (g - exp(y) * sum(g))
//
// Who holds what. A vector is kElems elements: as many as 16 bytes hold of the narrowest operand. Thread t of the
// group's n holds the vectors t, t + n, t + 2n, ... of a piece of the row's valid columns, kVectors of them, counted
// from the first valid column. The group (groups.cuh) is a part of a warp, a warp or a block, and the row one piece; or
// it is a cluster of blocks, and every block has its piece.
//
// What moves. Forward in float32: 4 bytes read for each valid element, 4 written for each element; padding is written
// and never read. Backward reads twice as much. 16-bit types: half of either.
//
// On paper, for an H200 (a copy moves 4.3 TB/s over 132 multiprocessors, 32.6 GB/s each; with 600 ns of latency that
// asks for 20 KiB in flight on each). Registers as compiled for 9.0; all counts: tests/gpu/inspect_kernels.py.
//
//   lanes     56 to 128 registers, no shared memory: 9 to 4 blocks of 128 threads, with 18 KiB (8 lanes, a vector each)
//             to 64 KiB (8 vectors each) in flight. Expected: 0.9 of a copy, 0.85 for rows of up to 32 floats.
//   block     64 registers, 1.5 KiB: 1024 threads in all. Rows of 4096 floats are four blocks, one of which loads while
//             another reduces or stores: 0.9. One of 16384 has a multiprocessor to itself; 128 KiB are 4.0 us, and the
//             1.2 us of latency and reductions are not hidden: 0.75.
//   cluster   64 registers, 1.5 KiB, as block; and two barriers of the cluster, 1 us each: 0.7.
//
// Sums and exponentials: float32 (float64 where an operand is float64). A sum is kept with its rounding error, and
// taken in the order that SumOrder in launch_plan.h describes.
//
// Preconditions: every operand's columns are adjacent; all rows fit (length <= n * kVectors * kElems); all 32 lanes of
// a warp call together, those without a row with an empty one.
#pragma once

#include "cuda/exp2.cuh"
#include "cuda/groups.cuh"
#include "cuda/row.cuh"
#include "cuda/vector_access.cuh"

namespace masked_softmax {
namespace cuda {

template <class input_t, class output_t>
struct RowTypes {
  using acc_t = std::conditional_t<sizeof(input_t) == 8 || sizeof(output_t) == 8, double, float>;
  static constexpr int kElems =
      16 / static_cast<int>(sizeof(input_t) < sizeof(output_t) ? sizeof(input_t) : sizeof(output_t));
  static constexpr bool kApproximate = sizeof(output_t) == 2 && std::is_same_v<acc_t, float>;
};

// How many of a vector's elements lie within the row's valid columns.
template <int kElems>
MASKED_SOFTMAX_DEVICE int elems_present(int length, int vector) {
  const int rest = length - vector * kElems;
  return rest < kElems ? (rest < 0 ? 0 : rest) : kElems;
}

// Vector number `index` of the `count` elements from `first` on, in the computing type; zeros from `count` on.
template <class acc_t, int kElems, class T>
MASKED_SOFTMAX_DEVICE void load_vector(const T* first, int64_t count, int64_t index, acc_t (&values)[kElems]) {
  constexpr int kChunks = kElems / Chunk<T>::kElems;
  MASKED_SOFTMAX_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const Chunk<T> chunk = load_chunk(first, count, index * kChunks + c);
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < Chunk<T>::kElems; ++i) {
      values[c * Chunk<T>::kElems + i] = widen(chunk.elems[i]);
    }
  }
}

// Stores vector number `index` of each lane of a run of kRunLanes lanes, whose vectors follow one another.
template <unsigned kRunLanes, class acc_t, int kElems, class T>
MASKED_SOFTMAX_DEVICE void store_vector(T* first, int64_t count, int64_t index, bool all_aligned,
                                        const acc_t (&values)[kElems]) {
  constexpr int kChunks = kElems / Chunk<T>::kElems;
  Chunk<T> chunks[kChunks];
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    chunks[i / Chunk<T>::kElems].elems[i % Chunk<T>::kElems] = narrow<T>(values[i]);
  }
  if (all_aligned) {
    MASKED_SOFTMAX_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      store_chunk(first, count, index * kChunks + c, chunks[c]);
    }
    return;
  }
  const unsigned lane = thread_index() % kRunLanes;
  Chunk<T> previous = chunk_before(chunks[kChunks - 1], kRunLanes);
  MASKED_SOFTMAX_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    store_chunk_anywhere(first, count, index * kChunks + c, chunks[c], previous, lane == 0 && c == 0,
                         lane == kRunLanes - 1 && c == kChunks - 1);
    previous = chunks[c];
  }
}

// The part of a row that this thread holds.
template <class input_t, class output_t, int kVectors, class Group>
class RegisterRow {
 public:
  using Types = RowTypes<input_t, output_t>;
  using acc_t = typename Types::acc_t;
  static constexpr int kElems = Types::kElems;

 protected:
  using Values = acc_t[kVectors][kElems];

  // Row `index` of the problem; one without columns where it is beyond the last one.
  template <int kInputs>
  MASKED_SOFTMAX_DEVICE RegisterRow(const Group& group, const KernelProblem& kernel_problem, int64_t index,
                                    std::integral_constant<int, kInputs>)
      : group_(group),
        kernel_problem_(kernel_problem),
        scaling_(kernel_problem),
        exists_(index < kernel_problem.problem.rows),
        row_(exists_ ? find_row<kInputs>(kernel_problem, index) : Row{}),
        piece_begin_(int64_t{group.piece()} * kVectors * kElems * group.threads()),
        piece_length_(elems_from(row_.length - piece_begin_)) {}

  // How many of the piece's elements there are, if the row has `rest` from its beginning on.
  MASKED_SOFTMAX_DEVICE int elems_from(int64_t rest) const {
    const int most = kVectors * kElems * static_cast<int>(group_.threads());
    return rest < 0 ? 0 : rest < most ? static_cast<int>(rest) : most;
  }
  // The number, in the piece, of the k-th vector that this thread holds.
  MASKED_SOFTMAX_DEVICE int vector(int k) const {
    return k * static_cast<int>(group_.threads()) + static_cast<int>(group_.thread());
  }
  MASKED_SOFTMAX_DEVICE int present(int k) const { return elems_present<kElems>(piece_length_, vector(k)); }

  MASKED_SOFTMAX_DEVICE void load(int input, Values& values) const {
    const Operand& operand = kernel_problem_.problem.inputs[input];
    const auto* data = in_device_memory(static_cast<const input_t*>(operand.data));
    const input_t* valid = data + row_.input_offsets[input] + row_.start;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      load_vector(valid + piece_begin_, piece_length_, vector(k), values[k]);
    }
  }

  MASKED_SOFTMAX_DEVICE void store(const Values& values) const {
    const Problem& problem = kernel_problem_.problem;
    output_t* const output = in_device_memory(static_cast<output_t*>(problem.output.data)) + row_.output_offset;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      store_vector<Group::kRunLanes>(output + row_.start + piece_begin_, piece_length_, vector(k),
                                     kernel_problem_.output_rows_are_aligned, values[k]);
    }
    if (exists_ && !problem.packing.is_packed) {
      const auto padding = narrow<output_t>(padding_value<float>(problem.operation, row_));
      const int64_t thread = int64_t{group_.piece()} * group_.threads() + group_.thread();
      const int64_t threads = int64_t{group_.pieces()} * group_.threads();
      fill_columns(output, 0, row_.start, padding, thread, threads);
      fill_columns(output, row_.start + row_.length, problem.cols, padding, thread, threads);
    }
  }

  const Group& group_;
  const KernelProblem& kernel_problem_;
  const Scaling<acc_t> scaling_;
  const bool exists_;
  const Row row_;
  // The piece's part of the valid columns; none where its length is 0. Nothing outside of it is touched, not
  // even as a part of a vector: another block may be writing there, in place.
  const int64_t piece_begin_;
  const int piece_length_;
};

// Step by step: load; the maximum; the exponentials, which take the values' place; the results.
template <class input_t, class output_t, int kVectors, class Group>
class ForwardRow : public RegisterRow<input_t, output_t, kVectors, Group> {
  using Base = RegisterRow<input_t, output_t, kVectors, Group>;
  using Base::kElems, Base::present, Base::scaling_;

 public:
  using typename Base::acc_t;

  MASKED_SOFTMAX_DEVICE ForwardRow(const Group& group, const KernelProblem& kernel_problem, int64_t index)
      : Base(group, kernel_problem, index, std::integral_constant<int, 1>()) {}

  // Returns the largest of this thread's values.
  MASKED_SOFTMAX_DEVICE acc_t load() {
    constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
    Base::load(0, values_);
    acc_t largest = kNone;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        values_[k][i] = i < present(k) ? values_[k][i] * scaling_.factor : kNone;
        largest = larger(largest, values_[k][i]);
      }
    }
    return largest;
  }

  MASKED_SOFTMAX_DEVICE Sum<acc_t> take_exponentials(acc_t row_max) {
    Sum<acc_t> sum;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        const acc_t e = exponential<Base::Types::kApproximate>(Distance<acc_t>(values_[k][i], row_max), scaling_);
        values_[k][i] = i < present(k) ? e : acc_t{0};
      }
      sum.add(values_[k]);
    }
    return sum;
  }

  // For the logarithm the distances to the maximum take the values' place. A maximum contributes exactly 1 and is
  // counted apart from the rest, so that a row which one element dominates keeps its relative accuracy.
  MASKED_SOFTMAX_DEVICE Sum<acc_t> take_distances(acc_t row_max, acc_t& maxima) {
    Sum<acc_t> rest;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      acc_t terms[kElems];
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        const Distance<acc_t> distance(values_[k][i], row_max);
        terms[i] = i < present(k) && distance.t != 0 ? rest_term(distance, scaling_) : acc_t{0};
        maxima += i < present(k) && distance.t == 0 ? acc_t{1} : acc_t{0};
        values_[k][i] = distance.t;
      }
      rest.add(terms);
    }
    return rest;
  }

  MASKED_SOFTMAX_DEVICE void store_softmax(acc_t sum) {
    const acc_t reciprocal = 1 / sum;
    for_each_value([&](acc_t& value) { value *= reciprocal; });
    Base::store(values_);
  }
  MASKED_SOFTMAX_DEVICE void store_log_softmax(acc_t log_sum) {
    for_each_value([&](acc_t& value) { value = value * scaling_.scale - log_sum; });
    Base::store(values_);
  }

 private:
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void for_each_value(const Visitor& visit) {
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        visit(values_[k][i]);
      }
    }
  }

  typename Base::Values values_;
};

// A gradient: inputs are the incoming gradient g and the saved result y. Zeros stand where there is no element.
template <class input_t, class output_t, int kVectors, class Group>
class BackwardRow : public RegisterRow<input_t, output_t, kVectors, Group> {
  using Base = RegisterRow<input_t, output_t, kVectors, Group>;
  using Base::kElems, Base::scaling_;

 public:
  using typename Base::acc_t;

  MASKED_SOFTMAX_DEVICE BackwardRow(const Group& group, const KernelProblem& kernel_problem, int64_t index)
      : Base(group, kernel_problem, index, std::integral_constant<int, 2>()),
        is_log_(kernel_problem.problem.operation == Operation::kLogSoftmaxBackward) {
    Base::load(0, g_);
    Base::load(1, y_);
  }

  MASKED_SOFTMAX_DEVICE Sum<acc_t> sum() const {
    Sum<acc_t> sum;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      acc_t terms[kElems];
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        terms[i] = is_log_ ? g_[k][i] : g_[k][i] * y_[k][i];
      }
      sum.add(terms);
    }
    return sum;
  }

  MASKED_SOFTMAX_DEVICE void store(acc_t total) {
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        if (is_log_) {
          const acc_t p = exponential_of_log<Base::Types::kApproximate>(y_[k][i], scaling_);
          g_[k][i] = scaling_.scale * (g_[k][i] - p * total);
        } else {
          g_[k][i] = scaling_.scale * y_[k][i] * (g_[k][i] - total);
        }
      }
    }
    Base::store(g_);
  }

 private:
  const bool is_log_;
  typename Base::Values g_;
  typename Base::Values y_;
};

// One row from load to store; its group finds out together what depends on all of it.
template <bool kForward, class input_t, class output_t, int kVectors, class Group>
MASKED_SOFTMAX_DEVICE void register_row(const Group& group, const KernelProblem& kernel_problem, int64_t index) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  if constexpr (kForward) {
    ForwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, index);
    const acc_t row_max = group.max(row.load());
    if (kernel_problem.problem.operation == Operation::kLogSoftmax) {
      acc_t maxima = 0;
      const acc_t rest = group.sum(row.take_distances(row_max, maxima)).total();
      row.store_log_softmax(log_of_sum(rest, group.count(maxima)));
    } else {
      row.store_softmax(group.sum(row.take_exponentials(row_max)).total());
    }
  } else {
    BackwardRow<input_t, output_t, kVectors, Group> row(group, kernel_problem, index);
    row.store(group.sum(row.sum()).total());
  }
}

// kThreads lanes of a warp hold a row; a block holds several rows.
template <bool kForward, class input_t, class output_t, unsigned kThreads, int kVectors>
MASKED_SOFTMAX_KERNEL(kLanesThreads, 4)
lanes_per_row(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  const LaneGroup<kThreads, acc_t> group;
  const int64_t rows_per_block = block_threads() / kThreads;
  const int64_t step = rows_per_block * grid_blocks();
  // The loop's end is the same for all lanes of a warp.
  for (int64_t first = block_index() * rows_per_block; first < kernel_problem.problem.rows; first += step) {
    register_row<kForward, input_t, output_t, kVectors>(group, kernel_problem, first + thread_index() / kThreads);
  }
}

// A block holds a row.
template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kWidestBlock, 1)
block_per_row(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  MASKED_SOFTMAX_SHARED(acc_t, maxima, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_highs, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_lows, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, counts, WarpResults<acc_t>::kMostWarps);
  const BlockGroup<acc_t> group({maxima, sum_highs, sum_lows, counts});
  for (int64_t row = block_index(); row < kernel_problem.problem.rows; row += grid_blocks()) {
    register_row<kForward, input_t, output_t, kVectors>(group, kernel_problem, row);
    group.meet();  // the next row's results go where this one's were read
  }
}

// A cluster of blocks holds a row: one cluster for each row.
template <bool kForward, class input_t, class output_t, int kVectors>
MASKED_SOFTMAX_KERNEL(kWidestBlock, 1)
cluster_per_row(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
#if MASKED_SOFTMAX_HAS_CLUSTERS
  using acc_t = typename RowTypes<input_t, output_t>::acc_t;
  MASKED_SOFTMAX_SHARED(acc_t, maxima, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_highs, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, sum_lows, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, counts, WarpResults<acc_t>::kMostWarps);
  MASKED_SOFTMAX_SHARED(acc_t, of_block, 4);
  const ClusterGroup<acc_t> group({maxima, sum_highs, sum_lows, counts},
                                  {&of_block[0], &of_block[1], &of_block[2], &of_block[3]});
  register_row<kForward, input_t, output_t, kVectors>(group, kernel_problem, block_index() / cluster_size());
  group.leave();
#endif
}

}  // namespace cuda
}  // namespace masked_softmax
