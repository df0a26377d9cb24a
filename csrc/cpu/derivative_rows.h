// Runs the derivatives of contiguous rows whose operands are in the caches, one row at a time.
//
// A derivative has few operations for each element, so the processor overlaps a row's results with the next row's sums
// by itself, and a block of rows (block_kernel.h) would cost more than the latencies that it hides. From memory, a
// block's prefetches are worth more than that; 16-bit types have more operations, which fill the reorder buffer.
// (Zen 5, November 2026, 256 x 512 floats, ns a row: 59 on full rows and 42 at uniform lengths; in blocks 76 and 54.)
//
// Narrow rows have at most one tile, padding included. Their inputs are loaded once and kept in registers, and no
// branch depends on a length, but for one at full tiles of eight vectors. (Zen 5, AVX-512, 1024 x 64 floats at uniform
// lengths, ns a row: 6.8; with a branch for each vector 8.9.)
//
// Preconditions: as for block_kernel.h, and cached stores.
#pragma once

#include "cpu/row_block.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class V, Operation kOperation, class T>
class DerivativeRows {
 public:
  using acc_t = typename V::acc_t;

  DerivativeRows(const Problem& problem, bool prefetch)
      : problem_(problem),
        prefetch_(prefetch),
        scale_(problem.scale),
        padding_(static_cast<acc_t>(problem.padding_value())) {}

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
    sums.add_row(length, term);
    for (int s = 0; s < kSums; ++s) {
      value.row_sums[s] = sums.total(s);
    }
    write_row<V>(valid, before, length, after, padding_, StoreHint::kCached, value);
  }

  const Problem& problem_;
  const bool prefetch_;
  const DerivativeScale<acc_t> scale_;
  const acc_t padding_;  // 0, but a loop that stores a constant 0 would become a call of memset
};

// Vectors are loaded in pairs, because fewer branches are worth more than a vector.
template <class V, Operation kOperation, class T>
MASKED_SOFTMAX_INLINE void run_narrow_derivative_row(const InputRows<T, input_count(kOperation)>& inputs, T* output,
                                                     int32_t length, int32_t cols,
                                                     const DerivativeScale<typename V::acc_t>& scale) {
  constexpr int kSums = Formula<kOperation>::kSums;
  InputVectors<V, input_count(kOperation)> vectors[V::kTileVectors] = {};
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < V::kTileVectors; k += 2) {
    if (k == 0 || cols > k * V::kLanes) {
      vectors[k] = load_inputs<V>(inputs, k * V::kLanes, V::first_n(length, k));
      vectors[k + 1] = load_inputs<V>(inputs, (k + 1) * V::kLanes, V::first_n(length, k + 1));
    }
  }
  // Vectors without elements add zeros. So the count decides nothing but the order of additions, which differs between
  // a full tile and a last one only where a tile has more than four vectors.
  const bool is_full = V::kTileVectors > 4 && length == kTileElems<V>;
  RowSums<V, kSums> sums;
  sums.add_only_tile(kTileElems<V> - (is_full ? 0 : 1), [&](int64_t i, auto /*mask*/) MASKED_SOFTMAX_LAMBDA_INLINE {
    return derivative_terms<V, kOperation>(vectors[i / V::kLanes], scale);
  });
  V totals[kSums];
  for (int s = 0; s < kSums; ++s) {
    totals[s] = V::broadcast(sums.total(s));
  }
  write_narrow_row<V>(output, length, cols, typename V::acc_t{0}, StoreHint::kCached,
                      [&](int64_t i, auto /*mask*/) MASKED_SOFTMAX_LAMBDA_INLINE {
                        return Formula<kOperation>::result(vectors[i / V::kLanes].in, totals, V::broadcast(scale.scale),
                                                           scale.exp);
                      });
}

// Preconditions: rows are not packed, and start at column 0.
template <class V, Operation kOperation, class T>
MASKED_SOFTMAX_NOINLINE void run_narrow_derivative_rows(const Problem& problem, int64_t begin, int64_t end) {
  constexpr int64_t kRowsAtOnce = 256;
  const DerivativeScale<typename V::acc_t> scale(problem.scale);
  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run);) {
    for (int64_t first = 0; first < run.rows; first += kRowsAtOnce) {
      const int64_t count = run.rows - first < kRowsAtOnce ? run.rows - first : kRowsAtOnce;
      int32_t lengths[kRowsAtOnce];
      run.read_lengths(first, count, lengths);
      InputRows<T, input_count(kOperation)> inputs;
      for (int k = 0; k < input_count(kOperation); ++k) {
        inputs.rows[k] = static_cast<const T*>(problem.inputs[k].data) + run.input_offset(k, first);
      }
      T* output = static_cast<T*>(problem.output.data) + run.output_offset(first);
      const auto cols = static_cast<int32_t>(problem.cols);
      for (int64_t i = 0; i < count; ++i) {
        run_narrow_derivative_row<V, kOperation>(inputs, output, lengths[i], cols, scale);
        for (int k = 0; k < input_count(kOperation); ++k) {
          inputs.rows[k] += run.input_step(k);
        }
        output += run.output_step();
      }
    }
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
