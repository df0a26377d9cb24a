// The exponential over a vector, as a power of two: see common/exponential.h. What is off: the polynomial (0.02 eps, or
// with a table 0.22 or 0.45), half an eps for a table's entry, half an eps for the last operation.
//
// Where a register or two hold a table of 2^(k/steps) (8 floats, or 32), 2^z = 2^(n + k/steps) * 2^f instead, z rounded
// to multiples of 1/steps: the smaller f asks for degree 3, or 2, and that is fewer of the multiply-adds that bound the
// loop. (Zen 4, November 2026, a row of 512 in cache: 25 percent less time with 8, 20 percent less with 32.)
//
// Results below the smallest normal number are flushed to 0, except by vectors that scale by powers: they are less than
// one part in 2^126 of the row's sum, and arithmetic on subnormals costs some processors over a hundred cycles. NaN
// gives NaN, -inf gives 0.
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
    return Exp2<typename V::acc_t>::kMagic;
  }
}

// power * 2^f, |f| <= 1 / (2 * kPowerSteps).
template <class V>
MASKED_SOFTMAX_INLINE V times_fraction(V power, V f) {
  using C = FractionCoefficients<V::kPowerSteps>;
  V q = V::broadcast(C::kValues[C::kCount - 1]);
  for (int i = C::kCount - 2; i >= 0; --i) {
    q = V::fma(q, f, V::broadcast(C::kValues[i]));
  }
  return V::fma(V::mul(power, f), q, power);
}

// 2^(n + f), n being what the sum `shifted` was rounded to.
template <class V>
MASKED_SOFTMAX_INLINE V power_of_two(V shifted, V f) {
  if constexpr (V::kPowerSteps > 1) {
    return times_fraction(V::power(shifted), f);
  } else {
    return V::mul(exp2_polynomial(f), V::power(shifted));
  }
}

// How a row's exponentials exp(scale * (x - max)) are taken: as 2^((x - offset) * c - grid).
//
// `grid` is reference * c rounded to what powers are looked up for, so that no difference is ever rounded: the nearest
// power's exponent comes out of (x * c - grid), and what is left of it for the polynomial is one fused multiply-add,
// exact but for its own last bit. All terms are off by the same factor, 2^(grid - max * c), which their sum takes away
// again. Were x - max rounded instead, many equal terms would put their sum off by half an eps for each unit of their
// distance.
//
// The factor being of no consequence, the reference need not be the maximum: any element will do that is so near to it
// that the sum does not overflow, and then the row is read once, not twice. So the larger of its ends is tried first
// (row_reference), and a row whose sum is too large (is_sum_too_large) is computed again from its maximum, with
// kOffset: where max * c is too large for the grid, x - max is exact for every x that matters (Sterbenz), and then it
// is the offset.
template <class acc_t>
struct RowExponent {
  acc_t offset;
  acc_t shift;  // rounds to the grid, and takes `grid` away
  acc_t least;  // that a rounded (x - offset) * c may be; where the vectors scale by powers: that x - offset may be
  acc_t high;   // c in two parts
  acc_t low;
};

// Both ends: scores that somebody has masked by -inf or a large negative number are masked at one of them, or in
// between.
template <class acc_t>
MASKED_SOFTMAX_INLINE acc_t row_reference(acc_t first, acc_t last) {
  return first > last ? first : last;
}

// Whether the reference was no good: too small for the sum, or for the grid, or not finite. The sum of a good one is at
// least its own exponential. A NaN is too large.
template <class acc_t>
MASKED_SOFTMAX_INLINE bool is_sum_too_large(acc_t sum) {
  constexpr acc_t kMost = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p126) : static_cast<acc_t>(0x1p1022);
  return !(sum >= 0 && sum <= kMost);
}

// Whose product with c is no less does not fit the grid; and what makes infinity of such a product.
template <class acc_t>
constexpr acc_t kFarFromGrid = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p16) : static_cast<acc_t>(0x1p40);
template <class acc_t>
constexpr acc_t kFarToInfinity = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p112) : static_cast<acc_t>(0x1p984);

