// Plain columns: rows with unit row stride (the softmax dimension is not the last), held in registers, so that the
// scores are read once. column_rows in strided_rows.cuh takes the others: longer rows, other types and layouts, starts.
//
// Who holds what. A lane of a warp has one row, so a warp loads 32 adjacent elements of a column at a time. `warps`
// warps share 32 rows; each of their lanes holds the elements of kSlots consecutive threads of SumOrder
// (launch_plan.h), so sums have the same order as in held rows, and results the same bits:
//
//   order's thread       0    1    2    3    4    5    6    7    8   ...
//   held by              |----- warp 0 -----|----- warp 1 -----|-----    kSlots = 4: slots 0, 1, 2, 3 of each lane
//
// The computation is that of held rows (Forward and Backward in held_rows.cuh), where each of a lane's slots is one of
// kRowCount rows. Each slot has its partials, which ColumnSlots::reduce() adds to the row's total.
//
// Bytes moved, accumulation type: as held rows. Loads and stores are of single elements, because adjacent rows have
// different lengths. A warp skips vectors in which none of its 32 rows has a valid element.
//
// Preconditions: are_plain_columns() in kernel_problem.h, holds_columns() in launch_plan.h; input and output have one
// type.
#pragma once

#include "cuda/held_rows.cuh"

namespace masked_softmax::cuda {

// The lanes that share a row: one of each of warps() warps.
template <class T, int kSlots>
class ColumnSlots {
  using acc_t = typename RowTypes<T, T>::acc_t;
  static constexpr unsigned kMaxWarps = kWarpThreads / kSlots;
  static constexpr int kVectorsOfOneThread = kLanesSteps[0].elems_per_thread / RowTypes<T, T>::kElems;
  static_assert(kLanesSteps[0].threads_per_row == 1 && kVectorsOfOneThread <= 2 && kVectorsOfOneThread <= kSlots,
                "two vectors have the same sum in two slots as in one");

 public:
  static constexpr unsigned kBlockThreads = kMaxWarps * kWarpThreads;

  MASKED_SOFTMAX_DEVICE explicit ColumnSlots(const KernelProblem& kernel_problem)
      : has_one_thread_(kernel_problem.order.threads == 1),
        shift_(kernel_problem.column_shift),
        block_warp_(static_cast<unsigned>(warp_max(static_cast<int>(thread_index() / kWarpThreads)))) {}

  // The row's number among the block's, and the warp's among those that share it.
  MASKED_SOFTMAX_DEVICE unsigned row() const {
    return (block_warp_ >> shift_) * kWarpThreads + thread_index() % kWarpThreads;
  }
  MASKED_SOFTMAX_DEVICE unsigned rows() const { return kBlockThreads >> shift_; }
  MASKED_SOFTMAX_DEVICE unsigned warp() const { return block_warp_ & (warps() - 1); }
  MASKED_SOFTMAX_DEVICE unsigned warps() const { return 1u << shift_; }

  MASKED_SOFTMAX_DEVICE void release() const {}

  // Sets all slots' partials to the row's total.
  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce(Partial (&partials)[kSlots]) const {
    Partial total = has_one_thread_ ? total_of<0, kVectorsOfOneThread>(partials) : total_of<0, kSlots>(partials);
    if (shift_ > 0) {
      lane_partials_.store(thread_index(), total);
      sync_block();
      total = total_of_warps<kMaxWarps, Partial>();
    }
    MASKED_SOFTMAX_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      partials[slot] = total;
    }
  }

 private:
  // Of slots [kFirst, kFirst + kCount), in a binary tree.
  template <int kFirst, int kCount, class Partial>
  MASKED_SOFTMAX_DEVICE static Partial total_of(const Partial (&partials)[kSlots]) {
    Partial total = partials[kFirst];
    if constexpr (kCount > 1) {
      total = total_of<kFirst, kCount / 2>(partials);
      total.combine(total_of<kFirst + kCount / 2, kCount / 2>(partials));
    }
    return total;
  }

  // Of all warps that share the row, at most kWarps, in a binary tree.
  template <unsigned kWarps, class Partial>
  MASKED_SOFTMAX_DEVICE Partial total_of_warps() const {
    if constexpr (kWarps > 1) {
      if (warps() < kWarps) {
        return total_of_warps<kWarps / 2, Partial>();
      }
    }
    return total_from<kWarps, Partial>(thread_index() - warp() * kWarpThreads);
  }
  template <unsigned kWarps, class Partial>
  MASKED_SOFTMAX_DEVICE Partial total_from(unsigned thread) const {
    if constexpr (kWarps == 1) {
      return lane_partials_.template load<Partial>(thread);
    } else {
      Partial total = total_from<kWarps / 2, Partial>(thread);
      total.combine(total_from<kWarps / 2, Partial>(thread + kWarps / 2 * kWarpThreads));
      return total;
    }
  }

  const bool has_one_thread_;
  const unsigned shift_;       // log2(warps())
  const unsigned block_warp_;  // the warp's number in the block
  const PartialSlots<acc_t> lane_partials_ = shared_slots<acc_t, static_cast<int>(kBlockThreads)>();
};

// A lane's share of a row: HeldRows' interface.
template <class T, int kInputs, int kSlots>
class ColumnRow {
 public:
  using Types = RowTypes<T, T>;
  using acc_t = typename Types::acc_t;
  static constexpr int kElems = Types::kElems;
  static constexpr int kRowCount = kSlots;
  static constexpr bool kMayHaveSinks = false;
  static constexpr bool takes(Operation /*operation*/) { return true; }
  static constexpr int kVectors = kColumnThreadElems / kElems;
  using Values = acc_t[kVectors][kElems];

