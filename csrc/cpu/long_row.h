// Rows of any length, type and stride, one at a time, segment by segment.
//
// Segments are read and written in place where the row is contiguous and of the accumulation type. Otherwise they are
// packed into a buffer on the stack, where they take no more of the time than the row's passes over memory.
//
// While a segment is read or written, the pages of the next are prefetched. (Zen 5, November 2026, pages of 4 KiB,
// 256 x 32768 floats: 0.67 of the time.)
//
// Softmax's exponentials are computed twice, once for their sum and once as results: keeping them in the output instead
// would read and write a row once more, and most rows of this length are bound by memory.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/prefetch.h"
#include "cpu/row_kernel.h"
#include "cpu/staging.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// A multiple of kFlushElems, as RowSums::add_segment() requires. 2 to 8 KiB, so that the segments of three inputs and
// of the output fit an L1 of 32 KiB.
template <class V>
constexpr int64_t kSegmentElems = 4 * kFlushElems<V>;

// Calls body(first, count) for every segment of `count` elements.
template <class V, class Body>
MASKED_SOFTMAX_INLINE void for_each_segment(int64_t count, const Body& body) {
  for (int64_t first = 0; first < count; first += kSegmentElems<V>) {
    const int64_t rest = count - first;
    body(first, rest < kSegmentElems<V> ? rest : kSegmentElems<V>);
  }
}

// The segments of one input.
template <class V>
class SegmentReader {
 public:
  using acc_t = typename V::acc_t;

  void open(const void* row, const Operand& operand, acc_t input_factor) {
    row_ = row;
    type_ = operand.type;
    stride_ = operand.col_stride;
    input_factor_ = input_factor;
    is_in_place_ = type_ == ElementTraits<acc_t>::kType && stride_ == 1 && input_factor == 1;
    packed_first_ = packed_count_ = 0;
  }

  // Valid until the next call. The segment that was packed last is not packed again: a short row is packed once.
  const acc_t* segment(int64_t first, int64_t count) {
    const void* const from = element_at(row_, type_, first * stride_);
    if (stride_ == 1) {
      constexpr int64_t kLines = 4;
      const int64_t bytes = count * size_bytes(type_);
      prefetch_page_starts(static_cast<const char*>(from) + bytes, bytes, kLines);
    }
    if (is_in_place_) {
      return static_cast<const acc_t*>(from);
    }
    if (first != packed_first_ || count > packed_count_) {
      pack_row<V>(from, type_, stride_, count, input_factor_, buffer_);
      packed_first_ = first;
      packed_count_ = count;
    }
    return buffer_;
  }

 private:
  const void* row_;
  ElementType type_;
  int64_t stride_;
  acc_t input_factor_;
  bool is_in_place_;
  int64_t packed_first_;
  int64_t packed_count_;
  alignas(64) acc_t buffer_[kSegmentElems<V>];
};

// The segments of the output.
template <class V>
class SegmentWriter {
 public:
  using acc_t = typename V::acc_t;

  SegmentWriter(void* row, const Operand& operand, StoreHint hint)
      : row_(row),
        type_(operand.type),
        stride_(operand.col_stride),
        hint_(hint),
        is_in_place_(type_ == ElementTraits<acc_t>::kType && stride_ == 1) {}

  // Writes value(i, mask) to the elements [first, first + count). Inlined, so that what the value holds stays in
  // registers: not inlined, log_softmax took 1.16 of the time. (Zen 5, December 2026, AVX2, 16384 floats.)
  template <class Value>
  MASKED_SOFTMAX_INLINE void write(int64_t first, int64_t count, const Value& value) {
    if (is_in_place_) {
      auto* const to = static_cast<acc_t*>(row_) + first;
      if (hint_ == StoreHint::kNonTemporal) {
        prefetch_page_starts(to + count, count * int64_t{sizeof(acc_t)}, 1);
      }
      write_values<V>(to, count, count, 0, hint_, value);
    } else {
      write_values<V>(buffer_, count, count, 0, StoreHint::kCached, value);
      unpack_row<V>(buffer_, count, element_at(row_, type_, first * stride_), type_, stride_);
    }
  }

