// What the vector types of AVX2 and AVX-512 share.
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class V, class T, int kCount>
struct X86Defaults : VectorDefaults<V, T, kCount> {
  static constexpr bool kHasNonTemporalStores = true;
  static void store_fence() { _mm_sfence(); }

  template <class E>
  static T element(const E* p) {
    if constexpr (std::is_same_v<E, float16_t>) {
      return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(read_element(p).bits)));
    } else {
      return to_acc<T>(read_element(p));
    }
  }
};

// Reductions of four rows at once, whose lanes are brought together by one transposition. (Zen 4: saves 2 ns of the
// 13 that the exponentials of a row of 64 cost.)

// rows: four floats of each row. Returns each row's maximum.
MASKED_SOFTMAX_INLINE __m128 max_of_rows(const __m128* rows) {
  const __m128 ab = _mm_max_ps(_mm_unpacklo_ps(rows[0], rows[1]), _mm_unpackhi_ps(rows[0], rows[1]));
  const __m128 cd = _mm_max_ps(_mm_unpacklo_ps(rows[2], rows[3]), _mm_unpackhi_ps(rows[2], rows[3]));
  return _mm_max_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

// rows: four doubles of each row. Returns each row's sum, rounded to float; the order of additions is sum_of_row's.
MASKED_SOFTMAX_INLINE __m128 sums_of_rows(const __m256d* rows) {
  const __m256d ab = _mm256_hadd_pd(rows[0], rows[1]);
  const __m256d cd = _mm256_hadd_pd(rows[2], rows[3]);
  return _mm256_cvtpd_ps(_mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
}
MASKED_SOFTMAX_INLINE float sum_of_row(__m256d row) {
  const __m256d pairs = _mm256_add_pd(row, _mm256_permute_pd(row, 0b0101));
  return static_cast<float>(_mm256_cvtsd_f64(pairs) + _mm_cvtsd_f64(_mm256_extractf128_pd(pairs, 1)));
}

MASKED_SOFTMAX_INLINE __m256d add_as_doubles(__m128 a, __m128 b) {
  return _mm256_add_pd(_mm256_cvtps_pd(a), _mm256_cvtps_pd(b));
}

template <class V, int kCount>
struct X86Float : X86Defaults<V, float, kCount> {
  float reduce_add() const { return sum_of_row(static_cast<const V*>(this)->four_sums()); }
  static void reduce_add_four(const V* vectors, float* sums) {
    const __m256d rows[] = {vectors[0].four_sums(), vectors[1].four_sums(), vectors[2].four_sums(),
                            vectors[3].four_sums()};
    _mm_storeu_ps(sums, sums_of_rows(rows));
  }
  static void reduce_max_four(const V* vectors, float* maxima) {
    const __m128 rows[] = {vectors[0].four_maxima(), vectors[1].four_maxima(), vectors[2].four_maxima(),
                           vectors[3].four_maxima()};
    _mm_storeu_ps(maxima, max_of_rows(rows));
  }
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
