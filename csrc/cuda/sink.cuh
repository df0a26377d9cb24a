// The sink of a row: one more term of its sum, exp(sink), that no element gets.
//
// The maximum and the sum are first taken over the elements alone, in the order of SumOrder (launch_plan.h), and every
// thread that shares the row then adds the sink's term to the total. So the strategies differ in nothing but where the
// row's elements are, and a row with a sink has the same bits with all of them. A sink of -inf adds nothing: the row
// has the bits that it has without one.
//
// All rows of a call have a sink or none has, so the branch on it is uniform.
#pragma once

#include "cuda/exp2.cuh"
#include "cuda/row.cuh"

namespace masked_softmax::cuda {

// What forward passes take as the maximum of a row with a sink. Where it is -inf (an empty row, or one of -inf alone),
// the exponentials relative to it would be NaN. Beside a sink they must be 0.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t max_beside_sink(acc_t max) {
  return max == -std::numeric_limits<acc_t>::infinity() ? acc_t{0} : max;
}

// sink - scale * offset, more precise than acc_t, so that the error of its exponential does not grow with it: one
// double for float, an unevaluated sum for double.
template <class acc_t>
class SinkDistance;

template <>
class SinkDistance<float> {
 public:
  MASKED_SOFTMAX_DEVICE SinkDistance(double sink, double scale, float offset)
      : value_(fused_multiply_add(-scale, static_cast<double>(offset), sink)) {}

  MASKED_SOFTMAX_DEVICE SinkDistance operator-(float other) const {
    return SinkDistance(value_ - static_cast<double>(other));
  }
  MASKED_SOFTMAX_DEVICE SinkDistance operator-() const { return SinkDistance(-value_); }
  MASKED_SOFTMAX_DEVICE float rounded() const { return static_cast<float>(value_); }

  MASKED_SOFTMAX_DEVICE float exponential() const { return exponential_times_exp2(0); }
  // exp(distance) * 2^-r: 0 or infinity where it cannot be represented.
  MASKED_SOFTMAX_DEVICE float exponential_times_exp2(float minus_r) const {
    using E = Exp2<float>;
    const double z = fused_multiply_add(value_, kLog2e, static_cast<double>(minus_r));
    const float encoded = static_cast<float>(z) + E::kMagic;
    const float n = encoded - E::kMagic;
    const float result = exp2_of_encoded(encoded, static_cast<float>(z - static_cast<double>(n)));
    const float or_zero = n < E::kMinExponent ? 0.0f : result;
    return n > E::kMaxExponent ? std::numeric_limits<float>::infinity() : or_zero;
  }

 private:
  MASKED_SOFTMAX_DEVICE explicit SinkDistance(double value) : value_(value) {}

  double value_;
};

template <>
class SinkDistance<double> {
 public:
  MASKED_SOFTMAX_DEVICE SinkDistance(double sink, double scale, double offset) {
    const double product = -scale * offset;
    high_ = product + sink;
    low_ = error_of_sum(product, sink, high_) + fused_multiply_add(-scale, offset, -product);
  }

  MASKED_SOFTMAX_DEVICE SinkDistance operator-(double other) const {
    const double high = high_ - other;
    return {high, error_of_sum(high_, -other, high) + low_};
  }
  MASKED_SOFTMAX_DEVICE SinkDistance operator-() const { return {-high_, -low_}; }
  MASKED_SOFTMAX_DEVICE double rounded() const { return high_; }

  MASKED_SOFTMAX_DEVICE double exponential() const {
    const double value = exponential_function(high_);
    const bool has_error = value <= std::numeric_limits<double>::max() && low_ - low_ == 0;
    return has_error ? fused_multiply_add(value, low_, value) : value;
  }

 private:
  MASKED_SOFTMAX_DEVICE SinkDistance(double high, double low) : high_(high), low_(low) {}

  double high_;
  double low_;  // may be NaN if high_ is infinite
};

// Of a row: the inverse of its sum, or the sum's logarithm; and the sink's share of it, Problem::row_result.
template <class acc_t>
struct SumWithSink {
  acc_t value;
  acc_t weight;
};

