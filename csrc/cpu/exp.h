// The exponential over a vector, as a power of two: see common/exponential.h. What remains of rounding is that of c
// and, where no correction is given, of t: at most |t*c| * eps together.
//
// Where a register or two hold a table of 2^(k/steps) (8 floats, or 32), 2^z = 2^(n + k/steps) * 2^f instead, z rounded
// to multiples of 1/steps: the smaller f asks for degree 3, or 2, and that is fewer of the multiply-adds that bound the
// loop. (Zen 4, a row of 512 in cache: 25 percent less time with 8, 20 percent less with 32.)
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

// 2^f = 1 + f * (c0 + c1 * f + ...) for |f| <= 1 / (2 * kSteps), so that the largest error is least.
template <int kSteps>
struct FractionCoefficients;

template <>
struct FractionCoefficients<8> {  // 2.6185e-8, 0.22 eps
  static constexpr int kCount = 3;
  static constexpr float kValues[kCount] = {0x1.62e43p-1f, 0x1.ec0c32p-3f, 0x1.c6b99ap-5f};
};

template <>
struct FractionCoefficients<32> {  // 5.3748e-8, 0.45 eps
  static constexpr int kCount = 2;
  static constexpr float kValues[kCount] = {0x1.62e586p-1f, 0x1.ebfea8p-3f};
};

// What rounds a sum to multiples of 1/kPowerSteps: its last bit counts them.
template <class V>
constexpr typename V::acc_t rounding_shift() {
  if constexpr (V::kPowerSteps > 1) {
    return 0x1.8p23f / V::kPowerSteps;
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
  const V power = V::power(shifted);
  const V smallest = V::broadcast(E::kSmallestPower - kBias);
  if constexpr (V::kPowerSteps > 1) {
    using C = FractionCoefficients<V::kPowerSteps>;
    V q = V::broadcast(C::kValues[C::kCount - 1]);
    for (int i = C::kCount - 2; i >= 0; --i) {
      q = V::fma(q, f, V::broadcast(C::kValues[i]));
    }
    return V::zero_where_less(n, smallest, V::fma(V::mul(power, f), q, power));
  } else {
    return V::zero_where_less(n, smallest, V::mul(exp2_polynomial(f), power));
  }
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
