// The exponential of one element: see common/exponential.h.
//
// In fused multiply-adds, not in the GPU's own approximate instruction: that one leaves 2 eps, of the 4 that a float32
// result may be off by, and the polynomial has the same bits on every GPU and in the emulator. Bandwidth hides it: a
// float32 element has 50 instructions' time on an H200. A 16-bit result, which is rounded to 8 or 11 bits and has 25,
// takes the instruction.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernel_problem.h"

namespace masked_softmax {
namespace cuda {

template <class acc_t, int kPower = 0>
MASKED_SOFTMAX_DEVICE acc_t exp2_polynomial(acc_t f) {
  using E = Exp2<acc_t>;
  constexpr acc_t kCoefficient = E::kCoefficients[kPower];
  if constexpr (kPower == E::kDegree) {
    return kCoefficient;
  } else {
    return fused_multiply_add(exp2_polynomial<acc_t, kPower + 1>(f), f, kCoefficient);
  }
}

// 2^(t * c + correction + kBias) for t * c <= 0 and a correction much smaller than 1. Below the smallest normal number
// it is 0; NaN gives NaN, -inf gives 0.
template <int kBias = 0, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exp2_product(acc_t t, acc_t c, acc_t correction = 0) {
  using E = Exp2<acc_t>;
  constexpr acc_t kShift = E::kMagic + kBias;
  constexpr int kFractionBits = std::numeric_limits<acc_t>::digits - 1;
  const acc_t shifted = fused_multiply_add(t, c, kShift);
  const acc_t n = shifted - kShift;
  const acc_t f = fused_multiply_add(t, c, -n) + correction;
  const acc_t power = bits_float(float_bits(shifted) << kFractionBits);  // 2^(n + kBias)
  return n < E::kMinExponent - kBias ? acc_t{0} : exp2_polynomial(f) * power;
}

// What a kernel needs of the scale, in the type that it computes in.
template <class acc_t>
struct Scaling {
  acc_t factor;  // that elements are multiplied by as they come
  acc_t scale;
  acc_t exponent;
  acc_t exponent_low;

  MASKED_SOFTMAX_DEVICE explicit Scaling(const KernelProblem& problem)
      : factor(static_cast<acc_t>(problem.factor)), scale(static_cast<acc_t>(problem.scale)) {
    if constexpr (std::is_same_v<acc_t, float>) {
      exponent = problem.exponent_float.high;
      exponent_low = problem.exponent_float.low;
    } else {
      exponent = problem.exponent_double.high;
      exponent_low = problem.exponent_double.low;
    }
  }
};

// x - max, and its rounding error (TwoDiff: Knuth, as Sum in groups.cuh).
template <class acc_t>
struct Distance {
  acc_t t;
  acc_t error;

  MASKED_SOFTMAX_DEVICE Distance(acc_t x, acc_t row_max) : t(x - row_max) {
    const acc_t part = t - x;
    error = (x - (t - part)) - (row_max + part);
  }
};

// What the rounding of x - max and of the exponent leaves out: many equal terms would put their sum off by half an eps
// for each unit of their distance.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exponent_correction(const Distance<acc_t>& distance, const Scaling<acc_t>& scaling) {
  return fused_multiply_add(distance.t, scaling.exponent_low, distance.error * scaling.exponent);
}

// exp(scale * (x - max))
template <bool kApproximate, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exponential(const Distance<acc_t>& distance, const Scaling<acc_t>& scaling) {
  if constexpr (kApproximate) {
    return exp2_approximate(distance.t * scaling.exponent);
  } else {
    return exp2_product(distance.t, scaling.exponent, exponent_correction(distance, scaling));
  }
}

// The same times 2^kTailBias.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t rest_term(const Distance<acc_t>& distance, const Scaling<acc_t>& scaling) {
  return exp2_product<kTailBias>(distance.t, scaling.exponent, exponent_correction(distance, scaling));
}

// exp(y) for a saved log_softmax y, whose error does not grow with |y|.
template <bool kApproximate, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exponential_of_log(acc_t y, const Scaling<acc_t>& log2e) {
  if constexpr (kApproximate) {
    return exp2_approximate(fused_multiply_add(y, log2e.exponent, y * log2e.exponent_low));
  } else {
    return exp2_product(y, log2e.exponent, y * log2e.exponent_low);
  }
}

// log(sum(e)) from the sum of all but the maxima, times 2^kTailBias, and how many maxima there are.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t log_of_sum(acc_t rest, acc_t maxima) {
  constexpr acc_t kUnbias = 0x1p-64;
  static_assert(kTailBias == 64, "kUnbias takes the bias away again");
  return log_one_plus(fused_multiply_add(rest, kUnbias, maxima - 1));
}

}  // namespace cuda
}  // namespace masked_softmax