 private:
  void* const row_;
  const ElementType type_;
  const int64_t stride_;
  const StoreHint hint_;
  const bool is_in_place_;
  alignas(64) acc_t buffer_[kSegmentElems<V>];
};

// A row's sink, and where its weight goes.
struct RowSink {
  double sink;
  double* weight;

  bool exists() const { return sink != -std::numeric_limits<double>::infinity(); }
};

// The sums of term(elements + i, mask) over the row.
template <class V, int kSums = 1, class Term>
MASKED_SOFTMAX_INLINE RowSums<V, kSums> sums_of_long_row(SegmentReader<V>& x, int64_t length, const Term& term) {
  RowSums<V, kSums> sums;
  for_each_segment<V>(length, [&](int64_t first, int64_t count) MASKED_SOFTMAX_LAMBDA_INLINE {
    const auto* const elements = x.segment(first, count);
    sums.add_segment(count,
                     [&](int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE { return term(elements + i, mask); });
  });
  return sums;
}

template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE acc_t sum_of_long_row(SegmentReader<V>& x, int64_t length,
                                              const ExponentialParams<acc_t>& params) {
  const auto term = [&](const acc_t* elements, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    return Terms<V>{{masked(exponential_of<true>(load<V>(elements, mask), params), mask)}};
  };
  return sums_of_long_row<V>(x, length, term).total(0);
}

template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE acc_t max_of_long_row(SegmentReader<V>& x, int64_t length) {
  acc_t row_max = -std::numeric_limits<acc_t>::infinity();
  for_each_segment<V>(length, [&](int64_t first, int64_t count) {
    const acc_t max = max_of_elements<V>(x.segment(first, count), count).reduce_max();
    row_max = max > row_max ? max : row_max;
  });
  return row_max;
}

template <class V, class acc_t>
ExponentialParams<acc_t> params_of_long_row(SegmentReader<V>& x, int64_t length, const ForwardScale<acc_t>& scale) {
  const int64_t last_segment = (length - 1) / kSegmentElems<V> * kSegmentElems<V>;
  const acc_t last = read_element(x.segment(last_segment, length - last_segment) + (length - 1 - last_segment));
  const acc_t first = read_element(x.segment(0, length < kSegmentElems<V> ? length : kSegmentElems<V>));
  return params_from_reference<V>(row_reference(first, last), scale.log2e);
}

template <class V>
bool has_nan_in_long_row(SegmentReader<V>& x, int64_t length) {
  bool found = false;
  for_each_segment<V>(
      length, [&](int64_t first, int64_t count) { found = found || has_nan<V>(x.segment(first, count), count); });
  return found;
}

// Finds the maximum, and the logarithm of the sum of the exponentials relative to it.
template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE void find_log_sum(SegmentReader<V>& x, int64_t length, const ForwardScale<acc_t>& scale,
                                          acc_t& row_max, acc_t& log_sum) {
  if constexpr (kHasFastLogSum<acc_t>) {
    const auto params = params_of_long_row<V, acc_t>(x, length, scale);
    V maxima = V::broadcast(-std::numeric_limits<acc_t>::infinity());
    const auto term = [&](const acc_t* elements, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
      return exponential_and_max<V>(elements, params, maxima, mask);
    };
    log_sum = sums_of_long_row<V>(x, length, term).total(0);
    row_max = maxima.reduce_max();
    log_sums_relative_to_maxima<V>(1, &params.magic_minus_r, &row_max, scale.exact, &log_sum);
  }
  if (!kHasFastLogSum<acc_t> || !is_log_sum_accurate(log_sum)) {
    row_max = max_of_long_row<V, acc_t>(x, length);
    const auto terms = [&](const acc_t* elements, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
      return rest_and_max_count<V>(elements, row_max, scale.log2e, mask);
    };
    const auto sums = sums_of_long_row<V, 2>(x, length, terms);
    log_sum = log_of_sum(sums.total(0), sums.total(1));
  }
}

template <class V, class acc_t>
double logsumexp_of_long_row(SegmentReader<V>& x, int64_t length, const ForwardScale<acc_t>& scale) {
  acc_t row_max = 0;
  acc_t log_sum = 0;
  find_log_sum<V, acc_t>(x, length, scale, row_max, log_sum);
  return logsumexp_of(scale, row_max, log_sum, [&] { return has_nan_in_long_row<V>(x, length); });
}

template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE void log_softmax_of_long_row(SegmentReader<V>& x, SegmentWriter<V>& y, int64_t length,
                                                     const ForwardScale<acc_t>& scale, const RowSink& sink) {
  acc_t row_max = 0;
  acc_t log_sum = 0;
  find_log_sum<V, acc_t>(x, length, scale, row_max, log_sum);
  if (sink.exists()) {
    *sink.weight =
        add_sink_to_log_sum(sink.sink, scale, row_max, log_sum, [&] { return has_nan_in_long_row<V>(x, length); });
  } else {
    *sink.weight = weight_of_no_sink(static_cast<double>(row_max) + static_cast<double>(log_sum));
  }
  for_each_segment<V>(length, [&](int64_t first, int64_t count) {
    y.write(first, count, LogProbability<V, acc_t>(x.segment(first, count), row_max, scale.scale, log_sum));
  });
}

template <class V, class acc_t>
MASKED_SOFTMAX_NOINLINE void softmax_of_long_row(SegmentReader<V>& x, SegmentWriter<V>& y, int64_t length,
                                                 const ForwardScale<acc_t>& scale, const RowSink& sink) {
  if (length == 1) {  // e * (1 / e) is not always 1
    const acc_t element = read_element(x.segment(0, 1));
    acc_t result = static_cast<acc_t>(scale.exact) * (element - element) + 1;  // 1, or NaN as in longer rows
    if (sink.exists()) {
      const bool is_lone = element == -std::numeric_limits<acc_t>::infinity();
      const double one = is_lone ? 0 : static_cast<double>(result);
      const double term =
          is_lone ? weight_of_lone_sink(sink.sink) : sink_term(sink.sink, scale.exact, static_cast<double>(element), 0);
      const SumWithSink total = add_sink_term(one, term);
      result = static_cast<acc_t>(one) * (1 / static_cast<acc_t>(total.sum));
      *sink.weight = total.weight;
    } else {
      *sink.weight = weight_of_no_sink(static_cast<double>(result));
    }
    y.write(0, 1, [&](int64_t, auto) MASKED_SOFTMAX_LAMBDA_INLINE { return V::broadcast(result); });
    return;
  }
  auto params = params_of_long_row<V, acc_t>(x, length, scale);
  const auto sum_of = [&](const ExponentialParams<acc_t>& relative) { return sum_of_long_row<V>(x, length, relative); };
  const auto find_max = [&] { return max_of_long_row<V, acc_t>(x, length); };
  acc_t row_sum = sum_of(params);
  if (sink.exists()) {
    *sink.weight = add_sink<V>(sink.sink, scale, params, row_sum, find_max, sum_of);
  } else {
    if (is_sum_out_of_range(row_sum)) {
      params = params_from_maximum<V>(find_max(), scale.log2e);
      row_sum = sum_of(params);
    }
    *sink.weight = weight_of_no_sink(static_cast<double>(row_sum));
  }
  const acc_t reciprocal = 1 / row_sum;
  for_each_segment<V>(length, [&](int64_t first, int64_t count) {
    const acc_t* const elements = x.segment(first, count);
    y.write(first, count, [&](int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
      return exponential_of<true>(load<V>(elements + i, mask), params) * V::broadcast(reciprocal);
    });
  });
}

// row_number: the row's factor, which row_scale takes, or its result, which row_dot sets.
template <class V, Operation kOperation, class acc_t>
void derivative_of_long_row(SegmentReader<V>* inputs, SegmentWriter<V>& output, int64_t length,
                            const DerivativeScale<acc_t>& scale, double& row_number) {
  constexpr int kInputs = input_count(kOperation);
  const auto segments = [&](int64_t first, int64_t count) {
    InputRows<acc_t, kInputs> result;
    for (int k = 0; k < kInputs; ++k) {
      result.rows[k] = inputs[k].segment(first, count);
    }
    return result;
  };
  DerivativeValue<V, kOperation, acc_t> value{{}, scale, {}};
  if constexpr (kOperation == Operation::kRowScale) {
    value.row_sums[0] = static_cast<acc_t>(row_number);
  } else {
    RowSums<V, Formula<kOperation>::kSums> sums;
    for_each_segment<V>(length, [&](int64_t first, int64_t count) {
      const auto inputs_of_segment = segments(first, count);
      sums.add_segment(count, [&](int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
        return derivative_terms<V, kOperation>(load_inputs<V>(inputs_of_segment, i, mask), scale);
      });
    });
    for (int s = 0; s < Formula<kOperation>::kSums; ++s) {
      value.row_sums[s] = sums.total(s);
    }
  }
  if constexpr (kOperation == Operation::kRowDot) {
    row_number = static_cast<double>(scale.scale * value.row_sums[0]);
  } else {
    for_each_segment<V>(length, [&](int64_t first, int64_t count) {
      value.inputs = segments(first, count);
      output.write(first, count, value);
    });
  }
}

template <class V, Operation kOperation>
MASKED_SOFTMAX_NOINLINE void run_long_rows(const Problem& problem, int64_t begin, int64_t end) {
  using acc_t = typename V::acc_t;
  constexpr int kInputs = input_count(kOperation);
  const double padding = problem.padding_value();
  const StoreHint hint = store_hint_of(problem);
  const double factor = input_factor(problem);
  const KernelScale<kOperation, acc_t> scale(problem.scale / factor);
  const Operand& output = problem.output;
  SegmentReader<V> readers[kInputs];
  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run);) {
    for (int64_t i = 0; i < run.rows; ++i) {
      const RowBounds bounds = run.bounds(i);
      const auto output_at = [&](int64_t col) {
        return element_at(output.data, output.type, run.output_offset(i) + col * output.col_stride);
      };
      const auto fill = [&](int64_t first, int64_t last) {
        fill_strided(padding, last - first, output_at(first), output.type, output.col_stride);
      };
      double row_input = -std::numeric_limits<double>::infinity();
      if (problem.row_input.data != nullptr) {
        row_input = load_row_input(problem.row_input, run.row_input_offset(i));
      }
      double row_result = 0;
      if (bounds.length() == 0) {
        row_result = kOperation == Operation::kLogSumExp ? -std::numeric_limits<double>::infinity()
                     : is_forward(kOperation) && row_input != -std::numeric_limits<double>::infinity()
                         ? weight_of_lone_sink(row_input)
                         : 0;
      } else {
        for (int k = 0; k < kInputs; ++k) {
          const Operand& input = problem.inputs[k];
          const int64_t offset = run.input_offset(k, i) + bounds.start * input.col_stride;
          readers[k].open(element_at(input.data, input.type, offset), input, static_cast<acc_t>(factor));
        }
        SegmentWriter<V> writer(output_at(bounds.start), output, hint);
        const RowSink sink{row_input, &row_result};
        if constexpr (kOperation == Operation::kSoftmax) {
          softmax_of_long_row<V>(readers[0], writer, bounds.length(), scale, sink);
        } else if constexpr (kOperation == Operation::kLogSoftmax) {
          log_softmax_of_long_row<V>(readers[0], writer, bounds.length(), scale, sink);
        } else if constexpr (kOperation == Operation::kLogSumExp) {
          row_result = logsumexp_of_long_row<V>(readers[0], bounds.length(), scale);
        } else if constexpr (kOperation == Operation::kRowScale) {
          derivative_of_long_row<V, kOperation>(readers, writer, bounds.length(), scale, row_input);
        } else {
          derivative_of_long_row<V, kOperation>(readers, writer, bounds.length(), scale, row_result);
        }
      }
      if (problem.row_result.data != nullptr) {
        store_row_result(problem.row_result, run.first_row + i, row_result);
      }
      if (!is_reduction(kOperation) && !problem.packing.is_packed) {
        fill(0, bounds.start);
        fill(bounds.end, problem.cols);
      }
    }
  }
  if (hint == StoreHint::kNonTemporal) {
    V::store_fence();
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
