// Rows that a group of threads holds in registers: device memory is read once, whatever the operation.
//
//   forward    softmax      y = e / sum(e),  e = 2^((x - max) * scale * log2(e))
//              log_softmax  y = scale * (x - max) - log(sum(e))
//   backward   softmax      dx = scale * y * (g - sum(g * y))
//              log_softmax  dx = scale * (g - exp(y) * sum(g))
//
// Who holds what. A vector is kElems elements: as many as 16 bytes hold of the narrowest operand. Thread t of the
// group's n holds the vectors t, t + n, t + 2n, ... of the row's valid columns, kVectors of them, counted from the
// first valid column. The group (groups.cuh) is a part of a warp, a warp, a block or a cluster of blocks.
//
// What moves. Forward in float32: 4 bytes read for each valid element, 4 written for each element; padding is written
// and never read. Backward reads twice as much. On paper, 16 bytes in flight for each thread and vector: 2048 threads
// of a multiprocessor with two vectors each are 64 KiB, where an H200 (4.3 TB/s over 132 multiprocessors, 600 ns)
// needs 20 KiB.
//
// Sums and exponentials: float32 (float64 where an operand is float64). The sum is kept with its rounding error, and a
// row's order of summation depends on its length, its types and the strategy alone.
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

// The number of the k-th vector that this thread holds.
template <class Group>
MASKED_SOFTMAX_DEVICE int64_t vector_index(const Group& group, int k) {
  return int64_t{k} * group.threads() + group.thread();
}

// How many of a vector's elements lie within the row's valid columns.
template <int kElems>
MASKED_SOFTMAX_DEVICE int elems_present(int64_t length, int64_t vector) {
  const int64_t rest = length - vector * kElems;
  return rest < kElems ? static_cast<int>(rest < 0 ? 0 : rest) : kElems;
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

// The padding of one row.
template <class output_t, class Group>
MASKED_SOFTMAX_DEVICE void fill_padding(const Group& group, output_t* row_begin, int64_t cols, const Row& row,
                                        Operation operation) {
  const auto value = narrow<output_t>(padding_value<float>(operation, row));
  fill_columns(row_begin, 0, row.start, value, group.thread(), group.threads());
  fill_columns(row_begin, row.start + row.length, cols, value, group.thread(), group.threads());
}

// Row `index` of the problem; none where it is beyond the last one.
template <class input_t, class output_t, int kVectors, class Group>
MASKED_SOFTMAX_DEVICE void forward_row(const Group& group, const KernelProblem& kernel_problem, int64_t index) {
  using Types = RowTypes<input_t, output_t>;
  using acc_t = typename Types::acc_t;
  constexpr int kElems = Types::kElems;
  constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
  const Problem& problem = kernel_problem.problem;
  const Scaling<acc_t> scaling(kernel_problem);
  const bool exists = index < problem.rows;
  const Row row = exists ? find_row<1>(kernel_problem, index) : Row{};
  const input_t* input = static_cast<const input_t*>(problem.inputs[0].data) + row.input_offsets[0] + row.start;
  output_t* output = static_cast<output_t*>(problem.output.data) + row.output_offset;

  acc_t values[kVectors][kElems];
  acc_t row_max = kNone;
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors; ++k) {
    const int64_t vector = vector_index(group, k);
    load_vector(input, row.length, vector, values[k]);
    const int present = elems_present<kElems>(row.length, vector);
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kElems; ++i) {
      values[k][i] = i < present ? values[k][i] * scaling.factor : kNone;
      row_max = larger(row_max, values[k][i]);
    }
  }
  row_max = group.max(row_max);

  if (problem.operation == Operation::kLogSoftmax) {
    // The distances to the maximum take the values' place. A maximum contributes exactly 1 and is counted apart from
    // the rest, so that a row which one element dominates keeps its relative accuracy.
    Sum<acc_t> rest;
    acc_t maxima = 0;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int present = elems_present<kElems>(row.length, vector_index(group, k));
      acc_t terms[kElems];
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        const acc_t value = values[k][i];
        const acc_t t = value - row_max;
        const acc_t part = t - value;
        const acc_t error = (value - (t - part)) - (row_max + part);
        const acc_t correction = fused_multiply_add(t, scaling.exponent_low, error * scaling.exponent);
        const acc_t e = exp2_product<kRestBias>(t, scaling.exponent, correction);
        terms[i] = i < present && t != 0 ? e : acc_t{0};
        maxima += i < present && t == 0 ? acc_t{1} : acc_t{0};
        values[k][i] = t;
      }
      rest.add(terms);
    }
    const acc_t log_sum = log_of_sum(group.sum(rest).total(), group.count(maxima));
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        values[k][i] = values[k][i] * scaling.scale - log_sum;
      }
    }
  } else {
    Sum<acc_t> sum;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int present = elems_present<kElems>(row.length, vector_index(group, k));
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        const acc_t e = exponential<Types::kApproximate>(values[k][i] - row_max, scaling);
        values[k][i] = i < present ? e : acc_t{0};
      }
      sum.add(values[k]);
    }
    const acc_t reciprocal = 1 / group.sum(sum).total();
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kElems; ++i) {
        values[k][i] *= reciprocal;
      }
    }
  }

  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors; ++k) {
    store_vector<Group::kRunLanes>(output + row.start, row.length, vector_index(group, k),
                                   kernel_problem.output_rows_are_aligned, values[k]);
  }
  if (exists) {
    fill_padding(group, output, problem.cols, row, problem.operation);
  }
}

