// The exponential of vectors, as a power of two: exp(t) = 2^z, z = t * log2(e). Constants: common/exponential.h.
//
// Without a table, z = n + f with the integer n nearest to z, and 2^f is a polynomial. Where one or two registers hold
// a table of 2^(k/K), K = kExp2TableSize, z is rounded to multiples of 1/K instead: 2^z = 2^n * 2^(k/K) * 2^f. The
// smaller f needs degree 3 (K = 8) or 2 (K = 32), which saves multiply-adds, the bottleneck of the loop. (Zen 4,
// November 2026, a row of 512 in cache: 25 percent less time with K = 8, 20 percent less with K = 32.)
//
// Error budget: the polynomial 0.02 eps (0.22 with K = 8, 0.45 with K = 32), the table's entry half an eps, the last
// operation half an eps.
//
// Without scalef, results below the smallest normal number are flushed to 0: they are less than one part in 2^126 of
// the row's sum, and arithmetic on subnormals costs over a hundred cycles on some processors. NaN gives NaN, -inf gives
// 0.
#pragma once

#include "cpu/vector_group.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// z is rounded to multiples of the rounding step 1/K by adding this magic constant: the last bit of the sum counts
// steps. Without a table the constant includes the exponent bias, so that the low bits of the sum are the exponent
// field of 2^n.
template <class V>
constexpr typename V::acc_t magic_constant() {
  if constexpr (V::kExp2TableSize > 1) {
    return 0x1.8p23f / V::kExp2TableSize;
  } else {
    return Exp2<typename V::acc_t>::kMagic;
  }
}

// 2^f for |f| <= 1/2.
template <class V>
MASKED_SOFTMAX_INLINE V exp2_polynomial(const V& f) {
  using E = Exp2<typename V::acc_t>;
  V p = V::broadcast(E::kCoefficients[E::kDegree]);
  for (int i = E::kDegree - 1; i >= 0; --i) {
    p = V::fma(p, f, V::broadcast(E::kCoefficients[i]));
  }
  return p;
}

// Minimax coefficients of 2^f = 1 + f * (c0 + c1 * f + ...) for |f| <= 1 / (2 * K).
template <int kTableSize>
struct TableExp2;

template <>
struct TableExp2<8> {  // error 2.6185e-8, 0.22 eps
  static constexpr int kCount = 3;
  static constexpr float kCoefficients[kCount] = {0x1.62e43p-1f, 0x1.ec0c32p-3f, 0x1.c6b99ap-5f};
};

template <>
struct TableExp2<32> {  // error 5.3748e-8, 0.45 eps
  static constexpr int kCount = 2;
  static constexpr float kCoefficients[kCount] = {0x1.62e586p-1f, 0x1.ebfea8p-3f};
};

// factor * 2^f for |f| <= 1 / (2 * K).
template <class V>
MASKED_SOFTMAX_INLINE V times_exp2(const V& factor, const V& f) {
  using E = TableExp2<V::kExp2TableSize>;
  V q = V::broadcast(E::kCoefficients[E::kCount - 1]);
  for (int i = E::kCount - 2; i >= 0; --i) {
    q = V::fma(q, f, V::broadcast(E::kCoefficients[i]));
  }
  return V::fma(factor * f, q, factor);
}

// 2^(r + f), where r is the multiple of 1/K that sum = magic_constant() + r encodes.
template <class V>
MASKED_SOFTMAX_INLINE V exp2_of_sum(const V& sum, const V& f) {
  if constexpr (V::kExp2TableSize > 1) {
    return times_exp2(V::exp2_of(sum), f);
  } else {
    return exp2_polynomial(f) * V::exp2_of(sum);
  }
}

// The exponentials of a row, exp(scale * (x - reference)), are computed as 2^((x - offset) * c - r), with
// c = scale * log2(e) in two parts and r = reference * c rounded to the rounding step.
//
// No difference is rounded: r is a multiple of the step, so n comes from one addition to x * c, and f from one fused
// multiply-add that is exact but for its own last bit. All terms of a row have the same error factor,
// 2^(r - reference * c), which the division by their sum cancels. If x - max were rounded instead, many equal terms
// would put their sum off by half an eps for each unit of their distance from the maximum.
//
// Because the factor cancels, the reference need not be the maximum: any element does that is so near to it that the
// sum does not overflow, and then the row is read once, not twice. The larger of the row's ends is tried first
// (row_reference). A row whose sum is out of range (is_sum_out_of_range) is computed again from its maximum, with
// kHasOffset: where max * c is too large for the step, x - max is exact for all x that matter (Sterbenz), and becomes
// the offset.
template <class acc_t>
struct RowExponent {
  acc_t offset;
  acc_t magic;     // magic constant - r: adding it rounds to the step and subtracts r
  acc_t min_term;  // lower bound of the rounded (x - offset) * c; with scalef, of x - offset
  acc_t high;      // c
  acc_t low;
};

