// One row that does not fit the scratch buffer of short_rows.h, tile by tile.
//
// Tiles are read and written in place where the row is contiguous and of the accumulation type. Otherwise they are
// packed into a buffer on the stack, where they take no more of the time than the row's three passes over memory.
//
// Softmax's exponentials wait for their sum in the output where it is written in place and is not the input, which
// params_from_maximum() may still need (exp2.h). Elsewhere they are computed twice: the same values, and no memory
// beyond the output.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"
#include "cpu/staging.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// The tiles of one input.
template <class V>
class TileReader {
 public:
  using acc_t = typename V::acc_t;

  void open(const void* row, const Operand& operand, acc_t input_factor) {
    row_ = row;
    type_ = operand.type;
    stride_ = operand.col_stride;
    input_factor_ = input_factor;
    is_in_place_ = type_ == ElementTraits<acc_t>::kType && stride_ == 1 && input_factor == 1;
  }

  // Valid until the next call.
  const acc_t* tile(int64_t first, int64_t count) {
    const void* const from = element_at(row_, type_, first * stride_);
    if (is_in_place_) {
      return static_cast<const acc_t*>(from);
    }
    pack_row<V>(from, type_, stride_, count, input_factor_, buffer_);
    return buffer_;
  }

 private:
  const void* row_;
  ElementType type_;
  int64_t stride_;
  acc_t input_factor_;
  bool is_in_place_;
  alignas(64) acc_t buffer_[kTileElems<V>];
};

// The tiles of the output.
template <class V>
class TileWriter {
 public:
  using acc_t = typename V::acc_t;

  TileWriter(void* row, const Operand& operand)
      : row_(row),
        type_(operand.type),
        stride_(operand.col_stride),
        is_in_place_(type_ == ElementTraits<acc_t>::kType && stride_ == 1) {}

  bool is_in_place() const { return is_in_place_; }
  acc_t* tile(int64_t first) { return is_in_place_ ? static_cast<acc_t*>(row_) + first : buffer_; }

  // Call after each tile that was written.
  void finish(int64_t first, int64_t count) {
    if (!is_in_place_) {
      unpack_row<V>(buffer_, count, element_at(row_, type_, first * stride_), type_, stride_);
    }
  }

 private:
  void* const row_;
  const ElementType type_;
  const int64_t stride_;
  const bool is_in_place_;
  alignas(64) acc_t buffer_[kTileElems<V>];
};

template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE acc_t tile_max(const acc_t* x, int64_t count) {
  return max_of_elements<V>(x, count).reduce_max();
}

template <class V, bool kHasOffset, class acc_t>
MASKED_SOFTMAX_NOINLINE void tile_exponentials(const acc_t* x, int64_t count, const ExponentialParams<acc_t>& params,
                                               acc_t* e, RowSums<V>& sum) {
  sum.add(count, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    return exponential<typename decltype(tag)::type, kHasOffset, false>(x + i, params, e + i, mask);
  });
}

// The same exponentials without their sum. The offset is 0 if the row needs none, and subtracting 0 changes nothing.
template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE void recompute_tile_exponentials(const acc_t* x, int64_t count,
                                                         const ExponentialParams<acc_t>& params, acc_t* e) {
  for_each_vector<V, V::kGroupVectors>(count, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    exponential<typename decltype(tag)::type, true, false>(x + i, params, e + i, mask);
  });
}

template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE void tile_exponentials_and_max(const acc_t* x, int64_t count,
                                                       const ExponentialParams<acc_t>& params, RowSums<V>& sum,
                                                       V& maxima) {
  V raised = maxima;
  sum.add(count, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    return exponential_and_max<typename decltype(tag)::type>(x + i, params, raised, mask);
  });
  maxima = raised;
}

template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE void tile_rest_and_max_count(const acc_t* x, int64_t count, acc_t row_max,
                                                     const ScaledLog2e<acc_t>& log2e, RowSums<V, 2>& sums) {
  sums.add(count, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    return rest_and_max_count<typename decltype(tag)::type>(x + i, row_max, log2e, mask);
  });
}

template <class V, class acc_t>
acc_t max_of_long_row(TileReader<V>& x, int64_t length) {
  acc_t row_max = -std::numeric_limits<acc_t>::infinity();
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    const acc_t tile = tile_max<V>(x.tile(first, count), count);
    row_max = tile > row_max ? tile : row_max;
  });
  return row_max;
}

template <class V, class acc_t>
ExponentialParams<acc_t> params_of_long_row(TileReader<V>& x, int64_t length, const ForwardScale<acc_t>& scale) {
  const acc_t first = read_element(x.tile(0, 1));
  const acc_t last = read_element(x.tile(length - 1, 1));
  return params_from_reference<V>(row_reference(first, last), scale.log2e);
}

