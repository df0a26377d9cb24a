// A block of rows, and what is found for all of them at once: addresses, bounds, sums, the exponentials' parameters.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/prefetch.h"
#include "cpu/row_kernel.h"
#include "cpu/store_hint.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

constexpr int kBlockRows = 32;

// Of at most kBlockRows rows of the run, from row `first` on. Starts of packed rows may be beyond 32 bits.
MASKED_SOFTMAX_INLINE void read_starts_and_lengths(const Problem& problem, const RowRun& run, int64_t first, int count,
                                                   int64_t* starts, int32_t* lengths) {
  if (problem.starts.is_always_0()) {
    std::fill(starts, starts + count, int64_t{0});
    run.read_lengths(first, count, lengths);
    return;
  }
  RowBounds bounds[kBlockRows];
  run.read_bounds(first, count, bounds);
  for (int i = 0; i < count; ++i) {
    starts[i] = bounds[i].start;
    lengths[i] = static_cast<int32_t>(bounds[i].length());
  }
}

template <class V, class T, class U, int kInputCount>
struct RowBlock {
  using Vector = V;
  using acc_t = typename V::acc_t;
  using input_t = T;
  using output_t = U;
  static constexpr int kInputs = kInputCount;
  static constexpr int kMaxSums = 2;

  int rows = 0;
  int32_t scratch_elems = 0;
  const T* inputs[kInputs][kBlockRows];  // the first valid elements
  U* outputs[kBlockRows];
  int32_t lengths[kBlockRows];
  int32_t before[kBlockRows];  // columns of padding before the valid ones
  int32_t after[kBlockRows];   // columns of padding after the valid ones
  int32_t scratch_offsets[kBlockRows];
  double sinks[kBlockRows];         // only where the problem has them
  int64_t row_numbers[kBlockRows];  // only where the problem has row results
  acc_t maxima[kBlockRows];
  acc_t sums[kMaxSums][kBlockRows];
  alignas(64) acc_t unreduced[kMaxSums][kBlockRows * V::kLanes];  // a vector for each row's sum or maximum

  void clear() { rows = scratch_elems = 0; }

  // Appends rows of the run, from row `first` on, while the block has room. Returns how many. In the scratch buffer
  // a row's elements are rounded up to a multiple of kRounding, and the rows have at most max_elems.
  template <int32_t kRounding>
  MASKED_SOFTMAX_NOINLINE int64_t append(const Problem& problem, const RowRun& run, int64_t first, int64_t max_elems) {
    // No more lengths are read than are likely to be used.
    const int64_t longest = problem.longest() > 0 ? problem.longest() : 1;
    const int64_t likely_rows = 4 + 2 * max_elems / longest;
    const int64_t room = kBlockRows - rows < likely_rows ? kBlockRows - rows : likely_rows;
    const int64_t count = run.rows - first < room ? run.rows - first : room;
    int64_t starts[kBlockRows];
    read_starts_and_lengths(problem, run, first, static_cast<int>(count), starts, lengths + rows);
    int64_t appended = 0;
    int64_t elems = scratch_elems;
    for (int64_t row = rows; row < rows + count; ++row) {  // without branches
      scratch_offsets[row] = static_cast<int32_t>(elems);
      elems += (lengths[row] + kRounding - 1) & -kRounding;
      appended += elems <= max_elems ? 1 : 0;
    }
    if (rows == 0 && appended == 0) {
      appended = 1;
    }
    const bool is_packed = problem.packing.is_packed;
    for (int64_t i = 0; i < appended; ++i) {
      const int64_t row = rows + i;
      for (int k = 0; k < kInputs; ++k) {
        inputs[k][row] = static_cast<const T*>(problem.inputs[k].data) + run.input_offset(k, first + i) + starts[i];
      }
      outputs[row] = static_cast<U*>(problem.output.data) + run.output_offset(first + i) + starts[i];
      before[row] = is_packed ? 0 : static_cast<int32_t>(starts[i]);
      after[row] = is_packed ? 0 : static_cast<int32_t>(problem.cols - starts[i]) - lengths[row];
    }
    for (int64_t i = 0; problem.row_input.data != nullptr && i < appended; ++i) {
      sinks[rows + i] = load_row_input(problem.row_input, run.row_input_offset(first + i));
    }
    for (int64_t i = 0; problem.row_result.data != nullptr && i < appended; ++i) {
      row_numbers[rows + i] = run.first_row + first + i;
    }
    rows += static_cast<int>(appended);
    scratch_elems = appended < count ? scratch_offsets[rows] : static_cast<int32_t>(elems);
    return appended;
  }

  MASKED_SOFTMAX_INLINE InputRows<T, kInputs> input_rows(int row) const {
    InputRows<T, kInputs> result;
    for (int k = 0; k < kInputs; ++k) {
      result.rows[k] = inputs[k][row];
    }
    return result;
  }
};