// The larger end: scores masked by -inf or a large negative number usually include one end only.
template <class acc_t>
MASKED_SOFTMAX_INLINE acc_t row_reference(acc_t first, acc_t last) {
  return first > last ? first : last;
}

// Whether the reference was too small for the sum, too large for the rounding step, or not finite. A good reference
// makes the sum at least 2^(-1/2); a NaN is out of range.
template <class acc_t>
MASKED_SOFTMAX_INLINE bool is_sum_out_of_range(acc_t sum) {
  constexpr acc_t kMax = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p126) : static_cast<acc_t>(0x1p1022);
  return !(sum >= 0 && sum <= kMax);
}

// The rounding step resolves products with c below kMaxProduct. kToInfinity times a larger product is infinite.
template <class acc_t>
constexpr acc_t kMaxProduct = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p16) : static_cast<acc_t>(0x1p40);
template <class acc_t>
constexpr acc_t kToInfinity = sizeof(acc_t) == 4 ? static_cast<acc_t>(0x1p112) : static_cast<acc_t>(0x1p984);

template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_of_rounded(typename V::acc_t r,
                                                                         const ScaledLog2e<typename V::acc_t>& c) {
  using acc_t = typename V::acc_t;
  constexpr acc_t kUnderflows = -200;  // 2^-200 times any value of the row is 0
  const acc_t min_term = V::kHasScalef ? (r + kUnderflows) * (1 / c.high) : r + Exp2<acc_t>::kMinExponent;
  return {0, magic_constant<V>() - r, min_term, c.high, c.low};
}

template <class V>
MASKED_SOFTMAX_INLINE typename V::acc_t round_to_step(typename V::acc_t product) {
  return (product + magic_constant<V>()) - magic_constant<V>();
}

// Without a branch: a reference that is too large for the step, or not finite, makes the row's exponentials NaN.
template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_from_reference(typename V::acc_t reference,
                                                                             const ScaledLog2e<typename V::acc_t>& c) {
  using acc_t = typename V::acc_t;
  const acc_t product = reference * c.high;
  const acc_t probe = product * kToInfinity<acc_t>;  // infinite minus infinite is NaN
  auto exponent = exponent_of_rounded<V>(round_to_step<V>(product), c);
  exponent.magic += probe - probe;
  return exponent;
}

template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_from_maximum(typename V::acc_t row_max,
                                                                           const ScaledLog2e<typename V::acc_t>& c) {
  using acc_t = typename V::acc_t;
  const acc_t product = row_max * c.high;
  if (product > -kMaxProduct<acc_t> && product < kMaxProduct<acc_t>) {
    return exponent_of_rounded<V>(round_to_step<V>(product), c);
  }
  auto exponent = exponent_of_rounded<V>(0, c);
  exponent.offset = row_max;
  return exponent;
}

// Of a row of one element: exactly 1, or NaN.
template <class V>
MASKED_SOFTMAX_INLINE RowExponent<typename V::acc_t> exponent_of_single() {
  return {0, magic_constant<V>(), -std::numeric_limits<typename V::acc_t>::infinity(), 0, 0};
}

template <bool kHasOffset, class V>
MASKED_SOFTMAX_INLINE V exponential_of(const V& x, const RowExponent<typename V::acc_t>& exponent) {
  using acc_t = typename V::acc_t;
  V a = kHasOffset ? x - V::broadcast(exponent.offset) : x;
  const V min_term = V::broadcast(exponent.min_term);
  const V high = V::broadcast(exponent.high);
  const V magic = V::broadcast(exponent.magic);
  constexpr acc_t kMagic = magic_constant<V>();
  if constexpr (V::kHasScalef) {
    a = V::max(min_term, a);  // -inf would make f NaN
  }
  V sum = V::fma(a, high, magic);
  if constexpr (!V::kHasScalef) {
    // The largest finite power. A term beyond it is at least this large, because f > 0, and its row's sum out of range.
    sum = V::min(V::broadcast(kMagic - Exp2<acc_t>::kMinExponent + 1), sum);
  }
  const V rounded = sum - magic;  // a * c, rounded to the step
  const V f = V::fma(a, V::broadcast(exponent.low), V::fms(a, high, rounded));
  if constexpr (V::kHasScalef) {
    return V::scalef(times_exp2(V::table_lookup(sum), f), sum - V::broadcast(kMagic));
  } else {
    return V::zero_where_less(rounded, min_term, exp2_of_sum(sum, f));
  }
}

// 2^(t * c + correction + kBias) for t * c <= 0 and a correction much smaller than 1.
template <class V, int kBias = 0>
MASKED_SOFTMAX_INLINE V exp2_product(const V& t, const V& c, const V& correction) {
  using E = Exp2<typename V::acc_t>;
  const V magic = V::broadcast(magic_constant<V>() + kBias);
  const V sum = V::fma(t, c, magic);
  const V n = sum - magic;
  const V f = V::fms(t, c, n) + correction;
  return V::zero_where_less(n, V::broadcast(E::kMinExponent - kBias), exp2_of_sum(sum, f));
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
