// Rows of any layout and any types, for every operation: element by element, all read again for every sweep.
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
// block, 8 MiB for 132 multiprocessors (an H200 has 60 MiB).
//
// On paper (as compiled for 9.0): 114 to 123 registers (168 for column_rows in float64), 1.5 to 5 KiB of shared memory,
// two blocks of 256 threads, with 16 KiB in flight of the 20 KiB that an H200 asks for. column_rows: 0.6 of a copy at
// best, as the elements come one by one. strided_rows, where neighbours are not in one line: the line's share, 1/8 for
// float32 with a stride of 8.
//
// Formulas: Operation in common/problem.h. Everything runs in acc_t; extreme scales come here in float64.
#pragma once

#include "cuda/exp2.cuh"
#include "cuda/groups.cuh"
#include "cuda/row.cuh"

namespace masked_softmax {
namespace cuda {

template <class T>
struct As {
  using type = T;
};

MASKED_SOFTMAX_DEVICE bool is_16_bit(ElementType type) {
  return type == ElementType::kBFloat16 || type == ElementType::kFloat16;
}

constexpr int kMostVectorElems = 8;

// The columns of one of SumOrder's vectors.
template <class acc_t>
using VectorValues = acc_t[kMostVectorElems];

// `count` elements from `offset` on, zeros behind them. The type is looked at once for all, so that their loads are
// under way together.
template <class acc_t>
MASKED_SOFTMAX_DEVICE void load_elements(const Operand& operand, int64_t offset, int count,
                                         VectorValues<acc_t>& values) {
  const auto load_as = [&](auto convert) MASKED_SOFTMAX_DEVICE_LAMBDA {
    const auto* first = in_device_memory(static_cast<const typename decltype(convert)::type*>(operand.data)) + offset;
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kMostVectorElems; ++i) {
      values[i] = i < count ? static_cast<acc_t>(widen(first[i * operand.col_stride])) : acc_t{0};
    }
  };
  switch (operand.type) {
    case ElementType::kFloat64: load_as(As<double>()); break;
    case ElementType::kBFloat16: load_as(As<bfloat16_t>()); break;
    case ElementType::kFloat16: load_as(As<float16_t>()); break;
    case ElementType::kInt8: load_as(As<int8_t>()); break;
    case ElementType::kUInt8: load_as(As<uint8_t>()); break;
    case ElementType::kBool: load_as(As<bool8_t>()); break;
    case ElementType::kInt16: load_as(As<int16_t>()); break;
    case ElementType::kInt32: load_as(As<int32_t>()); break;
    case ElementType::kInt64: load_as(As<int64_t>()); break;
    default: load_as(As<float>()); break;
  }
}

template <class acc_t>
MASKED_SOFTMAX_DEVICE void store_elements(const Operand& operand, int64_t offset, int count,
                                          const VectorValues<acc_t>& values) {
  const auto store_as = [&](auto convert) MASKED_SOFTMAX_DEVICE_LAMBDA {
    using T = typename decltype(convert)::type;
    T* const first = in_device_memory(static_cast<T*>(operand.data)) + offset;
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kMostVectorElems; ++i) {
      if (i < count) {
        const T narrowed = narrow<T>(values[i]);  // the emulator does not see a store of what a call returns
        first[i * operand.col_stride] = narrowed;
      }
    }
  };
  switch (operand.type) {
    case ElementType::kFloat64: store_as(As<double>()); break;
    case ElementType::kBFloat16: store_as(As<bfloat16_t>()); break;
    case ElementType::kFloat16: store_as(As<float16_t>()); break;
    default: store_as(As<float>()); break;
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
    if (is_forward(problem_.operation)) {
      forward();
    } else {
      derivative();
    }
    if (exists_ && !problem_.packing.is_packed) {
      fill_padding();
    }
  }

 private:
  using Values = VectorValues<acc_t>;
  static constexpr bool kCanApproximate = std::is_same_v<acc_t, float>;

  // Valid columns [first, first + count).
  MASKED_SOFTMAX_DEVICE void load(int k, int64_t first, int count, Values& values) const {
    const Operand& operand = problem_.inputs[k];
    load_elements(operand, row_.input_offsets[k] + (row_.start + first) * operand.col_stride, count, values);
  }
  MASKED_SOFTMAX_DEVICE void store(int64_t first, int count, const Values& values) const {
    const Operand& operand = problem_.output;
    store_elements(operand, row_.output_offset + (row_.start + first) * operand.col_stride, count, values);
  }

