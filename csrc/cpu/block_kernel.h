// Runs rows of at most kMaxBlockCols columns, a block of them at a time, pass by pass.
//
// A pass over one short row ends in a reduction whose result the next pass waits for. So each pass runs over all rows
// of a block before the next pass begins: one row's elements are computed while another's are reduced. Between the
// passes softmax's exponentials, each computed once, are kept in a scratch buffer, which stays in L1 or L2.
//
// Narrow rows have at most one tile, padding included, and no loop whose end depends on the length.
//
// Preconditions: rows are contiguous. The output may be the first input.
#pragma once

#include "cpu/row_block.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// The valid elements of a block's rows have at most so many bytes, twice as many where the operands are in L2; a single
// row may have kMaxBlockCols columns. With softmax's exponentials and the output that is 24 KiB for float32 rows
// without padding.
constexpr int64_t kBlockBytes = 8192;
constexpr int64_t kMaxBlockCols = 8192;

// kIsNarrow: rows have at most one tile.
template <class V, Operation kOperation, class T, class U, bool kIsNarrow>
class BlockKernel {
 public:
  using acc_t = typename V::acc_t;

  BlockKernel(const Problem& problem, MemoryHints hints)
      : problem_(problem),
        hints_(hints),
        scale_(problem.scale),
        padding_(static_cast<acc_t>(problem.padding_value())),
        has_sinks_((kIsSoftmax || kIsLogSoftmax) && problem.row_input.data != nullptr) {}

  MASKED_SOFTMAX_NOINLINE void run(int64_t begin, int64_t end) {
    const int64_t max_elems = (hints_.prefetch ? kBlockBytes : 2 * kBlockBytes) / int64_t{sizeof(T)};
    RowWalker walker(problem_, begin, end);
    for (RowRun run; walker.next(run);) {
      for (int64_t first = 0; first < run.rows;) {
        first += next_->template append<kRowRounding>(problem_, run, first, max_elems);
        if (first < run.rows) {
          run_current();
        }
      }
    }
    run_current();
    run_current();  // the last rows, which were in `next`
    if (hints_.store == StoreHint::kNonTemporal) {
      V::store_fence();
    }
  }

 private:
  using Block = RowBlock<V, T, U, input_count(kOperation)>;
  static constexpr bool kIsSoftmax = kOperation == Operation::kSoftmax;
  static constexpr bool kIsLogSoftmax = kOperation == Operation::kLogSoftmax;
  static constexpr bool kHasLogSum = kIsLogSoftmax || kOperation == Operation::kLogSumExp;
  static constexpr int32_t kRowRounding = kTileElems<V>;
  static_assert(kBlockRows * kTileElems<V> <= kMaxBlockCols, "a narrow row stores a vector, even if it is empty");

  // Rows are appended to the next block. Once it is full, the current block is computed, which prefetches the rows of
  // the next; then they change places. At first the current block is empty.
  MASKED_SOFTMAX_NOINLINE void run_current() {
    if constexpr (kIsSoftmax) {
      sum_exponentials(*current_, *next_);
    } else if constexpr (kHasLogSum) {
      find_log_sums(*current_, *next_);
    } else {
      sum_derivative_terms(*current_, *next_);
    }
    write_results(*current_);
    current_->clear();
    std::swap(current_, next_);
  }

  // The sums of term(i, mask) over a row of the block, spread over the lanes.
  template <int kSums, class Term>
  MASKED_SOFTMAX_INLINE void sum_row(Block& block, int row, const Term& term, Prefetcher<Block>& prefetcher) const {
    RowSums<V, kSums> sums;
    if constexpr (!is_reduction(kOperation)) {
      prefetcher.before_row(row);
    }
    if constexpr (kIsNarrow) {
      prefetcher.before_tile();
      sums.add_only_tile(block.lengths[row], term);
    } else {
      sums.add_row(block.lengths[row], term, [&]() MASKED_SOFTMAX_LAMBDA_INLINE { prefetcher.before_tile(); });
    }
    for (int s = 0; s < kSums; ++s) {
      sums.lane_sums(s).store(block.unreduced[s] + row * V::kLanes);
    }
  }

  template <int kSums>
  static void reduce_sums(Block& block) {
    for (int s = 0; s < kSums; ++s) {
      reduce_add_rows<V>(block.unreduced[s], block.rows, block.sums[s]);
    }
  }

