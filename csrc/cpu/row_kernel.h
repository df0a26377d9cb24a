// Softmax and log_softmax of one row's valid columns, x[0..length) -> y[0..length).
//
//   softmax      y[i] = e[i] / sum(e),                             e[i] = exp(scale * (x[i] - max(x)))
//   log_softmax  y[i] = scale * (x[i] - max(x)) - log(sum(e))
//
// Without vectors, a masked softmax is no more than this (tests/kernel/reference.h also bounds its error):
//
//   void masked_softmax_row(const float* x, float* y, int start, int length, int cols, float scale) {
//     float max = -INFINITY, sum = 0;
//     for (int i = start; i < start + length; ++i) max = std::fmax(max, scale * x[i]);
//     for (int i = start; i < start + length; ++i) sum += y[i] = std::exp(scale * x[i] - max);
//     for (int i = 0; i < cols; ++i) y[i] = start <= i && i < start + length ? y[i] / sum : 0;
//   }
//
// The kernels need the maximum before the exponentials in few rows only (exp2.h), so most rows take two passes. This
// file holds the expressions of the passes; block_kernel.h and long_row.h run them over rows.
//
// Types: x is converted to the accumulation type as it is loaded; exponentials, sums and y are of that type, and y is
// rounded once as it is stored. Memory: each valid element is read once. In later passes log_softmax finds it in the
// cache, and softmax finds its exponential there, unless the row is too long. Each element, padding included, is
// written once. float32: 4 bytes read for a valid element, 4 written for every element.
//
// Preconditions: length >= 1; scale >= 0 and not extreme (input_factor() in common/problem.h). y may be x.
#pragma once

#include "cpu/exp2.h"
#include "cpu/row_passes.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// The scale of softmax and log_softmax.
template <class acc_t>
struct ForwardScale {
  double exact;
  acc_t scale;
  ScaledLog2e<acc_t> log2e;

  explicit ForwardScale(double value) : exact(value), scale(static_cast<acc_t>(value)), log2e(value) {}
};

// The maximum, spread over the lanes. It ignores NaN, which the sum finds.
template <class V, class T>
MASKED_SOFTMAX_INLINE V max_of_elements(const T* x, int64_t count) {
  constexpr auto kNone = -std::numeric_limits<typename V::acc_t>::infinity();
  constexpr int kAccumulators = 4;
  V maxima[kAccumulators] = {V::broadcast(kNone), V::broadcast(kNone), V::broadcast(kNone), V::broadcast(kNone)};
  int64_t i = 0;
  for (; i + kAccumulators * V::kLanes <= count; i += kAccumulators * V::kLanes) {
    for (int k = 0; k < kAccumulators; ++k) {
      maxima[k] = V::max(V::load(x + i + k * V::kLanes), maxima[k]);
    }
  }
  for_each_vector<V>(count - i, [&](int64_t k, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    maxima[0] = V::max(masked(load<V>(x + i + k, mask), mask, kNone), maxima[0]);
  });
  return V::max(V::max(maxima[0], maxima[1]), V::max(maxima[2], maxima[3]));
}

// For rows whose maximum, which ignores NaN, is infinite.
template <class V, class T>
MASKED_SOFTMAX_NOINLINE bool has_nan(const T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto element = V::element(x + i);
    if (element != element) {
      return true;
    }
  }
  return false;
}

// e = exp(scale * (x - max)) times a factor common to the row (exp2.h). e has room for full vectors.
template <class V, bool kHasOffset, class T, class Mask>
MASKED_SOFTMAX_INLINE Terms<V> exponential(const T* x, const ExponentialParams<typename V::acc_t>& params,
                                           typename V::acc_t* e, Mask mask) {
  const V value = masked(exponential_of<kHasOffset>(load<V>(x, mask), params), mask);
  value.store(e);
  return {{value}};
}

// The same without storing it; also raises `maxima` to x.
template <class V, class T, class Mask>
MASKED_SOFTMAX_INLINE Terms<V> exponential_and_max(const T* x, const ExponentialParams<typename V::acc_t>& params,
                                                   V& maxima, Mask mask) {
  const V value = load<V>(x, mask);
  maxima = V::max(masked(value, mask, -std::numeric_limits<typename V::acc_t>::infinity()), maxima);
  return {{masked(exponential_of<false>(value, params), mask)}};
}

