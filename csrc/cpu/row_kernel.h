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
// The kernels keep its three passes, but softmax needs the maximum in few rows only (exp2.h), so most rows take two.
// This file holds the expressions of the passes; narrow_rows.h, short_rows.h and long_row.h run them over rows.
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
  acc_t scale;
  ScaledLog2e<acc_t> log2e;

  explicit ForwardScale(double value) : scale(static_cast<acc_t>(value)), log2e(value) {}
};

// The maximum, spread over the lanes. It ignores NaN, which the sum finds.
template <class V, class T>
MASKED_SOFTMAX_INLINE V max_of_elements(const T* x, int64_t count) {
  constexpr auto kNone = -std::numeric_limits<typename V::acc_t>::infinity();
  auto maxima = VectorGroup<V, kAccumulators>::broadcast(kNone);
  accumulate<V, V::kGroupVectors>(
      count,
      [&](auto tag, int64_t i, auto mask)
          MASKED_SOFTMAX_LAMBDA_INLINE { return masked(load<typename decltype(tag)::type>(x + i, mask), mask, kNone); },
      [&](auto index, const auto& loaded) MASKED_SOFTMAX_LAMBDA_INLINE {
        for (int k = 0; k < loaded.kVectors; ++k) {
          V& accumulator = maxima.v[index + k];
          accumulator = V::max(loaded.vector(k), accumulator);
        }
      });
  return V::max(V::max(maxima.v[0], maxima.v[1]), V::max(maxima.v[2], maxima.v[3]));
}

// e = exp(scale * (x - max)) times a factor common to the row (exp2.h). kHasRoom: e has room for full vectors.
template <class W, bool kHasOffset, bool kHasRoom, class T, class Mask>
MASKED_SOFTMAX_INLINE Terms<W> exponential(const T* x, const ExponentialParams<typename W::acc_t>& params,
                                           typename W::acc_t* e, Mask mask) {
  const W value = masked(exponential_of<kHasOffset>(load<W>(x, mask), params), mask);
  if constexpr (kHasRoom) {
    value.store(e);
  } else {
    store(e, value, mask);
  }
  return {{value}};
}

// The terms of log_softmax's two sums: the exponentials of the rest, which are all elements less than the maximum, and
// max_count, the number of elements equal to it.
//
// An element equal to the maximum contributes exactly 1. With these counted apart, log(sum) = log1p(sum - 1), and a row
// that one element dominates keeps its relative accuracy. For the same reason the rest carries the rounding errors of
// x - max (TwoSum) and of the exponent.
template <class W, class T, class Mask>
MASKED_SOFTMAX_INLINE Terms<W, 2> rest_and_max_count(const T* x, typename W::acc_t row_max,
                                                     const ScaledLog2e<typename W::acc_t>& c, Mask mask) {
  const W m = W::broadcast(row_max);
  const W high = W::broadcast(c.high);
  const W a = load<W>(x, mask);
  const W t = a - m;
  const W part = t - a;
  const W error = (a - (t - part)) - (m + part);
  const W e = exp2_product<W, kRestBias>(t, high, W::fma(t, W::broadcast(c.low), error * high));
  return {{masked(W::zero_where_zero(t, e), mask), masked(W::one_where_zero(t), mask)}};
}

template <class acc_t>
MASKED_SOFTMAX_INLINE acc_t log_of_sum(acc_t rest, acc_t max_count) {
  const double sum_minus_one =
      (static_cast<double>(max_count) - 1.0) + std::ldexp(static_cast<double>(rest), -kRestBias);
  return static_cast<acc_t>(std::log1p(sum_minus_one));
}

// The results, as values for write_row().

// y[i] = e[i] * reciprocal, where reciprocal = 1 / sum(e)
template <class acc_t>
struct Probability {
  const acc_t* e;
  acc_t reciprocal;

  template <class Tag, class Mask>
  MASKED_SOFTMAX_INLINE auto operator()(Tag, int64_t i, Mask mask) const {
    using W = typename Tag::type;
    return load<W>(e + i, mask) * W::broadcast(reciprocal);
  }
};

// y[i] = scale * (x[i] - max) - log_sum
template <class acc_t, class T>
struct LogProbability {
  const T* x;
  acc_t row_max;
  acc_t scale;
  acc_t log_sum;

  template <class Tag, class Mask>
  MASKED_SOFTMAX_INLINE auto operator()(Tag, int64_t i, Mask mask) const {
    using W = typename Tag::type;
    const W distance = load<W>(x + i, mask) - W::broadcast(row_max);
    return distance * W::broadcast(scale) - W::broadcast(log_sum);
  }
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
