// Softmax and log_softmax of one row's valid columns, x[0..length).
//
//   softmax      y = e / sum(e),              e = 2^((x - max) * scale * log2(e))
//   log_softmax  y = scale * (x - max) - log(sum(e))
//
// Sweeps: for a log_softmax, and for the few softmax rows that need it (see exp.h), the largest x; the exponentials and
// their sum; the results. This file holds the sweeps over elements that lie together in memory; narrow_rows.h,
// short_rows.h and long_row.h say over what they run.
//
// Scale is neither negative nor extreme here: see input_factor() in common/problem.h for where a caller's is.
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
  auto maxima = Several<V, kChains>::broadcast(kNone);
  for_each_in_chains<V, V::kTogether>(
      count,
      [&](auto as, int64_t i, auto lanes)
          MASKED_SOFTMAX_LAMBDA_INLINE { return load<typename decltype(as)::type>(x + i, lanes, kNone); },
      [&](auto chain, const auto& loaded) MASKED_SOFTMAX_LAMBDA_INLINE {
        for (int k = 0; k < vectors_in(loaded); ++k) {
          V& of_chain = maxima.v[chain + k];
          of_chain = V::max(vector_of(loaded, k), of_chain);
        }
      });
  return V::max(V::max(maxima.v[0], maxima.v[1]), V::max(maxima.v[2], maxima.v[3]));
}

// x - max
template <class W, class T, class Lanes>
MASKED_SOFTMAX_INLINE W distance(const T* x, typename W::acc_t row_max, Lanes lanes) {
  return W::sub(load<W>(x, lanes, 0), W::broadcast(row_max));
}

// e = exp(scale * (x - max)), but for a factor that all of the row have in common. kRoom: e has room for whole vectors.
template <class W, bool kOffset, bool kRoom, class T, class Lanes>
MASKED_SOFTMAX_INLINE LaneSums<W> exponential(const T* x, const RowExponent<typename W::acc_t>& exponent,
                                              typename W::acc_t* e, Lanes lanes) {
  const W value = filled_lanes(exponential_of<kOffset>(load<W>(x, lanes, 0), exponent), lanes);
  if constexpr (kRoom) {
    value.store(e);
  } else {
    store(e, value, lanes);
  }
  return {{value}};
}

// The exponentials of all elements but the maxima, and how many maxima there are.
//
// A maximum contributes exactly 1 and is counted apart from the rest: log(sum) is log1p(sum - 1), so a row that one
// element dominates keeps its relative accuracy. For the same reason the rest carries the rounding error of x - max
// (TwoSum) and of the exponent along.
template <class W, class T, class Lanes>
MASKED_SOFTMAX_INLINE LaneSums<W, 2> rest_and_maxima(const T* x, typename W::acc_t row_max,
                                                     const ScaledLog2e<typename W::acc_t>& c, Lanes lanes) {
  const W m = W::broadcast(row_max);
  const W exponent = W::broadcast(c.high);
  const W a = load<W>(x, lanes, 0);
  const W t = W::sub(a, m);
  const W part = W::sub(t, a);
  const W error = W::sub(W::sub(a, W::sub(t, part)), W::add(m, part));
  const W e = exp2_product<W, kTailBias>(t, exponent, W::fma(t, W::broadcast(c.low), W::mul(error, exponent)));
  return {{filled_lanes(W::zero_where_zero(t, e), lanes), filled_lanes(W::one_where_zero(t), lanes)}};
}

template <class acc_t>
MASKED_SOFTMAX_INLINE acc_t log_of_sum(acc_t rest, acc_t maxima) {
  const double others = (static_cast<double>(maxima) - 1.0) + std::ldexp(static_cast<double>(rest), -kTailBias);
  return static_cast<acc_t>(std::log1p(others));
}

// What becomes of an element: y[i] = e[i] * factor.
template <class acc_t>
struct Probability {
  const acc_t* e = nullptr;
  acc_t factor = 0;

  template <class As, class Lanes>
  MASKED_SOFTMAX_INLINE auto operator()(As, int64_t i, Lanes lanes) const {
    using W = typename As::type;
    return W::mul(load<W>(e + i, lanes, 0), W::broadcast(factor));
  }
};

// y[i] = scale * (x[i] - max) - log_sum
template <class acc_t, class T>
struct LogProbability {
  const T* x = nullptr;
  acc_t row_max = 0;
  acc_t scale = 0;
  acc_t log_sum = 0;

  template <class As, class Lanes>
  MASKED_SOFTMAX_INLINE auto operator()(As, int64_t i, Lanes lanes) const {
    using W = typename As::type;
    return W::sub(W::mul(distance<W>(x + i, row_max, lanes), W::broadcast(scale)), W::broadcast(log_sum));
  }
};

}  // namespace masked_softmax