// log(sum(e)) of rows whose exponentials were summed relative to a reference r: log(sum) + (r - max * c) * log(2). The
// sum is off by up to 3 eps, and so is its logarithm; that is within the promised accuracy only where the logarithm is
// not near 0. The difference is computed in double, so only float sums have this.
template <class acc_t>
constexpr bool kHasFastLogSum = std::is_same_v<acc_t, float>;

template <class acc_t>
MASKED_SOFTMAX_INLINE bool is_log_sum_accurate(acc_t log_sum) {
  return log_sum >= static_cast<acc_t>(1.25) && log_sum < static_cast<acc_t>(128);  // NaN where the reference failed
}

// log_sums: on entry sums. The loop has no branches, so that the compiler vectorizes it.
template <class V>
MASKED_SOFTMAX_INLINE void log_sums_relative_to_maxima(int rows, const float* magic_minus_r, const float* maxima,
                                                       double scale, float* log_sums) {
  for (int r = 0; r < rows; ++r) {
    // sum = m * 2^n with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 * atanh((m - 1) / (m + 1)), a series in odd powers
    // whose rest is below 1e-12.
    constexpr int32_t kSqrtHalf = 0x3f3504f3;
    constexpr int32_t kMantissaBits = 23;
    int32_t bits;
    std::memcpy(&bits, log_sums + r, sizeof(bits));
    const int32_t n = (bits - kSqrtHalf) >> kMantissaBits;
    bits -= n * (1 << kMantissaBits);
    float m;
    std::memcpy(&m, &bits, sizeof(m));
    const double t = (static_cast<double>(m) - 1) / (static_cast<double>(m) + 1);
    const double u = t * t;
    const double series = 1 + u * (1. / 3 + u * (1. / 5 + u * (1. / 7 + u * (1. / 9 + u * (1. / 11 + u / 13)))));
    const double reference = static_cast<double>(magic_constant<V>() - magic_minus_r[r]);
    const double log_sum = 2 * t * series + (n + reference) * kLog2;
    const double relative = log_sum - scale * static_cast<double>(maxima[r]);
    log_sums[r] = static_cast<float>(relative) + (log_sums[r] - log_sums[r]);  // NaN of a sum that is not finite
  }
}

// The terms of the sums that every row's logarithm can be computed from: the exponentials of the rest, which are all
// elements less than the maximum, and max_count, the number of elements equal to it.
//
// An element equal to the maximum contributes exactly 1. With these counted apart, log(sum) = log1p(sum - 1), and a row
// that one element dominates keeps its relative accuracy. For the same reason the rest carries the rounding errors of
// x - max (TwoSum) and of the exponent.
template <class V, class T, class Mask>
MASKED_SOFTMAX_INLINE Terms<V, 2> rest_and_max_count(const T* x, typename V::acc_t row_max,
                                                     const ScaledLog2e<typename V::acc_t>& c, Mask mask) {
  const V m = V::broadcast(row_max);
  const V high = V::broadcast(c.high);
  const V a = load<V>(x, mask);
  const V t = a - m;
  const V part = t - a;
  const V error = (a - (t - part)) - (m + part);
  const V e = exp2_product<V, kRestBias>(t, high, V::fma(t, V::broadcast(c.low), error * high));
  return {{masked(V::zero_where_zero(t, e), mask), masked(V::one_where_zero(t), mask)}};
}

template <class acc_t>
MASKED_SOFTMAX_INLINE acc_t log_of_sum(acc_t rest, acc_t max_count) {
  const double sum_minus_one =
      (static_cast<double>(max_count) - 1.0) + std::ldexp(static_cast<double>(rest), -kRestBias);
  return static_cast<acc_t>(std::log1p(sum_minus_one));
}

template <class V, class T, class acc_t>
MASKED_SOFTMAX_NOINLINE acc_t accurate_log_sum(const T* x, int64_t length, acc_t row_max,
                                               const ScaledLog2e<acc_t>& log2e) {
  RowSums<V, 2> sums;
  sums.add_row(length, [&](int64_t i, auto mask)
                           MASKED_SOFTMAX_LAMBDA_INLINE { return rest_and_max_count<V>(x + i, row_max, log2e, mask); });
  return log_of_sum(sums.total(0), sums.total(1));
}

// A row's sink (cpu/sink.h), for rows of every length. The passes over the row differ, so they are arguments.

// The sink's term beside the exponentials relative to `params`.
template <class V, class acc_t = typename V::acc_t>
double term_of_sink(double sink, const ForwardScale<acc_t>& scale, const ExponentialParams<acc_t>& params) {
  const acc_t r = magic_constant<V>() - params.magic_minus_r;
  return sink_term(sink, scale.exact, static_cast<double>(params.offset), static_cast<double>(r));
}

