// The exponential, as a power of two.
//
//   2^z = 2^n * 2^f,  n = z rounded to the nearest integer,  f = z - n in [-1/2, 1/2]
//
// with z = t * c (+ correction) never rounded as a whole: n comes out of adding a number so large that the sum's
// last bit counts ones, and f = fms(t, c, n) sees the exact product. What remains is the rounding of c and, where
// no correction is given, of t: at most |t*c| * eps together. 2^f is a polynomial with p(0) = 1, so exp(0) is
// exactly 1; its other coefficients minimise the largest relative error over the interval (Remez exchange in 50
// digits): degree 6 leaves 2.6e-9 (0.02 eps of float32), degree 11 leaves 1.8e-17 (0.08 eps of float64).
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

template <class acc_t>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kDegree = 6;
  static constexpr float kCoefficients[kDegree + 1] = {
      1.0f, 0x1.62e430p-1f, 0x1.ebfbe2p-3f, 0x1.c6ae72p-5f, 0x1.3b270ep-7f, 0x1.5f7278p-10f, 0x1.470b52p-13f,
  };
  // 1.5 * 2^23 rounds the sum to integers; the exponent's bias on top makes its low bits the exponent field of 2^n.
  static constexpr float kShift = 0x1.8p23f + 127.0f;
  static constexpr float kSmallestPower = -126.0f;
  // 2^f = 1 + f * (c0 + c1 * f + c2 * f^2) for |f| <= 1/32
  static constexpr float kSixteenthShift = 0x1.8p19f;
  static constexpr float kSixteenthCoefficients[3] = {0x1.62e43p-1f, 0x1.ebff92p-3f, 0x1.c6b29ap-5f};
};

template <>
struct Exp2<double> {
  static constexpr int kDegree = 11;
  static constexpr double kCoefficients[kDegree + 1] = {
      1.0,
      0x1.62e42fefa39f3p-1,
      0x1.ebfbdff82c598p-3,
      0x1.c6b08d7048f31p-5,
      0x1.3b2ab6fba1e1dp-7,
      0x1.5d87fe7bbbed8p-10,
      0x1.4309130960d86p-13,
      0x1.ffcbee3ac9a25p-17,
      0x1.62bfd49f5dcf5p-20,
      0x1.b54168266b234p-24,
      0x1.e605f89c37da9p-28,
      0x1.c062c3e8122dfp-32,
  };
  static constexpr double kShift = 0x1.8p52 + 1023.0;
  static constexpr double kSmallestPower = -1022.0;
};

// scale * log2(e) in two parts, high + low, so that exp(scale * t) = 2^(t * high + t * low).
template <class acc_t>
struct Exponent {
  acc_t high;
  acc_t low;

  explicit Exponent(double scale) {
    constexpr double kLog2e = 0x1.71547652b82fep0;
    constexpr double kLog2eRest = 0x1.777d0ffda0d24p-56;
    const double product = scale * kLog2e;
    const double rest = std::fma(scale, kLog2e, -product) + scale * kLog2eRest;
    high = static_cast<acc_t>(product);
    if (std::isfinite(scale) && !std::isfinite(high)) {
      high = std::copysign(std::numeric_limits<acc_t>::max(), high);  // 0 * infinity must not make a NaN of the maximum
    }
    low = static_cast<acc_t>((product - static_cast<double>(high)) + rest);
    if (!std::isfinite(low)) {
      low = acc_t{0};
    }
  }
};

// What the kernels need of a scale.
template <class acc_t>
struct RowScale {
  acc_t scale;
  Exponent<acc_t> exponent;

  explicit RowScale(double value) : scale(static_cast<acc_t>(value)), exponent(value) {}
};

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
