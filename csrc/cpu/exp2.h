// The exponential of vectors, as a power of two: exp(t) = 2^z, z = t * log2(e). Constants: common/exponential.h.
//
// Without a table, z = n + f with the integer n nearest to z, and 2^f is a polynomial. Where one or two registers hold
// a table of 2^(k/K), K = kExp2TableSize, z is rounded to multiples of 1/K instead: 2^z = 2^n * 2^(k/K) * 2^f. The
// smaller f needs degree 3 (K = 8) or 2 (K = 32), which saves multiply-adds, the bottleneck of the loop. (Zen 4,
// November 2026, a row of 512 in cache: 25 percent less time with K = 8, 20 percent less with K = 32.)
//
// There are two ways to multiply by 2^n. Without scalef, integer instructions build 2^n in the exponent
// field, which holds normal numbers only: z is clamped from above, and results below the smallest normal number are
// flushed to 0. (They are less than one part in 2^126 of the row's sum, and arithmetic on subnormals costs over a
// hundred cycles on some processors.) With scalef (AVX-512, float), the instruction itself overflows to infinity and
// rounds to subnormals or 0. In both cases NaN gives NaN, and -inf gives 0.
//
// Error budget: the polynomial 0.02 eps (0.22 with K = 8, 0.45 with K = 32), the table's entry half an eps, the last
// operation half an eps.
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// z is rounded to multiples of the rounding step 1/K by adding this magic constant: the last bit of the result counts
// steps. The result is called `encoded`: its low bits hold n, or with a table n * K + k, from which exp2_of() makes
// 2^n, or 2^n * 2^(k/K). Without a table the constant includes the exponent bias, so that the low bits are the exponent
// field of 2^n.
template <class V>
constexpr typename V::acc_t magic_constant() {
  if constexpr (V::kExp2TableSize > 1) {
    return 0x1.8p23f / V::kExp2TableSize;
  } else {
    return Exp2<typename V::acc_t>::kMagic;
  }
}

// c[0] + f * (c[1] + f * ...)
template <class V, int kCount>
MASKED_SOFTMAX_INLINE V polynomial(const typename V::acc_t (&c)[kCount], const V& f) {
  V result = V::broadcast(c[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) {
    result = V::fma(result, f, V::broadcast(c[i]));
  }
  return result;
}

// Minimax coefficients of 2^f = 1 + f * (c0 + c1 * f + ...) for |f| <= 1 / (2 * K).
template <int kTableSize>
struct TableExp2;

template <>
struct TableExp2<8> {  // error 2.6185e-8, 0.22 eps
  static constexpr float kCoefficients[] = {0x1.62e43p-1f, 0x1.ec0c32p-3f, 0x1.c6b99ap-5f};
};

template <>
struct TableExp2<32> {  // error 5.3748e-8, 0.45 eps
  static constexpr float kCoefficients[] = {0x1.62e586p-1f, 0x1.ebfea8p-3f};
};

// value * 2^f for |f| <= 1 / (2 * K).
template <class V>
MASKED_SOFTMAX_INLINE V times_exp2(const V& value, const V& f) {
  return V::fma(value * f, polynomial(TableExp2<V::kExp2TableSize>::kCoefficients, f), value);
}

// 2^(m + f), where m is a multiple of 1/K and encoded = magic_constant() + m.
template <class V>
MASKED_SOFTMAX_INLINE V exp2_of_encoded(const V& encoded, const V& f) {
  if constexpr (V::kExp2TableSize > 1) {
    return times_exp2(V::exp2_of(encoded), f);
  } else {
    return polynomial(Exp2<typename V::acc_t>::kCoefficients, f) * V::exp2_of(encoded);
  }
}

// A row's exponentials are relative to a reference, rounded to the step (ExponentialParams in common/exponential.h).
// Because the division by their sum cancels the factor that they have in common, the reference need not be the maximum.
// It is the larger of the row's ends (row_reference), and most rows are read once, not twice. It fails in two cases:
//   - The reference is so far below the maximum that the sum overflows, or nearly does.
//   - The reference is too large for the rounding step (with scale 1 and float, above 45426), or not finite. Then
//     params_from_reference() makes magic_minus_r NaN, so all terms and their sum are NaN.
// In both cases the sum is out of range (is_sum_out_of_range), and the row is computed again from its maximum.

// The larger end: scores masked by -inf or a large negative number usually include one end only.
template <class acc_t>
MASKED_SOFTMAX_INLINE acc_t row_reference(acc_t first, acc_t last) {
  return first > last ? first : last;
}

// Whether the row must be computed again from its maximum. A good reference makes the sum at least 2^(-1/2); a NaN is
// out of range.
template <class acc_t>
MASKED_SOFTMAX_INLINE bool is_sum_out_of_range(acc_t sum) {
  constexpr acc_t kMax = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p126) : static_cast<acc_t>(0x1p1022);
  return !(sum >= 0 && sum <= kMax);
}

