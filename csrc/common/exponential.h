// The numbers behind exp(scale * t) = 2^z, z = t * scale * log2(e), on every device.
//
//   2^z = 2^n * 2^f,  n = z rounded to the nearest integer,  f = z - n in [-1/2, 1/2]
//
// with z never rounded as a whole: n comes out of adding a number so large that the sum's last bit counts ones, and
// f = fma(t, c, -n) sees the exact product. 2^f is a polynomial with p(0) = 1, so exp(0) is exactly 1; its other
// coefficients minimise the largest relative error over the interval (Remez exchange in 50 digits): degree 6 leaves
// 2.6e-9 (0.02 eps of float32), degree 11 leaves 1.8e-17 (0.08 eps of float64).
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
  // 1.5 * 2^23 rounds the sum to integers; the exponent's bias on top makes its low bits the exponent field of 2^n.
  static constexpr float kShift = 0x1.8p23f + 127.0f;
  static constexpr float kSmallestPower = -126.0f;
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

// The rest of a log_softmax is summed times 2^kRestBias: many exponentials below the smallest normal number may add up
// to one above it, and then it is the maximum's whole result.
constexpr int kRestBias = 64;

}  // namespace masked_softmax
