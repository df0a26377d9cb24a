// The constants of exp(scale * t) = 2^z, z = t * scale * log2(e), for every device.
//
//   2^z = 2^n * 2^f,  n = z rounded to the nearest integer,  f = z - n in [-1/2, 1/2]
//
// z itself is never rounded. Adding a magic constant, so large that the last bit of the sum counts integers, gives n;
// f = fma(t, c, -n) uses the exact product. 2^f is a minimax polynomial (Remez exchange in 50 digits) constrained to
// p(0) = 1, so that exp(0) is exactly 1. Error budget: degree 6 leaves 2.6e-9 (0.02 eps of float32), degree 11 leaves
// 1.8e-17 (0.08 eps of float64).
#pragma once

#include <cmath>
#include <limits>

namespace masked_softmax {

constexpr double kLog2 = 0x1.62e42fefa39efp-1;       // log(2)
constexpr double kLog2e = 0x1.71547652b82fep0;       // log2(e), rounded
constexpr double kLog2eLow = 0x1.777d0ffda0d24p-56;  // log2(e) - kLog2e

template <class acc_t>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kDegree = 6;
  static constexpr float kCoefficients[kDegree + 1] = {
      1.0f, 0x1.62e430p-1f, 0x1.ebfbe2p-3f, 0x1.c6ae72p-5f, 0x1.3b270ep-7f, 0x1.5f7278p-10f, 0x1.470b52p-13f,
  };
  // Adding 1.5 * 2^23 rounds to integers. With the exponent bias on top, the low bits of the sum are the exponent field
  // of 2^n.
  static constexpr float kMagic = 0x1.8p23f + 127.0f;
  // Of normal numbers.
  static constexpr float kMinExponent = -126.0f;
  static constexpr float kMaxExponent = 127.0f;
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
  static constexpr double kMagic = 0x1.8p52 + 1023.0;
  static constexpr double kMinExponent = -1022.0;
  static constexpr double kMaxExponent = 1023.0;
};

// scale * log2(e) as an unevaluated sum high + low, so that exp(scale * t) = 2^(t * high + t * low).
template <class acc_t>
struct ScaledLog2e {
  acc_t high;
  acc_t low;

  explicit ScaledLog2e(double scale) {
    const double product = scale * kLog2e;
    const double rest = std::fma(scale, kLog2e, -product) + scale * kLog2eLow;
    high = static_cast<acc_t>(product);
    if (std::isfinite(scale) && !std::isfinite(high)) {
      high = std::copysign(std::numeric_limits<acc_t>::max(), high);  // the maximum's 0 * infinity would be NaN
    }
    low = static_cast<acc_t>((product - static_cast<double>(high)) + rest);
    if (!std::isfinite(low)) {
      low = acc_t{0};
    }
  }
};

// The exponentials of a row, exp(scale * (x - reference)), are computed as 2^((x - offset) * c - r), with
// c = scale * log2(e) in two parts and r = reference * c rounded to the rounding step: an integer, or a fraction of one
// where a table of powers is used. For example, with scale 1, a step of 1 and offset 0:
//
//   reference = 3.0   reference * c = 4.328   r = 4
//   x = 3.0           x * c = 4.328   rounded = 4   n = rounded - r =  0   f =  0.328   2^n * 2^f = 1.2554
//   x = 2.0           x * c = 2.885   rounded = 3   n = rounded - r = -1   f = -0.115   2^n * 2^f = 0.4618
//
// Both are 2^0.328 times exp(x - reference), and the division by their sum cancels that factor: 0.4618 / 1.7172 is
// 1 / (1 + e).
//
// No difference is rounded: r is a multiple of the step, so n comes from one addition to x * c, and f from one fused
// multiply-add that is exact but for its own last bit. If x - max were rounded instead, many equal terms would put
// their sum off by half an eps for each unit of their distance from the maximum.
//
// Where max * c is too large for the step, max becomes the offset, and x - max is exact for all x that matter
// (Sterbenz).
template <class acc_t>
struct ExponentialParams {
  acc_t offset;
  acc_t magic_minus_r;  // adding it rounds to the step and subtracts r
  acc_t zero_below;     // a term whose rounded (x - offset) * c is below it is 0; unused with scalef (cpu/exp2.h)
  acc_t high;           // c
  acc_t low;
};

// The rounding step resolves products with c whose magnitude is below kMaxProduct. A sum with the magic constant is a
// multiple of a step of 1/K while the addend's magnitude is below 2^22 / K for float, 2^17 with K = 32, and below 2^51
// for double; the addend is x * c - r, a difference of two products.
template <class acc_t>
constexpr acc_t kMaxProduct = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p16) : static_cast<acc_t>(0x1p40);

// log_softmax computes log(sum) as log1p(sum - 1): the elements equal to the maximum are counted, and the exponentials
// of the rest are summed times 2^kRestBias. Without the bias, exponentials below the smallest normal number would be
// lost, and where one element alone is the maximum, its result is their sum.
constexpr int kRestBias = 64;

}  // namespace masked_softmax