// Times a product whose magnitude is not below kMaxProduct, it is infinite: 2^16 * 2^112 is 2^128, and 2^40 * 2^984 is
// 2^1024.
template <class acc_t>
constexpr acc_t kToInfinity = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p112) : static_cast<acc_t>(0x1p984);

template <class V>
MASKED_SOFTMAX_INLINE V round_to_step(const V& product) {
  const V magic = V::broadcast(magic_constant<V>());
  return (product + magic) - magic;
}

// Of as many rows as V has lanes.
template <class V>
struct ReferenceParams {
  using acc_t = typename V::acc_t;
  V magic_minus_r;
  V zero_below;

  MASKED_SOFTMAX_INLINE explicit ReferenceParams(const V& r)
      : magic_minus_r(V::broadcast(magic_constant<V>()) - r), zero_below(r + V::broadcast(Exp2<acc_t>::kMinExponent)) {}

  // Of the row of lane 0.
  MASKED_SOFTMAX_INLINE ExponentialParams<acc_t> first(acc_t offset, const ScaledLog2e<acc_t>& c) const {
    return {offset, magic_minus_r.v[0], zero_below.v[0], c.high, c.low};
  }
};

// A failed reference gives NaN, as explained above.
template <class V>
MASKED_SOFTMAX_INLINE ReferenceParams<V> params_from_references(const V& reference,
                                                                const ScaledLog2e<typename V::acc_t>& c) {
  const V product = reference * V::broadcast(c.high);
  const V large = product * V::broadcast(kToInfinity<typename V::acc_t>);
  ReferenceParams<V> params(round_to_step(product));
  params.magic_minus_r = params.magic_minus_r + (large - large);  // NaN where `large` is infinite or NaN
  return params;
}

template <class V>
MASKED_SOFTMAX_INLINE ExponentialParams<typename V::acc_t> params_from_reference(
    typename V::acc_t reference, const ScaledLog2e<typename V::acc_t>& c) {
  return params_from_references(V::broadcast(reference), c).first(0, c);
}

template <class V>
MASKED_SOFTMAX_INLINE ExponentialParams<typename V::acc_t> params_from_maximum(
    typename V::acc_t row_max, const ScaledLog2e<typename V::acc_t>& c) {
  using acc_t = typename V::acc_t;
  const acc_t product = row_max * c.high;
  const bool is_on_step = product > -kMaxProduct<acc_t> && product < kMaxProduct<acc_t>;
  const ReferenceParams<V> params(is_on_step ? round_to_step(V::broadcast(product)) : V{});
  return params.first(is_on_step ? 0 : row_max, c);
}

template <bool kHasOffset, class V>
MASKED_SOFTMAX_INLINE V exponential_of(const V& x, const ExponentialParams<typename V::acc_t>& params) {
  using acc_t = typename V::acc_t;
  const V a = kHasOffset ? x - V::broadcast(params.offset) : x;
  const V high = V::broadcast(params.high);
  const V magic_minus_r = V::broadcast(params.magic_minus_r);
  constexpr acc_t kMagic = magic_constant<V>();
  V encoded = V::fma(a, high, magic_minus_r);
  if constexpr (!V::kHasScalef) {
    // Clamped to the largest finite power of two, 2^127 for float. For a larger term f then is positive, which keeps
    // the term at least that large, so the row's sum is out of range and the row is computed again.
    encoded = V::min(V::broadcast(kMagic + Exp2<acc_t>::kMaxExponent), encoded);
  }
  const V rounded = encoded - magic_minus_r;  // a * c, rounded to the step
  const V f = V::fma(a, V::broadcast(params.low), V::fms(a, high, rounded));
  if constexpr (V::kHasScalef) {
    // The second argument is n + k/K, of which scalef takes the floor, n. Where `encoded` is negative, the term is
    // below 2^-393216, and f means nothing (it is NaN where a is -inf).
    const V power = V::scalef(times_exp2(V::table_lookup(encoded), f), encoded - V::broadcast(kMagic));
    return V::zero_where_less(encoded, V{}, power);
  } else {
    return V::zero_where_less(rounded, V::broadcast(params.zero_below), exp2_of_encoded(encoded, f));
  }
}

// 2^(t * c + correction + kBias) for t * c <= 0 and a correction much smaller than 1.
template <class V, int kBias = 0>
MASKED_SOFTMAX_INLINE V exp2_product(const V& t, const V& c, const V& correction) {
  using E = Exp2<typename V::acc_t>;
  const V magic = V::broadcast(magic_constant<V>() + kBias);
  const V encoded = V::fma(t, c, magic);
  const V n = encoded - magic;
  const V f = V::fms(t, c, n) + correction;
  return V::zero_where_less(n, V::broadcast(E::kMinExponent - kBias), exp2_of_encoded(encoded, f));
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