  // Begins the loads.
  MASKED_SOFTMAX_DEVICE ColumnRow(const KernelProblem& kernel_problem, const ColumnSlots<T, kSlots>& slots,
                                  const PlainRow& row, uint32_t absent)
      : length_(row.length),
        longest_(warp_max(row.length)),
        cols_(static_cast<int>(kernel_problem.problem.cols)),
        first_(static_cast<int>(slots.warp()) * kSlots * kElems),
        vector_stride_((kernel_problem.order.threads > kSlots ? kernel_problem.order.threads : kSlots) * kElems),
        output_(row.at(static_cast<T*>(kernel_problem.problem.output.data), kernel_problem.plain_rows.output)),
        output_stride_(kernel_problem.plain_rows.output.col) {
    MASKED_SOFTMAX_UNROLL
    for (int input = 0; input < kInputs; ++input) {
      const PlainRows::Strides& strides = kernel_problem.plain_rows.inputs[input];
      const T* const x = row.at(static_cast<const T*>(kernel_problem.problem.inputs[input].data), strides);
      MASKED_SOFTMAX_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        MASKED_SOFTMAX_UNROLL
        for (int k = 0; k < kVectors; ++k) {
          const int first = first_ + k * vector_stride_;
          const T* const vector = add_strides(x, strides.col, first + slot * kElems);
          MASKED_SOFTMAX_UNROLL
          for (int i = 0; i < kElems; ++i) {
            const bool is_valid = slot * kElems + i < length_ - first;
            words_[input][slot][k][i] = load_elem_if(is_valid, add_strides(vector, strides.col, i), absent);
          }
        }
      }
    }
  }

  MASKED_SOFTMAX_DEVICE acc_t value(int slot, int input, int k, int i) const {
    return unpack<T>(words_[input][slot][k][i], 0);
  }
  MASKED_SOFTMAX_DEVICE bool is_single(int /*slot*/) const { return length_ == 1; }

  template <class Visitor>
  MASKED_SOFTMAX_DEVICE void for_each_vector(int slot, const Visitor& visit) const {
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      if (is_active(slot, k)) {
        visit(k);
      }
    }
  }

  template <class Result>
  MASKED_SOFTMAX_DEVICE void store(const KernelProblem& kernel_problem, int slot, bool is_absent_padding,
                                   const Result& result) const {
    const auto padding = padding_of<acc_t>(kernel_problem, length_ != kInvalidLength);
    const bool selects_padding = any_in_warp(!is_absent_padding);
    const bool exists = length_ != kNoRow;
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int first = first_ + k * vector_stride_;
      const int first_elem = slot * kElems;
      acc_t values[kElems];
      if (is_active(slot, k)) {
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < kElems; ++i) {
          values[i] = result(k, i);
        }
        if (selects_padding) {
          const int length = optimization_barrier(length_);
          MASKED_SOFTMAX_UNROLL
          for (int i = 0; i < kElems; ++i) {
            values[i] = first_elem + i < length - first ? values[i] : padding;
          }
        }
      } else {
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < kElems; ++i) {
          values[i] = padding;
        }
      }
      T* const vector = add_strides(output_, output_stride_, first + first_elem);
      const int rest = cols_ - first;
      if (first_elem + kElems <= rest) {
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < kElems; ++i) {
          store_elem_if(exists, add_strides(vector, output_stride_, i), narrow<T>(values[i]));
        }
      } else {
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < kElems; ++i) {
          store_elem_if(exists && first_elem + i < rest, add_strides(vector, output_stride_, i), narrow<T>(values[i]));
        }
      }
    }
  }

 private:
  // Slot s's vector k begins at column first_ + k * vector_stride_ + s * kElems.
  MASKED_SOFTMAX_DEVICE bool is_active(int slot, int k) const {
    return slot * kElems < longest_ - (first_ + k * vector_stride_);
  }

  const int length_;
  const int longest_;  // of the warp's rows
  const int cols_;
  const int first_;
  const int vector_stride_;
  T* const output_;
  const int output_stride_;  // bytes
  uint32_t words_[kInputs][kSlots][kVectors][kElems];
};

template <bool kForward, class T>
MASKED_SOFTMAX_KERNEL(column_block_threads(kForward ? 1 : 2),
                      kColumnThreadsPerSm / column_block_threads(kForward ? 1 : 2))
plain_columns(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
  constexpr int kInputs = kForward ? 1 : 2;
  constexpr int kSlots = column_slots(kInputs);
  const ColumnSlots<T, kSlots> slots(kernel_problem);
  const T absent_elem = absent_value<kForward, T>(kernel_problem);
  uint32_t absent = 0;
  memcpy(&absent, &absent_elem, sizeof(T));
  const PlainRow row(kernel_problem, block_index() * slots.rows() + slots.row());
  const ColumnRow<T, kInputs, kSlots> rows(kernel_problem, slots, row, absent);
  compute_rows<kForward, false>(slots, kernel_problem, rows);
}

template <bool kForward, class input_t, class output_t>
Status launch_plain_columns(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  if constexpr (std::is_same_v<input_t, output_t>) {
    return launch(plain_columns<kForward, input_t>, plan, stream, kernel_problem);
  } else {
    return kInvalidLaunch;
  }
}

}  // namespace masked_softmax::cuda
