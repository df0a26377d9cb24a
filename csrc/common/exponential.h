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
  static constexpr float kMinExponent = -126.0f;
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
};

// scale * log2(e) as an unevaluated sum high + low, so that exp(scale * t) = 2^(t * high + t * low).
template <class acc_t>
struct ScaledLog2e {
  acc_t high;
  acc_t low;

  explicit ScaledLog2e(double scale) {
    constexpr double kLog2e = 0x1.71547652b82fep0;
    constexpr double kLog2eLow = 0x1.777d0ffda0d24p-56;
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

// log_softmax computes log(sum) as log1p(sum - 1): the elements equal to the maximum are counted, and the exponentials
// of the rest are summed times 2^kRestBias. Without the bias, exponentials below the smallest normal number would be
// lost, and where one element alone is the maximum, its result is their sum.
constexpr int kRestBias = 64;

}  // namespace masked_softmax
