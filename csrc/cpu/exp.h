// The exponential over a vector, as a power of two: see common/exponential.h. What remains of rounding is that of c
// and, where no correction is given, of t: at most |t*c| * eps together.
//
// Where a register holds sixteen floats, 2^z = 2^floor(n) * 2^(k/16) * 2^f instead, n = z rounded to sixteenths and
// 2^(k/16) looked up in a register: |f| <= 1/32 asks for degree 3 (Chebyshev nodes; 2.3902e-9, 0.02005 eps), two fewer
// of the multiply-adds that bound the loop. (Zen 4: 14 percent less time for a row of 512 in cache.)
//
// Results below the smallest normal number are flushed to 0: they are less than one part in 2^126 of the row's
// sum, and arithmetic on subnormals costs some processors over a hundred cycles. NaN gives NaN, -inf gives 0.
#pragma once

#include "cpu/prelude.h"

namespace masked_softmax {

template <class V>
MASKED_SOFTMAX_INLINE V exp2_polynomial(V f) {
  using E = Exp2<typename V::acc_t>;
  V p = V::broadcast(E::kCoefficients[E::kDegree]);
  for (int i = E::kDegree - 1; i >= 0; --i) {
    p = V::fma(p, f, V::broadcast(E::kCoefficients[i]));
  }
  return p;
}

template <class V>
constexpr typename V::acc_t rounding_shift() {
  if constexpr (V::kHasSixteenthPowers) {
    return Exp2<typename V::acc_t>::kSixteenthShift;
  } else {
    return Exp2<typename V::acc_t>::kShift;
  }
}

// 2^(t * c + correction + kBias) for t * c <= 0 and a correction much smaller than 1, as a function: V correct(V f).
template <class V, int kBias = 0, class Correct>
MASKED_SOFTMAX_INLINE V exp2_corrected(V t, V c, const Correct& correct) {
  using E = Exp2<typename V::acc_t>;
  constexpr auto kShift = rounding_shift<V>() + kBias;
  const V shifted = V::fma(t, c, V::broadcast(kShift));
  const V n = V::sub(shifted, V::broadcast(kShift));
  const V f = correct(V::fms(t, c, n));
  V power;
  if constexpr (V::kHasSixteenthPowers) {
    V q = V::fma(V::broadcast(E::kSixteenthCoefficients[2]), f, V::broadcast(E::kSixteenthCoefficients[1]));
    q = V::fma(q, f, V::broadcast(E::kSixteenthCoefficients[0]));
    const V sixteenth = V::sixteenth_powers(shifted);
    power = V::fma(V::mul(sixteenth, f), q, sixteenth);
  } else {
    power = exp2_polynomial(f);
  }
  const V exponent = kBias == 0 ? n : V::sub(shifted, V::broadcast(rounding_shift<V>()));
  return V::scale_by_power(power, exponent, shifted, E::kSmallestPower);
}

// 2^(t * c)
template <class V>
MASKED_SOFTMAX_INLINE V exp2_product(V t, V c) {
  return exp2_corrected(t, c, [](V f) MASKED_SOFTMAX_LAMBDA_INLINE { return f; });
}

// 2^(t * c + correction + kBias)
template <class V, int kBias = 0>
MASKED_SOFTMAX_INLINE V exp2_product(V t, V c, V correction) {
  return exp2_corrected<V, kBias>(t, c, [&](V f) MASKED_SOFTMAX_LAMBDA_INLINE { return V::add(f, correction); });
}

}  // namespace masked_softmax