  MASKED_SOFTMAX_NOINLINE void sum_exponentials(Block& block, const Block& next) {
    const BlockParams<V> block_params(block, scale_.log2e);
    Prefetcher<Block> prefetcher(block, next, hints_);
    for (int r = 0; r < block.rows; ++r) {
      const auto params = block_params[r];
      const T* const x = block.inputs[0][r];
      acc_t* const e = scratch_ + block.scratch_offsets[r];
      sum_row<1>(
          block, r,
          [&](int64_t i, auto mask)
              MASKED_SOFTMAX_LAMBDA_INLINE { return exponential<V, false>(x + i, params, e + i, mask); },
          prefetcher);
    }
    prefetcher.finish();
    reduce_sums<1>(block);
    acc_t* const sums = block.sums[0];
    bool is_final = !has_sinks_;
    for (int r = 0; r < block.rows; ++r) {
      is_final &= !is_sum_out_of_range(sums[r]) & (block.lengths[r] != 1);
    }
    for (int r = 0; !is_final && r < block.rows; ++r) {
      acc_t* const e = scratch_ + block.scratch_offsets[r];
      if (has_sink(block, r)) {
        add_sink_to_sum(block, r, block_params[r]);
      } else if (is_sum_out_of_range(sums[r])) {
        sums[r] = exponentials_from_maximum(block.inputs[0][r], block.lengths[r], e);
      } else if (block.lengths[r] == 1) {
        e[0] = sums[r] = 1;  // e * (1 / e) is not always 1
      }
      store_weight_of_no_sink(block, r, static_cast<double>(sums[r]));
    }
  }

  // The exponentials relative to the row's maximum, and their sum: for rows whose sum was out of range relative to
  // their reference.
  acc_t exponentials_from_maximum(const T* x, int64_t length, acc_t* e) const {
    return sum_of(x, length, params_from_maximum<V>(max_of_elements<V>(x, length).reduce_max(), scale_.log2e), e);
  }

  MASKED_SOFTMAX_NOINLINE acc_t sum_of(const T* x, int64_t length, const ExponentialParams<acc_t>& params,
                                       acc_t* e) const {
    RowSums<V> sum;
    sum.add_row(length, [&](int64_t i, auto mask)
                            MASKED_SOFTMAX_LAMBDA_INLINE { return exponential<V, true>(x + i, params, e + i, mask); });
    return sum.total(0);
  }

  // Whether row r has a sink: one above -inf.
  bool has_sink(const Block& block, int r) const {
    return has_sinks_ && block.sinks[r] != -std::numeric_limits<double>::infinity();
  }

  // sum: of row r's elements, or its logarithm.
  void store_weight_of_no_sink(const Block& block, int r, double sum) const {
    if (has_sinks_ && !has_sink(block, r)) {
      store_weight(block, r, block.lengths[r] == 0 ? 0 : weight_of_no_sink(sum));
    }
  }

  void store_weight(const Block& block, int r, double weight) const {
    if (problem_.row_result.data != nullptr) {
      store_row_result(problem_.row_result, block.row_numbers[r], weight);
    }
  }

  // Adds the sink's term to the sum of the exponentials, which are relative to `params`.
  MASKED_SOFTMAX_NOINLINE void add_sink_to_sum(Block& block, int r, ExponentialParams<acc_t> params) {
    const T* const x = block.inputs[0][r];
    const int64_t length = block.lengths[r];
    const double sink = block.sinks[r];
    acc_t* const e = scratch_ + block.scratch_offsets[r];
    acc_t& sum = block.sums[0][r];
    if (length == 0) {
      return store_weight(block, r, weight_of_lone_sink(sink));
    }
    if (length == 1 && !is_sum_out_of_range(sum)) {  // as without a sink, e is exactly 1
      e[0] = 1;
      const double term = sink_term(sink, scale_.exact, static_cast<double>(V::element(x)), 0);
      const SumWithSink total = add_sink_term(1, term);
      sum = static_cast<acc_t>(total.sum);
      return store_weight(block, r, total.weight);
    }
    const double weight = add_sink<V>(
        sink, scale_, params, sum, [&] { return max_of_elements<V>(x, length).reduce_max(); },
        [&](const ExponentialParams<acc_t>& from_maximum) { return sum_of(x, length, from_maximum, e); });
    store_weight(block, r, weight);
  }

  // The sum of a row's exponentials, relative to a reference, and the row's maximum, in one pass. Where most of the sum
  // is the maximum's term, its logarithm would be inaccurate (row_kernel.h): such rows take two more passes.
  MASKED_SOFTMAX_NOINLINE void find_log_sums(Block& block, const Block& next) {
    acc_t* const log_sums = block.sums[0];
    if constexpr (kHasFastLogSum<acc_t>) {
      const BlockParams<V> block_params(block, scale_.log2e);
      Prefetcher<Block> prefetcher(block, next, hints_);
      for (int r = 0; r < block.rows; ++r) {
        const auto params = block_params[r];
        const T* const x = block.inputs[0][r];
        V maxima = V::broadcast(-std::numeric_limits<acc_t>::infinity());
        sum_row<1>(
            block, r,
            [&](int64_t i, auto mask)
                MASKED_SOFTMAX_LAMBDA_INLINE { return exponential_and_max<V>(x + i, params, maxima, mask); },
            prefetcher);
        maxima.store(block.unreduced[1] + r * V::kLanes);
      }
      prefetcher.finish();
      reduce_sums<1>(block);
      reduce_max_rows<V>(block.unreduced[1], block.rows, block.maxima);
      log_sums_relative_to_maxima<V>(block.rows, block_params.magic_minus_r(), block.maxima, scale_.exact, log_sums);
    }
    for (int r = 0; r < block.rows; ++r) {
      const int64_t length = block.lengths[r];
      if (length == 0) {
        block.maxima[r] = log_sums[r] = 0;
      } else if (!(kHasFastLogSum<acc_t> && is_log_sum_accurate(log_sums[r]))) {
        block.maxima[r] = max_of_elements<V>(block.inputs[0][r], length).reduce_max();
        log_sums[r] = accurate_log_sum<V>(block.inputs[0][r], length, block.maxima[r], scale_.log2e);
      }
      if (has_sink(block, r)) {
        add_sink_to_log(block, r);
      }
      const double row_max = static_cast<double>(block.maxima[r]);
      store_weight_of_no_sink(block, r, row_max + static_cast<double>(log_sums[r]));
    }
  }

