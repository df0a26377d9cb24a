// The exponentials of a row: see common/exponential.h. No branches, so those of a thread's elements overlap.
//
// float32 results use the polynomial, in fused multiply-adds. For d = scale * (x - max), a result may be off by
// (4 + |d|) * eps. The GPU's approximate instruction alone may be off by 2 eps, half of the 4; the polynomial is off by
// 0.02 eps, and has the same bits on every GPU. 16-bit results, rounded to 8 or 11 bits, use the instruction, but for
// log_softmax.
#pragma once

#include "cuda/groups.cuh"

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

// 2^(n + f) for |f| <= 1/2, where encoded = Exp2::kMagic + n. The magic constant contains the exponent bias, so the low
// bits of `encoded` are the exponent field of 2^n, and a shift moves them there. Precondition: n >= kMinExponent.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exp2_of_encoded(acc_t encoded, acc_t f) {
  constexpr int kFractionBits = std::numeric_limits<acc_t>::digits - 1;
  return exp2_polynomial(f) * bits_float(float_bits(encoded) << kFractionBits);
}

// exp(scale * (x - row_max)) times 2^kBias, and times a factor that all elements of the row have in common.
template <int kBias, class acc_t>
class RowExponential {
  using E = Exp2<acc_t>;

 public:
  // is_single: the row has one element, whose exponential is exactly 1. Relative to a rounded maximum it would be some
  // e, and e * (1 / e) is not always 1.
  MASKED_SOFTMAX_DEVICE RowExponential(const RowConstants<acc_t>& constants, acc_t row_max, bool is_single) {
    const ScaledLog2e<acc_t>& c = constants.log2e;
    const acc_t product = row_max * c.high;
    const bool has_offset = is_single || !(product > -kMaxProduct<acc_t> && product < kMaxProduct<acc_t>);
    const acc_t r = has_offset ? acc_t{0} : (product + E::kMagic) - E::kMagic;
    params_ = {has_offset ? row_max : acc_t{0}, (E::kMagic + kBias) - r, r + (E::kMinExponent - kBias), c.high, c.low};
    max_exponent_ = has_offset ? acc_t{0} : fused_multiply_add(row_max, c.low, fused_multiply_add(row_max, c.high, -r));
  }

  // Results below the smallest normal number are 0; NaN gives NaN, -inf gives 0.
  MASKED_SOFTMAX_DEVICE acc_t operator()(acc_t x) const {
    const acc_t a = x - params_.offset;
    const acc_t encoded = fused_multiply_add(a, params_.high, params_.magic_minus_r);
    const acc_t rounded = encoded - params_.magic_minus_r;  // a * c, rounded to an integer
    const acc_t f = fused_multiply_add(a, params_.low, fused_multiply_add(a, params_.high, -rounded));
    return select(rounded < params_.zero_below, acc_t{0}, exp2_of_encoded(encoded, f));
  }

  // The elements' exponentials are exp(scale * (x - offset)) * 2^(kBias - r). One of the two is 0.
  MASKED_SOFTMAX_DEVICE acc_t offset() const { return params_.offset; }
  MASKED_SOFTMAX_DEVICE acc_t r() const { return (E::kMagic + kBias) - params_.magic_minus_r; }

  // The common factor, and its inverse.
  MASKED_SOFTMAX_DEVICE acc_t factor() const { return exp2_polynomial(max_exponent_); }
  MASKED_SOFTMAX_DEVICE acc_t inverse_factor() const { return exp2_polynomial(-max_exponent_); }

 private:
  ExponentialParams<acc_t> params_;
  acc_t max_exponent_;  // the rounding error of r: log2 of the common factor
};

// exp(scale * (x - row_max)) for 16-bit results.
class ApproximateRowExponential {
 public:
  MASKED_SOFTMAX_DEVICE ApproximateRowExponential(const RowConstants<float>& constants, float row_max,
                                                  bool /*is_single*/)
      : row_max_(row_max), c_(constants.log2e.high) {}

  MASKED_SOFTMAX_DEVICE float operator()(float x) const { return exp2_approximate((x - row_max_) * c_); }

  MASKED_SOFTMAX_DEVICE float offset() const { return row_max_; }
  MASKED_SOFTMAX_DEVICE float r() const { return 0; }

