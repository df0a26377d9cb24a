// The exponential of one element: see common/exponential.h.
//
// float32 results use the polynomial, in fused multiply-adds. For d = scale * (x - max), a result may be off by
// (4 + |d|) * eps. The GPU's approximate instruction alone may be off by 2 eps, half of the 4; the polynomial is off by
// 0.02 eps, and has the same bits on every GPU. 16-bit results, rounded to 8 or 11 bits, use the instruction.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernel_problem.h"

namespace masked_softmax::cuda {

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

// 2^(t * c + correction + kBias) for t * c <= 0 and a correction much smaller than 1. Results below the smallest normal
// number are 0; NaN gives NaN, -inf gives 0.
template <int kBias = 0, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exp2_product(acc_t t, acc_t c, acc_t correction = 0) {
  using E = Exp2<acc_t>;
  constexpr acc_t kMagic = E::kMagic + kBias;
  constexpr int kFractionBits = std::numeric_limits<acc_t>::digits - 1;
  const acc_t rounded = fused_multiply_add(t, c, kMagic);
  const acc_t n = rounded - kMagic;
  const acc_t f = fused_multiply_add(t, c, -n) + correction;
  // 2^(n + kBias). kMagic contains the exponent bias, so the low bits of `rounded` are those of the power's exponent
  // field, and the shift moves them there.
  const acc_t power = bits_float(float_bits(rounded) << kFractionBits);
  return n < E::kMinExponent - kBias ? acc_t{0} : exp2_polynomial(f) * power;
}

// KernelProblem's scale in the accumulation type.
template <class acc_t>
struct Scaling {
  acc_t factor;  // input_factor
  acc_t scale;   // kernel_scale
  ScaledLog2e<acc_t> log2e;

  MASKED_SOFTMAX_DEVICE explicit Scaling(const KernelProblem& kernel_problem)
      : factor(static_cast<acc_t>(kernel_problem.input_factor)),
        scale(static_cast<acc_t>(kernel_problem.kernel_scale)),
        log2e(log2e_of(kernel_problem)) {}

 private:
  MASKED_SOFTMAX_DEVICE static ScaledLog2e<acc_t> log2e_of(const KernelProblem& kernel_problem) {
    if constexpr (std::is_same_v<acc_t, float>) {
      return kernel_problem.log2e_float;
    } else {
      return kernel_problem.log2e_double;
    }
  }
};

// x - row_max and its rounding error (TwoDiff: Knuth, as Sum in groups.cuh). Where the error is not used, as for 16-bit
// results, the compiler removes its computation.
template <class acc_t>
struct Distance {
  acc_t t;
  acc_t error;

  MASKED_SOFTMAX_DEVICE Distance(acc_t x, acc_t row_max) : t(x - row_max) {
    const acc_t part = t - x;
    error = (x - (t - part)) - (row_max + part);
  }

  // What the rounding of t and of log2e leaves out of the exponent. Without it, the sum of many equal terms would be
  // off by half an eps for each unit of their distance.
  MASKED_SOFTMAX_DEVICE acc_t correction(const ScaledLog2e<acc_t>& log2e) const {
    return fused_multiply_add(t, log2e.low, error * log2e.high);
  }
};

// exp(scale * (x - row_max))
template <bool kApproximate, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exp_of_distance(const Distance<acc_t>& distance, const Scaling<acc_t>& scaling) {
  if constexpr (kApproximate) {
    return exp2_approximate(distance.t * scaling.log2e.high);
  } else {
    return exp2_product(distance.t, scaling.log2e.high, distance.correction(scaling.log2e));
  }
}

// The same times 2^kRestBias: a term of log_softmax's rest (common/exponential.h).
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t rest_term(const Distance<acc_t>& distance, const Scaling<acc_t>& scaling) {
  return exp2_product<kRestBias>(distance.t, scaling.log2e.high, distance.correction(scaling.log2e));
}

// exp(y) for a saved log_softmax y, with an error that does not grow with |y|.
template <bool kApproximate, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exp_of_log(acc_t y, const Scaling<acc_t>& scaling) {
  const ScaledLog2e<acc_t>& log2e = scaling.log2e;
  if constexpr (kApproximate) {
    return exp2_approximate(fused_multiply_add(y, log2e.high, y * log2e.low));
  } else {
    return exp2_product(y, log2e.high, y * log2e.low);
  }
}

// log(sum) from the biased rest and the number of elements equal to the maximum.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t log_of_sum(acc_t rest, acc_t max_count) {
  constexpr acc_t kUnbias = 0x1p-64;
  static_assert(kRestBias == 64, "kUnbias is 2^-kRestBias");
  return log_one_plus(fused_multiply_add(rest, kUnbias, max_count - 1));
}

}  // namespace masked_softmax::cuda