// While a block is computed, prefetches the next block's inputs: hardware prefetchers stop at the end of a page and
// know nothing of lengths. Also prefetches output lines that would stall the stores behind them. Where stores are
// cached, these are the padding's lines. Otherwise they are the line that a row shares with the next one, which gets
// cached stores, and in the next block the first line of each page, so that its address is in the TLB.
//
// The next block is walked in its own order, whatever the lengths of the rows computed meanwhile, and prefetched into
// L1. (Zen 5, November 2026, 32768 x 512 floats, uniform lengths, ns a row: 85; into L2: 150; each row with the row of
// the same number in the next block: 175.)
template <class Block>
class Prefetcher {
 public:
  MASKED_SOFTMAX_INLINE Prefetcher(const Block& block, const Block& next, MemoryHints hints)
      : block_(block), next_(next), next_rows_(hints.prefetch ? next.rows : 0), hints_(hints) {}

  // Before row `row` of the block is computed.
  MASKED_SOFTMAX_INLINE void before_row(int row) const {
    if (!hints_.prefetch) {
      return;
    }
    const auto* const padding = block_.outputs[row] + block_.lengths[row];
    const int64_t bytes = block_.after[row] * int64_t{sizeof(output_t)};
    if (hints_.store == StoreHint::kCached) {
      return prefetch_padding(padding, bytes);
    }
    const char* const end = reinterpret_cast<const char*>(padding) + bytes;
    if (reinterpret_cast<uintptr_t>(end) % kLineBytes != 0) {
      __builtin_prefetch(end, 1, kIntoL1);
    }
    if (row < next_rows_) {
      prefetch_output_pages(row);
    }
  }

  // Before each tile. Prefetches one tile of the next block: the two blocks have about as many.
  MASKED_SOFTMAX_INLINE void before_tile() {
    if (next_row_ < next_rows_) {
      prefetch_next_tile();
    }
  }

  // After the last row.
  MASKED_SOFTMAX_INLINE void finish() {
    while (next_row_ < next_rows_) {
      prefetch_next_tile();
    }
  }

 private:
  using output_t = typename Block::output_t;
  static constexpr int kElems = kTileElems<typename Block::Vector>;

  MASKED_SOFTMAX_INLINE void prefetch_next_tile() {
    for (int k = 0; k < Block::kInputs; ++k) {
      prefetch_lines(next_.inputs[k][next_row_] + next_col_, kElems * int64_t{sizeof(typename Block::input_t)});
    }
    // Without branches, which would be mispredicted.
    next_col_ += kElems;
    const bool is_row_done = next_col_ >= next_.lengths[next_row_];
    next_col_ = is_row_done ? 0 : next_col_;
    next_row_ += is_row_done ? 1 : 0;
  }

  // (Zen 5, November 2026, pages of 4 KiB, uniform lengths, 16384 x 512 floats: 0.55 of the time.)
  MASKED_SOFTMAX_INLINE void prefetch_output_pages(int row) const {
    const int64_t elems = int64_t{next_.before[row]} + next_.lengths[row] + next_.after[row];
    prefetch_page_starts(next_.outputs[row] - next_.before[row], elems * int64_t{sizeof(output_t)}, 1);
  }

  const Block& block_;
  const Block& next_;
  const int next_rows_;
  const MemoryHints hints_;
  int next_row_ = 0;
  int next_col_ = 0;
};

// The parameters of the exponentials of a block's rows.
template <class V>
class BlockParams {
 public:
  using acc_t = typename V::acc_t;

  template <class Block>
  MASKED_SOFTMAX_INLINE BlockParams(const Block& block, const ScaledLog2e<acc_t>& log2e) : log2e_(log2e) {
    static_assert(kBlockRows % V::kLanes == 0 || V::kLanes % kBlockRows == 0);
    for (int r = 0; r < block.rows; ++r) {
      const auto* const x = block.inputs[0][r];
      const int32_t length = block.lengths[r];
      zero_below_[r] = length > 0 ? row_reference(V::element(x), V::element(x + length - 1)) : 0;
    }
    for (int r = 0; r < block.rows; r += V::kLanes) {
      const auto params = params_from_references<V>(V::load(zero_below_ + r), log2e);
      params.magic_minus_r.store(magic_minus_r_ + r);
      params.zero_below.store(zero_below_ + r);
    }
  }

  MASKED_SOFTMAX_INLINE ExponentialParams<acc_t> operator[](int row) const {
    return {0, magic_minus_r_[row], zero_below_[row], log2e_.high, log2e_.low};
  }
  const acc_t* magic_minus_r() const { return magic_minus_r_; }

 private:
  const ScaledLog2e<acc_t> log2e_;
  alignas(64) acc_t magic_minus_r_[kBlockRows];
  alignas(64) acc_t zero_below_[kBlockRows] = {};
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
