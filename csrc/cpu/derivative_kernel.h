// The derivatives of one row, over its valid columns: one or two sums over the row, then one expression an element.
// short_rows.h and long_row.h say over what they run.
//
// Every input is read twice, the second time from cache; memory sees each valid element once. Formulas: Operation in
// common/problem.h. exp(y) is evaluated with the exponent's low part carried along, so that its error does not grow
// with |y|.
//
// Precondition: length >= 1.
#pragma once

#include "cpu/exp.h"
#include "cpu/sweep.h"

namespace masked_softmax {

// What the expressions share: the scale, and exp() of a saved log_softmax.
template <class acc_t>
struct DerivativeTerms {
  acc_t scale;
  ScaledLog2e<acc_t> log2e{1.0};

  explicit DerivativeTerms(double value) : scale(static_cast<acc_t>(value)) {}

  template <class W>
  MASKED_SOFTMAX_INLINE W scaled(const W& value) const {
    return W::mul(W::broadcast(scale), value);
  }
  template <class W>
  MASKED_SOFTMAX_INLINE W exp(const W& y) const {
    return exp2_product(y, W::broadcast(log2e.high), W::mul(y, W::broadcast(log2e.low)));
  }
};

// Each derivative: how many inputs, what is summed over the row, and what an element becomes. `in` holds a vector (or
// several) of each input, `sums` the row's sums.
template <Operation kOperation>
struct Derivative;

template <>
struct Derivative<Operation::kSoftmaxBackward> {  // (g, y)
  static constexpr int kInputs = 2;
  static constexpr int kSums = 1;
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE LaneSums<W, kSums> terms(const Terms&, const W* in) {
    return {{W::mul(in[0], in[1])}};
  }
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE W value(const Terms& shared, const W* in, const W* sums) {
    return W::mul(shared.scaled(in[1]), W::sub(in[0], sums[0]));
  }
};

template <>
struct Derivative<Operation::kLogSoftmaxBackward> {  // (g, y)
  static constexpr int kInputs = 2;
  static constexpr int kSums = 1;
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE LaneSums<W, kSums> terms(const Terms&, const W* in) {
    return {{in[0]}};
  }
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE W value(const Terms& shared, const W* in, const W* sums) {
    return shared.scaled(W::sub(in[0], W::mul(shared.exp(in[1]), sums[0])));
  }
};

template <>
struct Derivative<Operation::kLogSoftmaxJvp> {  // (v, y)
  static constexpr int kInputs = 2;
  static constexpr int kSums = 1;
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE LaneSums<W, kSums> terms(const Terms& shared, const W* in) {
    return {{W::mul(in[0], shared.exp(in[1]))}};
  }
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE W value(const Terms& shared, const W* in, const W* sums) {
    return shared.scaled(W::sub(in[0], sums[0]));
  }
};

template <>
struct Derivative<Operation::kSoftmaxBackwardWrtY> {  // (v, g, y)
  static constexpr int kInputs = 3;
  static constexpr int kSums = 2;
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE LaneSums<W, kSums> terms(const Terms&, const W* in) {
    return {{W::mul(in[1], in[2]), W::mul(in[0], in[2])}};
  }
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE W value(const Terms& shared, const W* in, const W* sums) {
    return shared.scaled(W::sub(W::mul(in[0], W::sub(in[1], sums[0])), W::mul(in[1], sums[1])));
  }
};

template <>
struct Derivative<Operation::kLogSoftmaxBackwardWrtY> {  // (v, g, y)
  static constexpr int kInputs = 3;
  static constexpr int kSums = 1;
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE LaneSums<W, kSums> terms(const Terms&, const W* in) {
    return {{in[1]}};
  }
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE W value(const Terms& shared, const W* in, const W* sums) {
    return W::sub(W::broadcast(0), shared.scaled(W::mul(W::mul(in[0], shared.exp(in[2])), sums[0])));
  }
};

template <>
struct Derivative<Operation::kSoftmaxBackwardJvpWrtY> {  // (v, g, y)
  static constexpr int kInputs = 3;
  static constexpr int kSums = 2;
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE LaneSums<W, kSums> terms(const Terms&, const W* in) {
    return {{W::mul(in[1], in[2]), W::mul(in[0], in[1])}};
  }
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE W value(const Terms& shared, const W* in, const W* sums) {
    return shared.scaled(W::sub(W::mul(in[0], W::sub(in[1], sums[0])), W::mul(in[2], sums[1])));
  }
};

template <>
struct Derivative<Operation::kLogSoftmaxJvpJvpWrtY> {  // (v, u, y)
  static constexpr int kInputs = 3;
  static constexpr int kSums = 1;
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE LaneSums<W, kSums> terms(const Terms& shared, const W* in) {
    return {{W::mul(W::mul(in[0], in[1]), shared.exp(in[2]))}};
  }
  template <class W, class Terms>
  static MASKED_SOFTMAX_INLINE W value(const Terms& shared, const W* /*in*/, const W* sums) {
    return W::sub(W::broadcast(0), shared.scaled(sums[0]));
  }
};

// The inputs of one row of a batch.
template <class T, int kInputs>
struct InputPointers {
  const T* rows[kInputs];

  template <int kMax, int kRows>
  MASKED_SOFTMAX_INLINE InputPointers(const void* const (&inputs)[kMax][kRows], int row) {
    for (int k = 0; k < kInputs; ++k) {
      rows[k] = static_cast<const T*>(inputs[k][row]);
    }
  }
};

// A vector (or several) of every input.
template <class W, int kInputs>
struct InputVectors {
  W in[kInputs];

  template <class T, class Lanes>
  MASKED_SOFTMAX_INLINE InputVectors(const T* const* rows, int64_t i, Lanes lanes) {
    for (int k = 0; k < kInputs; ++k) {
      in[k] = load<W>(rows[k] + i, lanes, 0);
    }
  }
};

// What becomes of an element. All by value: what is written might otherwise be what is read next.
template <Operation kOperation, class acc_t, class T>
struct DerivativeValue {
  using D = Derivative<kOperation>;
  DerivativeTerms<acc_t> shared;
  const T* inputs[D::kInputs];
  acc_t row_sums[D::kSums];

  DerivativeValue(const T* const* rows, const DerivativeTerms<acc_t>& terms, const acc_t* sums) : shared(terms) {
    for (int k = 0; k < D::kInputs; ++k) {
      inputs[k] = rows[k];
    }
    for (int s = 0; s < D::kSums; ++s) {
      row_sums[s] = sums[s];
    }
  }

  template <class As, class Lanes>
  MASKED_SOFTMAX_INLINE auto operator()(As, int64_t i, Lanes lanes) const {
    using W = typename As::type;
    const InputVectors<W, D::kInputs> vectors(inputs, i, lanes);
    W sums[D::kSums];
    for (int s = 0; s < D::kSums; ++s) {
      sums[s] = W::broadcast(row_sums[s]);
    }
    return D::value(shared, vectors.in, sums);
  }
};

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_INLINE int64_t derivative_values(const T* const* inputs, int64_t count, int64_t room,
                                                const DerivativeTerms<typename V::acc_t>& shared,
                                                const typename V::acc_t* row_sums, U* output, Writing writing) {
  const DerivativeValue<kOperation, typename V::acc_t, T> value(inputs, shared, row_sums);
  return write_row<V>(output, count, room, writing, value);
}

}  // namespace masked_softmax