  MASKED_SOFTMAX_DEVICE int count_from(int64_t first) const {
    const int64_t rest = row_.length - first;
    return rest < order_.elems ? static_cast<int>(rest < 0 ? 0 : rest) : order_.elems;
  }

  // Calls visit(first, count) for this thread's share of the valid columns, a vector at a time.
  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void for_each_vector(const Visitor& visit) const {
    const int64_t step = int64_t{group_.threads()} * order_.elems;
    for (int64_t first = int64_t{group_.thread()} * order_.elems; first < row_.length; first += step) {
      visit(first, count_from(first));
    }
  }

  // The sum over the valid columns. compute_terms(first, count, terms) replaces the terms, zeros, of those that there
  // are. All threads of a block take as many turns, whatever their rows.
  template <class ComputeTerms>
  MASKED_SOFTMAX_DEVICE acc_t sum(const ComputeTerms& compute_terms) const {
    Sum<acc_t> sum;
    for (int64_t piece = 0; piece < problem_.longest(); piece += order_.piece_elems()) {
      sum.add(group_.sum(part_of_piece(piece, compute_terms)));
      group_.meet();  // before the results' memory is used again
    }
    return sum.total();
  }

  // What this thread adds to the piece that begins with valid column `piece`. It has the part of one thread of the
  // order, or those of a few that follow one another.
  template <class ComputeTerms>
  MASKED_SOFTMAX_DEVICE Sum<acc_t> part_of_piece(int64_t piece, const ComputeTerms& compute_terms) const {
    TreeSum<acc_t, Group::kSumLevels> sums;
    const unsigned parts = parts_of_thread();
    for (unsigned i = 0; i < parts; ++i) {
      const unsigned thread = group_.thread() * parts + i;
      Sum<acc_t> sum;
      for (int k = 0; thread < static_cast<unsigned>(order_.threads) && k < order_.vectors; ++k) {
        const int64_t first = piece + (int64_t{k} * order_.threads + thread) * order_.elems;
        Values terms = {};
        compute_terms(first, count_from(first), terms);
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

  MASKED_SOFTMAX_DEVICE acc_t exp_of_distance(const Distance<acc_t>& distance) const {
    return approximate_ ? exponential<kCanApproximate>(distance, scaling_) : exponential<false>(distance, scaling_);
  }
  MASKED_SOFTMAX_DEVICE acc_t exp_of(acc_t y) const {
    return approximate_ ? exponential_of_log<kCanApproximate>(y, scaling_) : exponential_of_log<false>(y, scaling_);
  }

  // See ForwardRow in register_rows.cuh.
  MASKED_SOFTMAX_DEVICE void forward() const {
    const bool is_log = problem_.operation == Operation::kLogSoftmax;
    acc_t largest = -std::numeric_limits<acc_t>::infinity();
    for_each_vector([&](int64_t first, int count) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kMostVectorElems; ++i) {
        largest = i < count ? larger(largest, x[i] * scaling_.factor) : largest;
      }
    });
    const acc_t row_max = group_.max(largest);

    acc_t maxima = 0;
    const acc_t total = sum([&](int64_t first, int count, Values& terms) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kMostVectorElems; ++i) {
        const Distance<acc_t> distance(x[i] * scaling_.factor, row_max);
        const bool is_maximum = is_log && i < count && distance.t == 0;
        maxima += is_maximum ? acc_t{1} : acc_t{0};
        if (i < count && !is_maximum) {
          terms[i] = is_log ? rest_term(distance, scaling_) : exp_of_distance(distance);
        }
      }
    });
    const acc_t log_sum = is_log ? log_of_sum(total, group_.count(maxima)) : acc_t{0};
    const acc_t reciprocal = 1 / total;
    for_each_vector([&](int64_t first, int count) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Values x;
      load(0, first, count, x);
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kMostVectorElems; ++i) {
        const Distance<acc_t> distance(x[i] * scaling_.factor, row_max);
        x[i] = is_log ? distance.t * scaling_.scale - log_sum : exp_of_distance(distance) * reciprocal;
      }
      store(first, count, x);
    });
  }

  // The inputs of a derivative, in Operation's order; zeros where it has fewer.
  struct Inputs {
    Values a;
    Values b;
    Values c = {};
  };
  MASKED_SOFTMAX_DEVICE void load_inputs(int64_t first, int count, Inputs& in) const {
    load(0, first, count, in.a);
    load(1, first, count, in.b);
    if (problem_.input_count > 2) {
      load(2, first, count, in.c);
    }
  }

  // What is summed over the row.
  MASKED_SOFTMAX_DEVICE acc_t term(const Inputs& in, int i) const {
    switch (problem_.operation) {
      case Operation::kSoftmaxBackward: return in.a[i] * in.b[i];
      case Operation::kLogSoftmaxBackward: return in.a[i];
      case Operation::kLogSoftmaxJvp: return in.a[i] * exp_of(in.b[i]);
      case Operation::kSoftmaxBackwardWrtY:
      case Operation::kSoftmaxBackwardJvpWrtY: return in.b[i] * in.c[i];
      case Operation::kLogSoftmaxJvpJvpWrtY: return in.a[i] * in.b[i] * exp_of(in.c[i]);
      default: return in.b[i];  // kLogSoftmaxBackwardWrtY
    }
  }

  // What the second sum, if there is one, is of.
  MASKED_SOFTMAX_DEVICE acc_t second_term(const Inputs& in, int i) const {
    return in.a[i] * (problem_.operation == Operation::kSoftmaxBackwardWrtY ? in.c[i] : in.b[i]);
  }

  // first, second: the sums of the terms.
  MASKED_SOFTMAX_DEVICE acc_t result(const Inputs& in, int i, acc_t first, acc_t second) const {
    const acc_t scale = scaling_.scale;
    switch (problem_.operation) {
      case Operation::kSoftmaxBackward: return scale * in.b[i] * (in.a[i] - first);
      case Operation::kLogSoftmaxBackward: return scale * (in.a[i] - exp_of(in.b[i]) * first);
      case Operation::kLogSoftmaxJvp: return scale * (in.a[i] - first);
      case Operation::kSoftmaxBackwardWrtY: return scale * (in.a[i] * (in.b[i] - first) - in.b[i] * second);
      case Operation::kSoftmaxBackwardJvpWrtY: return scale * (in.a[i] * (in.b[i] - first) - in.c[i] * second);
      case Operation::kLogSoftmaxJvpJvpWrtY: return -(scale * first);
      default: return -(scale * (in.a[i] * exp_of(in.c[i]) * first));
    }
  }

  MASKED_SOFTMAX_DEVICE void derivative() const {
    const auto sum_of = [&](bool is_second) MASKED_SOFTMAX_DEVICE_LAMBDA {
      return sum([&](int64_t first, int count, Values& terms) MASKED_SOFTMAX_DEVICE_LAMBDA {
        Inputs in;
        load_inputs(first, count, in);
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < kMostVectorElems; ++i) {
          if (i < count) {
            terms[i] = is_second ? second_term(in, i) : term(in, i);
          }
        }
      });
    };
    // One place in the code for both sums.
    acc_t sums[2] = {0, 0};
    const bool has_second = problem_.operation == Operation::kSoftmaxBackwardWrtY ||
                            problem_.operation == Operation::kSoftmaxBackwardJvpWrtY;
    for (int s = 0; s < (has_second ? 2 : 1); ++s) {
      const acc_t found = sum_of(s == 1);
      sums[0] = s == 0 ? found : sums[0];
      sums[1] = found;
    }
    for_each_vector([&](int64_t first, int count) MASKED_SOFTMAX_DEVICE_LAMBDA {
      Inputs in;
      load_inputs(first, count, in);
      Values results;
      MASKED_SOFTMAX_UNROLL
      for (int i = 0; i < kMostVectorElems; ++i) {
        results[i] = result(in, i, sums[0], sums[1]);
      }
      store(first, count, results);
    });
  }

  MASKED_SOFTMAX_DEVICE void fill_padding() const {
    Values padding;
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kMostVectorElems; ++i) {
      padding[i] = padding_value<acc_t>(problem_.operation, row_);
    }
    for (int64_t col = group_.thread(); col < problem_.cols; col += group_.threads()) {
      if (col < row_.start || col >= row_.start + row_.length) {
        store(col - row_.start, 1, padding);
      }
    }
  }

  const Group& group_;
  const Problem& problem_;
  const SumOrder& order_;
  const Scaling<acc_t> scaling_;
  const bool approximate_;  // as RowTypes in register_rows.cuh does
  const bool exists_;
  const Row row_;
};

template <class acc_t, unsigned kThreads>
MASKED_SOFTMAX_KERNEL(kStridedThreads, 2)
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
MASKED_SOFTMAX_KERNEL(kStridedThreads, 2)
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
MASKED_SOFTMAX_KERNEL(kStridedThreads, sizeof(acc_t) == 8 ? 1 : 2)
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
