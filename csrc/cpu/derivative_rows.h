// Runs the derivatives of contiguous rows whose operands are in the caches, one row at a time.
//
// A derivative has few operations for each element, so the processor overlaps a row's results with the next row's sums
// by itself, and a block of rows (block_kernel.h) would cost more than the latencies that it hides. From memory, a
// block's prefetches are worth more than that; 16-bit types have more operations, which fill the reorder buffer.
// (Zen 5, November 2026, 256 x 512 floats, ns a row: 59 on full rows and 42 at uniform lengths; in blocks 76 and 54.)
//
// Preconditions: as for block_kernel.h, and cached stores.
#pragma once

#include "cpu/row_block.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// kIsNarrow: rows have at most one tile.
template <class V, Operation kOperation, class T, bool kIsNarrow>
class DerivativeRows {
 public:
  DerivativeRows(const Problem& problem, bool prefetch)
      : problem_(problem), prefetch_(prefetch), scale_(problem.scale) {}

  MASKED_SOFTMAX_NOINLINE void run(int64_t begin, int64_t end) const {
    RowWalker walker(problem_, begin, end);
    for (RowRun run; walker.next(run);) {
      for (int64_t first = 0; first < run.rows; first += kBlockRows) {
        const int count = static_cast<int>(run.rows - first < kBlockRows ? run.rows - first : kBlockRows);
        int64_t starts[kBlockRows];
        int32_t lengths[kBlockRows];
        read_starts_and_lengths(problem_, run, first, count, starts, lengths);
        for (int i = 0; i < count; ++i) {
          run_row(run, first + i, starts[i], lengths[i]);
        }
      }
    }
  }

 private:
  using acc_t = typename V::acc_t;
  static constexpr int kSums = Formula<kOperation>::kSums;

  MASKED_SOFTMAX_INLINE void run_row(const RowRun& run, int64_t i, int64_t start, int64_t length) const {
    DerivativeValue<V, kOperation, T> value{{}, scale_, {}};
    for (int k = 0; k < input_count(kOperation); ++k) {
      value.inputs.rows[k] = static_cast<const T*>(problem_.inputs[k].data) + run.input_offset(k, i) + start;
    }
    T* const valid = static_cast<T*>(problem_.output.data) + run.output_offset(i) + start;
    const int64_t before = problem_.packing.is_packed ? 0 : start;
    const int64_t after = problem_.packing.is_packed ? 0 : problem_.cols - start - length;
    if (prefetch_) {
      prefetch_padding(valid + length, after * int64_t{sizeof(T)});
    }
    const auto term = [&](int64_t j, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
      return derivative_terms<V, kOperation>(load_inputs<V>(value.inputs, j, mask), scale_);
    };
    RowSums<V, kSums> sums;
    if constexpr (kIsNarrow) {
      sums.add_only_tile(length, term);
    } else {
      sums.add_row(length, term);
    }
    for (int s = 0; s < kSums; ++s) {
      value.row_sums[s] = sums.total(s);
    }
    if constexpr (kIsNarrow) {
      if (__builtin_expect(before == 0, 1)) {
        return write_narrow_row<V>(valid, length, length + after, padding_, StoreHint::kCached, value);
      }
    }
    write_row<V>(valid, before, length, after, padding_, StoreHint::kCached, value);
  }

  const Problem& problem_;
  const bool prefetch_;
  const DerivativeScale<acc_t> scale_;
  const acc_t padding_ = optimization_barrier(acc_t{0});  // without it, a loop of stores would become a call of memset
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