// Adds the sink's term to the sum of a softmax's exponentials, which are relative to `params`. Where either is out of
// range, makes both relative to the maximum: find_max() returns it, and sum_of(params) the sum of the exponentials.
// Returns the sink's weight.
template <class V, class FindMax, class SumOf, class acc_t = typename V::acc_t>
double add_sink(double sink, const ForwardScale<acc_t>& scale, ExponentialParams<acc_t>& params, acc_t& sum,
                const FindMax& find_max, const SumOf& sum_of) {
  double term = term_of_sink<V>(sink, scale, params);
  if (is_sum_out_of_range(sum) || is_sum_out_of_range(static_cast<acc_t>(term))) {
    const acc_t row_max = find_max();
    const bool is_lone = row_max == -std::numeric_limits<acc_t>::infinity();
    params = params_from_maximum<V>(is_lone ? acc_t{0} : row_max, scale.log2e);
    sum = sum_of(params);
    term = is_lone ? weight_of_lone_sink(sink) : term_of_sink<V>(sink, scale, params);
  }
  const SumWithSink total = add_sink_term(static_cast<double>(sum), term);
  sum = static_cast<acc_t>(total.sum);
  return total.weight;
}

// Adds the sink to the logarithm of a row's sum of exponentials, which is relative to the maximum. Returns its weight.
// has_nan(): whether an element is NaN, which the maximum ignores.
template <class acc_t, class HasNan>
double add_sink_to_log_sum(double sink, const ForwardScale<acc_t>& scale, acc_t& row_max, acc_t& log_sum,
                           const HasNan& has_nan) {
  constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
  if (row_max == kNone && scale.exact != 0 && !has_nan()) {  // 0 * -inf is NaN
    row_max = 0;
    log_sum = kNone;
  }
  const SumWithSink total = masked_softmax::add_sink_to_log_sum(static_cast<double>(log_sum),
                                                                static_cast<double>(row_max), sink, scale.exact);
  // -inf only without a sink: a lone one below every float32 would make -inf - log_sum NaN.
  constexpr double kLowest = std::numeric_limits<acc_t>::lowest();
  log_sum = static_cast<acc_t>(std::isfinite(total.sum) && total.sum < kLowest ? kLowest : total.sum);
  return total.weight;
}

// scale * max + log(sum). As in torch.logsumexp, infinite where that is the maximum.
template <class acc_t, class HasNan>
double logsumexp_of(const ForwardScale<acc_t>& scale, acc_t row_max, acc_t log_sum, const HasNan& has_nan) {
  const double scaled_max = scale.exact * static_cast<double>(row_max);
  return std::isinf(row_max) && !has_nan() ? scaled_max : scaled_max + static_cast<double>(log_sum);
}

// The results, as values for write_row().

// y[i] = e[i] * reciprocal, where reciprocal = 1 / sum(e)
template <class V>
struct Probability {
  const typename V::acc_t* e;
  typename V::acc_t reciprocal;

  template <class Mask>
  MASKED_SOFTMAX_INLINE V operator()(int64_t i, Mask mask) const {
    return load<V>(e + i, mask) * V::broadcast(reciprocal);
  }
};

// y[i] = scale * (x[i] - max) - log_sum
template <class V, class T>
class LogProbability {
 public:
  using acc_t = typename V::acc_t;

  MASKED_SOFTMAX_INLINE LogProbability(const T* x, acc_t row_max, acc_t scale, acc_t log_sum)
      : x_(x),
        unit_(scale <= 1 && std::fabs(row_max) > kLarge ? acc_t{0.5} : acc_t{1}),
        max_(row_max * unit_),
        scale_(scale / unit_),
        log_sum_(log_sum) {}

  template <class Mask>
  MASKED_SOFTMAX_INLINE V operator()(int64_t i, Mask mask) const {
    const V distance = V::fms(load<V>(x_ + i, mask), V::broadcast(unit_), V::broadcast(max_));
    return V::fms(distance, V::broadcast(scale_), V::broadcast(log_sum_));
  }

 private:
  static constexpr acc_t kLarge = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p100) : static_cast<acc_t>(0x1p960);

  const T* x_;
  acc_t unit_;  // x and the maximum are multiplied by it, so that their difference does not overflow where y does not
  acc_t max_;
  acc_t scale_;
  acc_t log_sum_;
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
