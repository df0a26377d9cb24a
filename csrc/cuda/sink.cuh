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

// What forward passes take as the row's maximum. Where it is -inf (an empty row, or one of -inf alone), the
// exponentials relative to it would be NaN. Beside a sink they must be 0.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t max_beside_sink(const Problem& problem, acc_t max) {
  return problem.row_input.data != nullptr && max == -std::numeric_limits<acc_t>::infinity() ? acc_t{0} : max;
}

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
      : exists_(sink != -std::numeric_limits<double>::infinity()), is_empty_(is_empty) {
    // In torch.softmax, a row with +inf is NaN.
    const double number =
        sink == std::numeric_limits<double>::infinity() ? std::numeric_limits<double>::quiet_NaN() : sink;
    const double scale = -kernel_problem.constants_double.scale;  // in float, it would be off by an eps of the product
    const double max = static_cast<double>(row_max);
    const double product = scale * max;
    const double sum = product + number;
    const double error = error_of_sum(product, number, sum) + fused_multiply_add(scale, max, -product);
    const acc_t high = static_cast<acc_t>(sum);
    distance_ = {high, static_cast<acc_t>((sum - static_cast<double>(high)) + error)};
  }

  // Returns the inverse of the sum. row_sum: of exp(scale * (x - row_max)) times `factor`.
  MASKED_SOFTMAX_DEVICE SumWithSink<acc_t> added_to(acc_t row_sum, acc_t factor) const {
    constexpr acc_t kNaN = std::numeric_limits<acc_t>::quiet_NaN();
    constexpr acc_t kMax = std::numeric_limits<acc_t>::max();
    if (!exists_) {
      const acc_t sum = row_sum == 0 ? kNaN : row_sum;
      return {reciprocal(sum), weight_of_none(sum)};
    }
    const acc_t term = distance_.exponential() * factor;
    // The sum of the elements is their number at most. Beside such a term, their results are below the smallest normal
    // number. An infinite sum would make them NaN: see reciprocal().
    const bool is_all = term > kMax / 2 || (row_sum == 0 && term == term);
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
      return {log_sum, weight_of_none(log_sum)};
    }
    constexpr acc_t kMax = std::numeric_limits<acc_t>::max();
    if (log_sum < -kMax) {  // no element is above -inf; a finite value keeps -inf - value from being NaN
      const acc_t zero = distance_.high == distance_.high ? acc_t{0} : distance_.high;
      return {distance_.high < -kMax ? -kMax : distance_.high, 1 + zero};
    }
    const acc_t high = distance_.high - log_sum;
    const acc_t low = error_of_sum(distance_.high, -log_sum, high) + distance_.low;
    const bool is_larger = high > 0;
    const acc_t ratio = (is_larger ? Distance{-high, -low} : Distance{high, low}).exponential();
    const acc_t total = (is_larger ? distance_.high : log_sum) + log_one_plus(ratio);
    return {total, (is_larger ? acc_t{1} : ratio) * reciprocal(1 + ratio)};
  }

 private:
  // TwoSum (groups.cuh): the rounding error of sum = a + b.
  template <class T>
  MASKED_SOFTMAX_DEVICE static T error_of_sum(T a, T b, T sum) {
    const T part = sum - a;
    return (a - (sum - part)) + (b - part);
  }

  // sink - scale * row_max as an unevaluated sum, so that the error of its exponential does not grow with it. The low
  // part may be NaN if the high one is infinite.
  struct Distance {
    acc_t high;
    acc_t low;

    MASKED_SOFTMAX_DEVICE acc_t exponential() const {
      constexpr acc_t kMax = std::numeric_limits<acc_t>::max();
      const acc_t value = exponential_function(high);
      const bool has_error = value <= kMax && low - low == 0;
      return has_error ? fused_multiply_add(value, low, value) : value;
    }
  };

  // The weight of a sink of -inf, where the row's sum, or its logarithm, is `sum`: NaN in a row of NaN.
  MASKED_SOFTMAX_DEVICE acc_t weight_of_none(acc_t sum) const { return is_empty_ ? acc_t{0} : sum - sum; }

  const bool exists_;
  const bool is_empty_;
  Distance distance_;
};

}  // namespace masked_softmax::cuda
