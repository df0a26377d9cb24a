// The derivatives' formulas, written once for every device.
//
// A row's derivative takes up to two sums over its valid columns, then one expression for each element. In the comments
// <a, b> is the sum of a * b over the row's valid columns, p = exp(y) for a log_softmax y, and x, y, g, v and u are
// those of operations.inc. The Jacobian of softmax is symmetric, so its backward formula also is its jvp.
//
//   N    a number: float, double or a vector of cpu/vec_*.h. It needs +, - and *.
//   in   one number of each input, in the order of operations.inc
//   exp  computes exp(y) of a saved log_softmax, within the accuracy of docs/guarantees.md
//
// terms() sets terms[0..kSums), which the caller sums over the row. result() is the element's result, given those sums.
#pragma once

#include "common/inline.h"
#include "common/operation.h"

namespace masked_softmax {

template <Operation kOperation>
struct Formula;

// (g, y): scale * y * (g - <g, y>)
template <>
struct Formula<Operation::kSoftmaxBackward> {
  static constexpr int kSums = 1;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& /*exp*/, N* terms) {
    terms[0] = in[0] * in[1];
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* in, const N* sums, const N& scale, const Exp& /*exp*/) {
    return scale * in[1] * (in[0] - sums[0]);
  }
};

// (g, y): scale * (g - p * <g, 1>)
template <>
struct Formula<Operation::kLogSoftmaxBackward> {
  static constexpr int kSums = 1;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& /*exp*/, N* terms) {
    terms[0] = in[0];
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* in, const N* sums, const N& scale, const Exp& exp) {
    return scale * (in[0] - exp(in[1]) * sums[0]);
  }
};

// (v, y): scale * (v - <v, p>)
template <>
struct Formula<Operation::kLogSoftmaxJvp> {
  static constexpr int kSums = 1;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& exp, N* terms) {
    terms[0] = in[0] * exp(in[1]);
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* in, const N* sums, const N& scale, const Exp& /*exp*/) {
    return scale * (in[0] - sums[0]);
  }
};

// (v, g, y): scale * (v * (g - <g, y>) - g * <v, y>)
template <>
struct Formula<Operation::kSoftmaxBackwardWrtY> {
  static constexpr int kSums = 2;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& /*exp*/, N* terms) {
    terms[0] = in[1] * in[2];
    terms[1] = in[0] * in[2];
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* in, const N* sums, const N& scale, const Exp& /*exp*/) {
    return scale * (in[0] * (in[1] - sums[0]) - in[1] * sums[1]);
  }
};

// (v, g, y): -scale * v * p * <g, 1>; diagonal in v, so it also is the jvp of kLogSoftmaxBackward with respect to y
template <>
struct Formula<Operation::kLogSoftmaxBackwardWrtY> {
  static constexpr int kSums = 1;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& /*exp*/, N* terms) {
    terms[0] = in[1];
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* in, const N* sums, const N& scale, const Exp& exp) {
    return N{} - scale * (in[0] * exp(in[2]) * sums[0]);
  }
};

// (v, g, y): scale * (v * (g - <g, y>) - y * <v, g>); v is a tangent of y
template <>
struct Formula<Operation::kSoftmaxBackwardJvpWrtY> {
  static constexpr int kSums = 2;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& /*exp*/, N* terms) {
    terms[0] = in[1] * in[2];
    terms[1] = in[0] * in[1];
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* in, const N* sums, const N& scale, const Exp& /*exp*/) {
    return scale * (in[0] * (in[1] - sums[0]) - in[2] * sums[1]);
  }
};

// (v, u, y): -scale * <v * u, p>; the jvp of kLogSoftmaxJvp(u, y) along a tangent v of y
template <>
struct Formula<Operation::kLogSoftmaxJvpJvpWrtY> {
  static constexpr int kSums = 1;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& exp, N* terms) {
    terms[0] = in[0] * in[1] * exp(in[2]);
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* /*in*/, const N* sums, const N& scale, const Exp& /*exp*/) {
    return N{} - scale * sums[0];
  }
};

// (a, b): scale * <a, b>, one number a row
template <>
struct Formula<Operation::kRowDot> {
  static constexpr int kSums = 1;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* in, const Exp& /*exp*/, N* terms) {
    terms[0] = in[0] * in[1];
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* /*in*/, const N* sums, const N& scale, const Exp& /*exp*/) {
    return scale * sums[0];
  }
};

// (a; r): scale * a * r for a number r of each row, which the caller passes in place of the sum
template <>
struct Formula<Operation::kRowScale> {
  static constexpr int kSums = 1;
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE void terms(const N* /*in*/, const Exp& /*exp*/, N* terms) {
    terms[0] = N{};
  }
  template <class N, class Exp>
  static MASKED_SOFTMAX_INLINE N result(const N* in, const N* sums, const N& scale, const Exp& /*exp*/) {
    return scale * in[0] * sums[0];
  }
};

}  // namespace masked_softmax