template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_on_grid(typename V::acc_t grid,
                                                                      const ScaledLog2e<typename V::acc_t>& c) {
  using acc_t = typename V::acc_t;
  constexpr acc_t kUnderflows = -200;  // 2^-200 is 0, whatever it is multiplied with here
  const acc_t least = V::kScalesByPowers ? (grid + kUnderflows) * (1 / c.high) : grid + Exp2<acc_t>::kMinExponent;
  return {0, rounding_shift<V>() - grid, least, c.high, c.low};
}

// A reference too large for the grid, or not finite, makes NaNs of the row's exponentials. No branch depends on it.
template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_from_reference(typename V::acc_t reference,
                                                                             const ScaledLog2e<typename V::acc_t>& c) {
  using acc_t = typename V::acc_t;
  const acc_t product = reference * c.high;
  const acc_t far = product * kFarToInfinity<acc_t>;
  auto exponent = exponent_on_grid<V>((product + rounding_shift<V>()) - rounding_shift<V>(), c);
  exponent.shift += far - far;
  return exponent;
}

template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_from_maximum(typename V::acc_t row_max,
                                                                           const ScaledLog2e<typename V::acc_t>& c) {
  using acc_t = typename V::acc_t;
  const acc_t product = row_max * c.high;
  if (product > -kFarFromGrid<acc_t> && product < kFarFromGrid<acc_t>) {
    return exponent_on_grid<V>((product + rounding_shift<V>()) - rounding_shift<V>(), c);
  }
  auto exponent = exponent_on_grid<V>(0, c);
  exponent.offset = row_max;
  return exponent;
}

// A row of one element: exactly 1, or NaN.
template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_of_single() {
  return {0, rounding_shift<V>(), -std::numeric_limits<typename V::acc_t>::infinity(), 0, 0};
}

template <bool kOffset, class V>
MASKED_SOFTMAX_INLINE V exponential_of(V x, const RowExponent<typename V::acc_t>& exponent) {
  using acc_t = typename V::acc_t;
  V a = kOffset ? V::sub(x, V::broadcast(exponent.offset)) : x;
  const V least = V::broadcast(exponent.least);
  const V high = V::broadcast(exponent.high);
  const V shift = V::broadcast(exponent.shift);
  constexpr acc_t kShift = rounding_shift<V>();
  if constexpr (V::kScalesByPowers) {
    a = V::max(least, a);  // -inf would make a NaN of f
  }
  V shifted = V::fma(a, high, shift);
  if constexpr (!V::kScalesByPowers) {
    // The largest power there is. Beyond it a term is at least as large, f being positive, and its sum too large.
    shifted = V::min(V::broadcast(kShift - Exp2<acc_t>::kMinExponent + 1), shifted);
  }
  const V rounded = V::sub(shifted, shift);  // a * c, as a multiple of the grid
  const V f = V::fma(a, V::broadcast(exponent.low), V::fms(a, high, rounded));
  if constexpr (V::kScalesByPowers) {
    return V::scale_by_power(times_fraction(V::fraction_power(shifted), f), V::sub(shifted, V::broadcast(kShift)));
  } else {
    return V::zero_where_less(rounded, least, power_of_two(shifted, f));
  }
}

// 2^(t * c + correction + kBias) for t * c <= 0 and a correction much smaller than 1.
template <class V, int kBias = 0>
MASKED_SOFTMAX_INLINE V exp2_product(V t, V c, V correction) {
  using E = Exp2<typename V::acc_t>;
  constexpr auto kShift = rounding_shift<V>() + kBias;
  const V shifted = V::fma(t, c, V::broadcast(kShift));
  const V n = V::sub(shifted, V::broadcast(kShift));
  const V f = V::add(V::fms(t, c, n), correction);
  return V::zero_where_less(n, V::broadcast(E::kMinExponent - kBias), power_of_two(shifted, f));
}

}  // namespace masked_softmax