// The same for a gradient: inputs are the incoming gradient g and the saved result y.
template <class input_t, class output_t, int kVectors, class Group>
MASKED_SOFTMAX_DEVICE void backward_row(const Group& group, const KernelProblem& kernel_problem, int64_t index) {
  using Types = RowTypes<input_t, output_t>;
  using acc_t = typename Types::acc_t;
  constexpr int kElems = Types::kElems;
  const Problem& problem = kernel_problem.problem;
  const Scaling<acc_t> scaling(kernel_problem);
  const bool is_log = problem.operation == Operation::kLogSoftmaxBackward;
  const bool exists = index < problem.rows;
  const Row row = exists ? find_row<2>(kernel_problem, index) : Row{};
  const input_t* g_row = static_cast<const input_t*>(problem.inputs[0].data) + row.input_offsets[0] + row.start;
  const input_t* y_row = static_cast<const input_t*>(problem.inputs[1].data) + row.input_offsets[1] + row.start;
  output_t* output = static_cast<output_t*>(problem.output.data) + row.output_offset;

  // Zeros where there is no element.
  acc_t g[kVectors][kElems];
  acc_t y[kVectors][kElems];
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors; ++k) {
    load_vector(g_row, row.length, vector_index(group, k), g[k]);
    load_vector(y_row, row.length, vector_index(group, k), y[k]);
  }

  Sum<acc_t> sum;
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors; ++k) {
    acc_t terms[kElems];
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kElems; ++i) {
      terms[i] = is_log ? g[k][i] : g[k][i] * y[k][i];
    }
    sum.add(terms);
  }
  const acc_t total = group.sum(sum).total();

  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors; ++k) {
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kElems; ++i) {
      if (is_log) {
        const acc_t p = exponential_of_log<Types::kApproximate>(y[k][i], scaling);
        g[k][i] = scaling.scale * (g[k][i] - p * total);
      } else {
        g[k][i] = scaling.scale * y[k][i] * (g[k][i] - total);
      }
    }
    store_vector<Group::kRunLanes>(output + row.start, row.length, vector_index(group, k),
                                   kernel_problem.output_rows_are_aligned, g[k]);
  }
  if (exists) {
    fill_padding(group, output, problem.cols, row, problem.operation);
  }
}

template <bool kForward, class input_t, class output_t, int kVectors, class Group>
MASKED_SOFTMAX_DEVICE void register_row(const Group& group, const KernelProblem& kernel_problem, int64_t index) {
  if constexpr (kForward) {
    forward_row<input_t, output_t, kVectors>(group, kernel_problem, index);
  } else {
    backward_row<input_t, output_t, kVectors>(group, kernel_problem, index);
  }
}

// kThreads lanes of a warp hold a row; a block holds several rows.
template <bool kForward, class input_t, class output_t, unsigned kThreads, int kVectors>
MASKED_SOFTMAX_KERNEL(kLanesThreads)
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
MASKED_SOFTMAX_KERNEL(kWidestBlock)
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
MASKED_SOFTMAX_KERNEL(kWidestBlock)
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
