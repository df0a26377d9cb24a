// Softmax and log_softmax of one row's valid columns, x[0..length).
//
//   softmax      y = e / sum(e),              e = 2^((x - max) * scale * log2(e))
//   log_softmax  y = scale * (x - max) - log(sum(e))
//
// Three sweeps: the largest x; the exponentials and their sum; the results. This file holds the sweeps over elements
// that lie together in memory; short_rows.h and long_row.h say over what they run.
//
// Scale is neither negative nor extreme here: see staging_factor() in common/problem.h for where a caller's is.
//
// Precondition: length >= 1.
#pragma once

#include "cpu/exp.h"
#include "cpu/sweep.h"

namespace masked_softmax {

// The largest elements, spread over the lanes. A NaN is passed over here; the sum finds it.
template <class V, class T>
MASKED_SOFTMAX_INLINE V find_maxima(const T* x, int64_t count) {
  constexpr auto kNone = -std::numeric_limits<typename V::acc_t>::infinity();
  V even = V::broadcast(kNone);
  V odd = V::broadcast(kNone);
  for_each_in_chains<V>(count, [&](auto chain, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    V& maxima = chain % 2 == 0 ? even : odd;
    maxima = V::max(load<V>(x + i, lanes, kNone), maxima);
  });
  return V::max(even, odd);
}

// x - max for one vector.
template <class V, class T, class Lanes>
MASKED_SOFTMAX_INLINE V distance(const T* x, V row_max, Lanes lanes) {
  return V::sub(load<V>(x, lanes, 0), row_max);
}

// e = exp(scale * (x - max)) for one vector.
template <class V, class T, class Lanes>
MASKED_SOFTMAX_INLINE LaneSums<V> exponential(const T* x, V row_max, V exponent, typename V::acc_t* e, Lanes lanes) {
  const V value = filled_lanes(exp2_product(distance(x, row_max, lanes), exponent), lanes);
  store(e, value, lanes);
  return {{value}};
}

// For one vector: the exponentials of all elements but the maxima, and how many maxima there are.
//
// A maximum contributes exactly 1 and is counted apart from the rest: log(sum) is log1p(sum - 1), so a row that one
// element dominates keeps its relative accuracy. For the same reason the rest carries the rounding error of x - max
// (TwoSum) and of the exponent along.
template <class V, class T, class Lanes>
MASKED_SOFTMAX_INLINE LaneSums<V, 2> rest_and_maxima(const T* x, V row_max, V exponent, V exponent_low, Lanes lanes) {
  const V a = load<V>(x, lanes, 0);
  const V t = V::sub(a, row_max);
  const V part = V::sub(t, a);
  const V error = V::sub(V::sub(a, V::sub(t, part)), V::add(row_max, part));
  const V e = exp2_product<V, kRestBias>(t, exponent, V::fma(t, exponent_low, V::mul(error, exponent)));
  return {{filled_lanes(V::zero_where_zero(t, e), lanes), filled_lanes(V::one_where_zero(t), lanes)}};
}

template <class acc_t>
MASKED_SOFTMAX_INLINE acc_t log_of_sum(acc_t rest, acc_t maxima) {
  const double others = (static_cast<double>(maxima) - 1.0) + std::ldexp(static_cast<double>(rest), -kRestBias);
  return static_cast<acc_t>(std::log1p(others));
}

// y[i] = e[i] * factor
template <class V, class U>
MASKED_SOFTMAX_INLINE void multiply(const typename V::acc_t* e, int64_t count, typename V::acc_t factor, U* y) {
  const V factors = V::broadcast(factor);
  for_each_vector<V>(count, [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    store(y + i, V::mul(load<V>(e + i, lanes, 0), factors), lanes);
  });
}

// y[i] = scale * (x[i] - max) - log_sum
template <class V, class T, class U>
MASKED_SOFTMAX_INLINE void subtract_log(const T* x, int64_t count, V row_max, typename V::acc_t scale,
                                        typename V::acc_t log_sum, U* y) {
  const V scales = V::broadcast(scale);
  const V log_sums = V::broadcast(log_sum);
  for_each_vector<V>(count, [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    store(y + i, V::sub(V::mul(distance(x + i, row_max, lanes), scales), log_sums), lanes);
  });
}

}  // namespace masked_softmax
