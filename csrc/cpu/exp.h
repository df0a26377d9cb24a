// The exponential over a vector, as a power of two: see common/exponential.h. What is off: the polynomial (0.02 eps, or
// with a table 0.22 or 0.45), half an eps for a table's entry, half an eps for the last operation.
//
// Where a register or two hold a table of 2^(k/steps) (8 floats, or 32), 2^z = 2^(n + k/steps) * 2^f instead, z rounded
// to multiples of 1/steps: the smaller f asks for degree 3, or 2, and that is fewer of the multiply-adds that bound the
// loop. (Zen 4, November 2026, a row of 512 in cache: 25 percent less time with 8, 20 percent less with 32.)
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

// 2^(n + f), n being what the sum `shifted` was rounded to.
template <class V>
MASKED_SOFTMAX_INLINE V power_of_two(V shifted, V f) {
  const V power = V::power(shifted);
  if constexpr (V::kPowerSteps > 1) {
    using C = FractionCoefficients<V::kPowerSteps>;
    V q = V::broadcast(C::kValues[C::kCount - 1]);
    for (int i = C::kCount - 2; i >= 0; --i) {
      q = V::fma(q, f, V::broadcast(C::kValues[i]));
    }
    return V::fma(V::mul(power, f), q, power);
  } else {
    return V::mul(exp2_polynomial(f), power);
  }
}

// How a row's exponentials exp(scale * (x - max)) are taken: as 2^((x - offset) * c - grid).
//
// `grid` is max * c rounded to what powers are looked up for, so that no difference is ever rounded: the nearest
// power's exponent comes out of (x * c - grid), and what is left of it for the polynomial is one fused multiply-add,
// exact but for its own last bit. All terms are off by the same factor, 2^(grid - max * c), which their sum takes away
// again. Were x - max rounded instead, many equal terms would put their sum off by half an eps for each unit of their
// distance. Where max * c is too large for the grid, x - max is exact for every x that matters (Sterbenz): then it is
// the offset.
template <class acc_t>
struct RowExponent {
  acc_t offset;
  acc_t shift;     // rounds to the grid, and takes `grid` away
  acc_t smallest;  // that a rounded (x - offset) * c may be
  acc_t high;      // c in two parts
  acc_t low;
};

// For a few rows of these maxima; is_single(row) says which have one element.
template <class V, int kRows, class IsSingle>
MASKED_SOFTMAX_INLINE void find_exponents(const typename V::acc_t* maxima, const Exponent<typename V::acc_t>& c,
                                          const IsSingle& is_single, RowExponent<typename V::acc_t>* exponents) {
  using acc_t = typename V::acc_t;
  constexpr acc_t kMost = sizeof(acc_t) == 4 ? 0x1p16 : 0x1p40;
  constexpr acc_t kShift = rounding_shift<V>();
  acc_t offsets[kRows];
  acc_t grids[kRows];
  for (int r = 0; r < kRows; ++r) {  // a loop that the compiler makes vectors of
    const acc_t product = maxima[r] * c.high;
    const bool is_near = (product > -kMost) & (product < kMost);
    const acc_t rounded = (product + kShift) - kShift;
    offsets[r] = is_near ? acc_t{0} : maxima[r];
    grids[r] = is_near ? rounded : acc_t{0};
  }
  for (int r = 0; r < kRows; ++r) {
    exponents[r] = {offsets[r], kShift - grids[r], grids[r] + Exp2<acc_t>::kSmallestPower, c.high, c.low};
    if (is_single(r)) {  // exactly 1, or NaN
      exponents[r] = {0, kShift, Exp2<acc_t>::kSmallestPower, 0, 0};
    }
  }
}

template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> row_exponent(typename V::acc_t row_max, int64_t length,
                                                                  const Exponent<typename V::acc_t>& c) {
  RowExponent<typename V::acc_t> exponent;
  find_exponents<V, 1>(&row_max, c, [&](int) MASKED_SOFTMAX_LAMBDA_INLINE { return length == 1; }, &exponent);
  return exponent;
}

// kIsTaken: the offset is taken away already.
template <bool kIsTaken, class V>
MASKED_SOFTMAX_INLINE V exponential_of(V x, const RowExponent<typename V::acc_t>& exponent) {
  const V a = kIsTaken ? x : V::sub(x, V::broadcast(exponent.offset));
  const V high = V::broadcast(exponent.high);
  const V shift = V::broadcast(exponent.shift);
  const V shifted = V::fma(a, high, shift);
  const V rounded = V::sub(shifted, shift);  // a * c, as a multiple of the grid
  const V f = V::fma(a, V::broadcast(exponent.low), V::fms(a, high, rounded));
  return V::zero_where_less(rounded, V::broadcast(exponent.smallest), power_of_two(shifted, f));
}

// 2^(t * c + correction + kBias) for t * c <= 0 and a correction much smaller than 1.
template <class V, int kBias = 0>
MASKED_SOFTMAX_INLINE V exp2_product(V t, V c, V correction) {
  using E = Exp2<typename V::acc_t>;
  constexpr auto kShift = rounding_shift<V>() + kBias;
  const V shifted = V::fma(t, c, V::broadcast(kShift));
  const V n = V::sub(shifted, V::broadcast(kShift));
  const V f = V::add(V::fms(t, c, n), correction);
  return V::zero_where_less(n, V::broadcast(E::kSmallestPower - kBias), power_of_two(shifted, f));
}

}  // namespace masked_softmax