template <class V, class acc_t>
void log_softmax_of_long_row(TileReader<V>& x, TileWriter<V>& y, int64_t length, const ForwardScale<acc_t>& scale) {
  acc_t row_max = 0;
  acc_t log_sum = 0;
  if constexpr (kHasFastLogSum<acc_t>) {
    const auto params = params_of_long_row<V, acc_t>(x, length, scale);
    RowSums<V> sum;
    V maxima = V::broadcast(-std::numeric_limits<acc_t>::infinity());
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      tile_exponentials_and_max<V>(x.tile(first, count), count, params, sum, maxima);
    });
    row_max = maxima.reduce_max();
    log_sum = sum.total(0);
    log_sums_relative_to_maxima<V>(1, &params.magic_minus_r, &row_max, scale.scale, &log_sum);
  }
  if (!kHasFastLogSum<acc_t> || !is_log_sum_accurate(log_sum)) {
    row_max = max_of_long_row<V, acc_t>(x, length);
    RowSums<V, 2> sums;
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      tile_rest_and_max_count<V>(x.tile(first, count), count, row_max, scale.log2e, sums);
    });
    log_sum = log_of_sum(sums.total(0), sums.total(1));
  }
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    const LogProbability<acc_t, acc_t> value(x.tile(first, count), row_max, scale.scale, log_sum);
    write_row<V>(y.tile(first), count, count, StoreHint::kCached, value);
    y.finish(first, count);
  });
}

template <class V, class acc_t>
void softmax_of_long_row(TileReader<V>& x, TileWriter<V>& y, bool is_output_input, int64_t length,
                         const ForwardScale<acc_t>& scale) {
  alignas(64) acc_t scratch[kTileElems<V>];
  const bool are_exponentials_kept = y.is_in_place() && !is_output_input;
  const auto exponentials_at = [&](int64_t first) { return are_exponentials_kept ? y.tile(first) : scratch; };
  const auto sum_exponentials = [&](auto has_offset, const ExponentialParams<acc_t>& params) {
    RowSums<V> sum;
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      tile_exponentials<V, has_offset.value>(x.tile(first, count), count, params, exponentials_at(first), sum);
    });
    return sum.total(0);
  };
  ExponentialParams<acc_t> params = params_of_long_row<V, acc_t>(x, length, scale);
  acc_t row_sum = sum_exponentials(std::false_type(), params);
  if (is_sum_out_of_range(row_sum)) {
    params = params_from_maximum<V>(max_of_long_row<V, acc_t>(x, length), scale.log2e);
    row_sum = sum_exponentials(std::true_type(), params);
  }
  const acc_t reciprocal = 1 / row_sum;
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    if (!are_exponentials_kept) {
      recompute_tile_exponentials<V>(x.tile(first, count), count, params, scratch);
    }
    write_row<V>(y.tile(first), count, count, StoreHint::kCached,
                 Probability<acc_t>{exponentials_at(first), reciprocal});
    y.finish(first, count);
  });
}

template <class V, Operation kOperation, class acc_t, int kInputs>
MASKED_SOFTMAX_NOINLINE void tile_derivative_terms(const InputRows<acc_t, kInputs>& inputs, int64_t count,
                                                   const DerivativeScale<acc_t>& scale,
                                                   RowSums<V, Formula<kOperation>::kSums>& sums) {
  sums.add(count, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    using W = typename decltype(tag)::type;
    return derivative_terms<W, kOperation>(InputVectors<W, kInputs>(inputs, i, mask).in, scale);
  });
}

template <class V, Operation kOperation, class acc_t>
void derivative_of_long_row(TileReader<V>* inputs, TileWriter<V>& output, int64_t length,
                            const DerivativeScale<acc_t>& scale) {
  using Value = DerivativeValue<kOperation, acc_t, acc_t>;
  const auto tiles = [&](int64_t first, int64_t count) {
    InputRows<acc_t, Value::kInputs> result;
    for (int k = 0; k < Value::kInputs; ++k) {
      result.rows[k] = inputs[k].tile(first, count);
    }
    return result;
  };
  RowSums<V, Formula<kOperation>::kSums> sums;
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    tile_derivative_terms<V, kOperation>(tiles(first, count), count, scale, sums);
  });
  Value value{{}, scale, {}};
  for (int s = 0; s < Formula<kOperation>::kSums; ++s) {
    value.row_sums[s] = sums.total(s);
  }
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    value.inputs = tiles(first, count);
    write_row<V>(output.tile(first), count, count, StoreHint::kCached, value);
    output.finish(first, count);
  });
}

// inputs, output: the row's first valid element, of the problem's types and column strides. Inputs are multiplied by
// `input_factor`.
template <class V, Operation kOperation, class acc_t>
MASKED_SOFTMAX_NOINLINE void run_long_row(const Problem& problem, const void* const* inputs, void* output,
                                          int64_t length, const KernelScale<kOperation, acc_t>& scale,
                                          acc_t input_factor) {
  TileReader<V> readers[input_count(kOperation)];
  for (int k = 0; k < input_count(kOperation); ++k) {
    readers[k].open(inputs[k], problem.inputs[k], input_factor);
  }
  TileWriter<V> writer(output, problem.output);
  if constexpr (kOperation == Operation::kSoftmax) {
    softmax_of_long_row<V>(readers[0], writer, inputs[0] == output, length, scale);
  } else if constexpr (kOperation == Operation::kLogSoftmax) {
    log_softmax_of_long_row<V>(readers[0], writer, length, scale);
  } else {
    derivative_of_long_row<V, kOperation>(readers, writer, length, scale);
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
