// How four rows' lanes are reduced at once: the transposition that brings them together serves all four. (Zen 4: 2 ns
// of the 13 that the exponentials of a row of 64 cost.)
//
// A template over the vector type, so that no two instruction sets share a compiled function (see prelude.h).
#pragma once

#include "cpu/prelude.h"

namespace masked_softmax {

template <class V>
struct FourRows {
  // Four floats from each of four rows: the largest of each row.
  static MASKED_SOFTMAX_INLINE __m128 max(const __m128* rows) {
    const __m128 ab = _mm_max_ps(_mm_unpacklo_ps(rows[0], rows[1]), _mm_unpackhi_ps(rows[0], rows[1]));
    const __m128 cd = _mm_max_ps(_mm_unpacklo_ps(rows[2], rows[3]), _mm_unpackhi_ps(rows[2], rows[3]));
    return _mm_max_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
  }

  // Four doubles from each of four rows: the sum of each row, rounded to float. Same order of additions as add_one.
  static MASKED_SOFTMAX_INLINE __m128 add(const __m256d* rows) {
    const __m256d ab = _mm256_hadd_pd(rows[0], rows[1]);
    const __m256d cd = _mm256_hadd_pd(rows[2], rows[3]);
    return _mm256_cvtpd_ps(_mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
  }
  static MASKED_SOFTMAX_INLINE float add_one(__m256d row) {
    const __m128d two = _mm_hadd_pd(_mm256_castpd256_pd128(row), _mm256_extractf128_pd(row, 1));
    return static_cast<float>(_mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two)));
  }

  static MASKED_SOFTMAX_INLINE __m256d add_as_doubles(__m128 a, __m128 b) {
    return _mm256_add_pd(_mm256_cvtps_pd(a), _mm256_cvtps_pd(b));
  }
};

}  // namespace masked_softmax
