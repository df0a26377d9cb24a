// The formulas of the forward passes, for held rows and for strided ones.
//
// An element's value is what its result is computed from once the row's sum is known. A held row keeps the values in
// registers, a strided one computes them again.
#pragma once

#include "cuda/exp2.cuh"
#include "cuda/groups.cuh"

namespace masked_softmax::cuda {

// value()       the element's value; exp(distance) computes exp(scale * (x - row_max))
// term()        its term of the row's sum; kLogSoftmax counts it in max_count if it equals the maximum
// normalizer()  from the totals of the sum and of max_count over the row
// result()      the element's result
//
// Elements that are not present, because a held row has fewer than its threads can hold, have a term of 0.
template <Operation kOperation>
struct ForwardFormula;

// y = e / sum(e), e = exp(scale * (x - row_max)); the value is e
template <>
struct ForwardFormula<Operation::kSoftmax> {
  static constexpr bool kCounts = false;  // whether normalizer() uses max_count

  template <class acc_t, class Exp>
  MASKED_SOFTMAX_DEVICE static acc_t value(const Distance<acc_t>& distance, bool is_present, const Exp& exp) {
    const acc_t e = exp(distance);
    return is_present ? e : acc_t{0};
  }
  template <class acc_t>
  MASKED_SOFTMAX_DEVICE static acc_t term(const Distance<acc_t>& /*distance*/, acc_t value, bool /*is_present*/,
                                          const Scaling<acc_t>& /*scaling*/, Count<acc_t>& /*max_count*/) {
    return value;
  }
  template <class acc_t>
  MASKED_SOFTMAX_DEVICE static acc_t normalizer(acc_t sum, acc_t /*max_count*/) {
    return 1 / sum;
  }
  template <class acc_t>
  MASKED_SOFTMAX_DEVICE static acc_t result(acc_t value, acc_t normalizer, const Scaling<acc_t>& /*scaling*/) {
    return value * normalizer;
  }
};

// y = scale * (x - row_max) - log(sum(e)); the value is x - row_max. Here the row's "sum" is the biased tail
// (common/exponential.h): the elements equal to the maximum are not in it but counted.
template <>
struct ForwardFormula<Operation::kLogSoftmax> {
  static constexpr bool kCounts = true;

  template <class acc_t, class Exp>
  MASKED_SOFTMAX_DEVICE static acc_t value(const Distance<acc_t>& distance, bool /*is_present*/, const Exp& /*exp*/) {
    return distance.t;
  }
  template <class acc_t>
  MASKED_SOFTMAX_DEVICE static acc_t term(const Distance<acc_t>& distance, acc_t /*value*/, bool is_present,
                                          const Scaling<acc_t>& scaling, Count<acc_t>& max_count) {
    max_count.add(is_present && distance.t == 0 ? acc_t{1} : acc_t{0});
    return is_present && distance.t != 0 ? tail_term(distance, scaling) : acc_t{0};
  }
  template <class acc_t>
  MASKED_SOFTMAX_DEVICE static acc_t normalizer(acc_t sum, acc_t max_count) {
    return log_of_sum(sum, max_count);
  }
  template <class acc_t>
  MASKED_SOFTMAX_DEVICE static acc_t result(acc_t value, acc_t normalizer, const Scaling<acc_t>& scaling) {
    return value * scaling.scale - normalizer;
  }
};

}  // namespace masked_softmax::cuda