template <class acc_t>
class Sink {
 public:
  // row_max: that of the elements, as max_beside_sink() returns it. is_empty: whether the row has no element.
  MASKED_SOFTMAX_DEVICE Sink(const KernelProblem& kernel_problem, double sink, acc_t row_max, bool is_empty)
      : exists_(sink != -std::numeric_limits<double>::infinity()),
        is_empty_(is_empty),
        // In torch.softmax, a row with +inf is NaN.
        sink_(sink == std::numeric_limits<double>::infinity() ? std::numeric_limits<double>::quiet_NaN() : sink),
        scale_(kernel_problem.constants_double.scale),  // in float, it would be off by an eps of its product with max
        row_max_(row_max) {}

  // Returns the inverse of the sum. row_sum: of the elements' exponentials.
  template <class Exponential>
  MASKED_SOFTMAX_DEVICE SumWithSink<acc_t> added_to(acc_t row_sum, const Exponential& exponential) const {
    constexpr acc_t kNaN = std::numeric_limits<acc_t>::quiet_NaN();
    constexpr acc_t kMax = std::numeric_limits<acc_t>::max();
    if (!exists_) {
      const acc_t sum = row_sum == 0 ? kNaN : row_sum;
      return {reciprocal(sum), weight_of_no_sink(sum)};
    }
    const acc_t term = term_beside(exponential);
    // The sum of the elements is their number at most. Beside such a term, their results are below the smallest normal
    // number. An infinite sum would make them NaN: see reciprocal().
    const bool is_all = term > kMax / 2 || (row_sum == 0 && sink_ == sink_);
    if (is_all) {
      const acc_t zero = row_sum - row_sum;  // NaN if an element is
      return {zero, 1 + zero};
    }
    // Divided by 4, the sum has a normal inverse. The product with 1/4 may be subnormal, where the elements' results
    // are around the smallest normal number.
    const acc_t inverse = reciprocal((row_sum + term) / 4) / 4;
    return {inverse, term * inverse};
  }

  // log_sum: log of the sum of exp(scale * (x - row_max)).
  MASKED_SOFTMAX_DEVICE SumWithSink<acc_t> added_to_log(acc_t log_sum) const {
    if (!exists_) {
      return {log_sum, weight_of_no_sink(log_sum)};
    }
    constexpr acc_t kMax = std::numeric_limits<acc_t>::max();
    const SinkDistance<acc_t> distance(sink_, scale_, row_max_);
    if (log_sum < -kMax) {  // no element is above -inf; a finite value keeps -inf - value from being NaN
      const acc_t log_term = distance.rounded();
      const acc_t zero = static_cast<acc_t>(sink_ - sink_);
      return {log_term < -kMax ? -kMax : log_term, 1 + zero};
    }
    const SinkDistance<acc_t> difference = distance - log_sum;
    const bool is_larger = difference.rounded() > 0;
    const acc_t ratio = (is_larger ? -difference : difference).exponential();
    const acc_t total = (is_larger ? distance.rounded() : log_sum) + log_one_plus(ratio);
    return {total, (is_larger ? acc_t{1} : ratio) * reciprocal(1 + ratio)};
  }

 private:
  // The sink's exponential, with the factor that all elements' have.
  template <class Exponential>
  MASKED_SOFTMAX_DEVICE acc_t term_beside(const Exponential& exponential) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      return SinkDistance<float>(sink_, scale_, exponential.offset()).exponential_times_exp2(-exponential.r());
    } else {
      return SinkDistance<double>(sink_, scale_, row_max_).exponential() * exponential.factor();
    }
  }

  // The weight of a sink of -inf, where the row's sum, or its logarithm, is `sum`: NaN in a row of NaN.
  MASKED_SOFTMAX_DEVICE acc_t weight_of_no_sink(acc_t sum) const { return is_empty_ ? acc_t{0} : sum - sum; }

  const bool exists_;
  const bool is_empty_;
  const double sink_;
  const double scale_;
  const acc_t row_max_;
};

}  // namespace masked_softmax::cuda