  double logsumexp(const Block& block, int r) const {
    const int64_t length = block.lengths[r];
    return length == 0 ? -std::numeric_limits<double>::infinity()
                       : logsumexp_of(scale_, block.maxima[r], block.sums[0][r],
                                      [&] { return has_nan<V>(block.inputs[0][r], length); });
  }

  MASKED_SOFTMAX_NOINLINE void add_sink_to_log(Block& block, int r) const {
    const int64_t length = block.lengths[r];
    const double sink = block.sinks[r];
    const double weight = length == 0 ? weight_of_lone_sink(sink)
                                      : add_sink_to_log_sum(sink, scale_, block.maxima[r], block.sums[0][r],
                                                            [&] { return has_nan<V>(block.inputs[0][r], length); });
    store_weight(block, r, weight);
  }

  MASKED_SOFTMAX_NOINLINE void sum_derivative_terms(Block& block, const Block& next) {
    constexpr int kSums = Formula<kOperation>::kSums;
    Prefetcher<Block> prefetcher(block, next, hints_);
    for (int r = 0; r < block.rows; ++r) {
      const auto inputs = block.input_rows(r);
      sum_row<kSums>(
          block, r,
          [&](int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
            return derivative_terms<V, kOperation>(load_inputs<V>(inputs, i, mask), scale_);
          },
          prefetcher);
    }
    prefetcher.finish();
    reduce_sums<kSums>(block);
  }

  MASKED_SOFTMAX_NOINLINE void write_results(const Block& block) const {
    for (int r = 0; r < block.rows; ++r) {
      write_result(block, r);
    }
  }

  MASKED_SOFTMAX_INLINE void write_result(const Block& block, int r) const {
    if constexpr (kIsSoftmax) {
      const Probability<V> value{scratch_ + block.scratch_offsets[r], 1 / block.sums[0][r]};
      if constexpr (std::is_same_v<U, bfloat16_t>) {
        if (value.reciprocal == value.reciprocal) {
          return write(block, r, reinterpret_cast<bfloat16_no_nan_t*>(block.outputs[r]), value);
        }
      }
      write(block, r, block.outputs[r], value);
    } else if constexpr (kOperation == Operation::kLogSumExp) {
      store_row_result(problem_.row_result, block.row_numbers[r], logsumexp(block, r));
    } else if constexpr (kOperation == Operation::kRowDot) {
      const acc_t dot = block.lengths[r] > 0 ? scale_.scale * block.sums[0][r] : acc_t{0};
      store_row_result(problem_.row_result, block.row_numbers[r], static_cast<double>(dot));
    } else if constexpr (kIsLogSoftmax) {
      const LogProbability<V, T> value(block.inputs[0][r], block.maxima[r], scale_.scale, block.sums[0][r]);
      write(block, r, block.outputs[r], value);
    } else {
      DerivativeValue<V, kOperation, T> value{block.input_rows(r), scale_, {}};
      for (int s = 0; s < Formula<kOperation>::kSums; ++s) {
        value.row_sums[s] = block.sums[s][r];
      }
      write(block, r, block.outputs[r], value);
    }
  }

  template <class Output, class Value>
  MASKED_SOFTMAX_INLINE void write(const Block& block, int row, Output* output, const Value& value) const {
    const int64_t length = block.lengths[row];
    if constexpr (kIsNarrow) {
      if (__builtin_expect(block.before[row] == 0, 1)) {
        return write_narrow_row<V>(output, length, length + block.after[row], padding_, hints_.store, value);
      }
    }
    write_row<V>(output, block.before[row], length, block.after[row], padding_, hints_.store, value);
  }

  const Problem& problem_;
  const MemoryHints hints_;
  const KernelScale<kOperation, acc_t> scale_;
  const acc_t padding_;
  const bool has_sinks_;
  Block blocks_[2];
  Block* current_ = &blocks_[0];
  Block* next_ = &blocks_[1];
  alignas(64) acc_t scratch_[kIsSoftmax ? kMaxBlockCols : 1];
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