 private:
  float row_max_;
  float c_;
};

// The exponential that softmax takes.
template <bool kApproximate, class acc_t>
using SoftmaxExponential = std::conditional_t<kApproximate, ApproximateRowExponential, RowExponential<0, acc_t>>;

// exp(y) for a saved log_softmax y, with an error that does not grow with |y|.
template <bool kApproximate, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exp_of_log(acc_t y, const RowConstants<acc_t>& constants) {
  using E = Exp2<acc_t>;
  const ScaledLog2e<acc_t>& log2e = constants.log2e;
  if constexpr (kApproximate) {
    return exp2_approximate(fused_multiply_add(y, log2e.high, y * log2e.low));
  } else {
    const acc_t encoded = fused_multiply_add(y, log2e.high, E::kMagic);
    const acc_t n = encoded - E::kMagic;
    const acc_t f = fused_multiply_add(y, log2e.low, fused_multiply_add(y, log2e.high, -n));
    return select(n < E::kMinExponent, acc_t{0}, exp2_of_encoded(encoded, f));
  }
}

// exp(t) for any t: 0 or infinity where it cannot be represented.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t exponential_function(acc_t t) {
  using E = Exp2<acc_t>;
  constexpr auto kLog2e = static_cast<acc_t>(0x1.71547652b82fep0);
  constexpr auto kLog2eLow = static_cast<acc_t>(sizeof(acc_t) == 4 ? 0x1.71547652b82fep0 - static_cast<double>(kLog2e)
                                                                   : 0x1.777d0ffda0d24p-56);
  const acc_t encoded = fused_multiply_add(t, kLog2e, E::kMagic);
  const acc_t n = encoded - E::kMagic;
  const acc_t f = fused_multiply_add(t, kLog2eLow, fused_multiply_add(t, kLog2e, -n));
  const acc_t result = select(n < E::kMinExponent, acc_t{0}, exp2_of_encoded(encoded, f));
  return select(n > E::kMaxExponent, std::numeric_limits<acc_t>::infinity(), result);
}

// The two sums of log_softmax: the biased rest, and the number of elements equal to the maximum (common/exponential.h).
template <class acc_t>
class LogSum {
 public:
  MASKED_SOFTMAX_DEVICE LogSum(const RowConstants<acc_t>& constants, acc_t row_max, bool is_single)
      : row_max_(row_max), exponential_(constants, row_max, is_single) {}

  // An element's term of the rest. Where x is the maximum, it is 0, and the element is counted.
  MASKED_SOFTMAX_DEVICE acc_t rest_term(acc_t x, Count<acc_t>& max_count) const {
    const bool is_max = x - row_max_ == 0;  // not x == row_max_: +inf gives NaN
    max_count.add(is_max ? acc_t{1} : acc_t{0});
    return select(is_max, acc_t{0}, exponential_(x));
  }

  // log(sum), given both sums over the row.
  MASKED_SOFTMAX_DEVICE acc_t value(acc_t rest, acc_t max_count) const {
    constexpr acc_t kUnbias = 0x1p-64;
    static_assert(kRestBias == 64, "kUnbias is 2^-kRestBias");
    return log_one_plus(fused_multiply_add(rest, kUnbias * exponential_.inverse_factor(), max_count - 1));
  }

 private:
  acc_t row_max_;
  RowExponential<kRestBias, acc_t> exponential_;
};

// scale * (x - row_max) - log_sum, right wherever it can be represented: RowConstants::halving.
template <class acc_t>
class LogResult {
 public:
  MASKED_SOFTMAX_DEVICE LogResult(const RowConstants<acc_t>& constants, acc_t row_max, acc_t log_sum)
      : constants_(constants), halved_max_(constants.halving * row_max), log_sum_(log_sum) {}

  MASKED_SOFTMAX_DEVICE acc_t operator()(acc_t x) const {
    const acc_t halved_distance = fused_multiply_add(x, constants_.halving, -halved_max_);
    return fused_multiply_add(halved_distance, constants_.halved_scale, -log_sum_);
  }

 private:
  const RowConstants<acc_t>& constants_;
  const acc_t halved_max_;
  const acc_t log_sum_;
};

}  // namespace masked_softmax::cuda
