// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Partial access goes through masks, so no byte outside is touched.
#pragma once

#include "cpu/four_rows_x86.h"
#include "cpu/prelude.h"

namespace masked_softmax {

struct Avx512Float {
  using acc_t = float;
  static constexpr int kLanes = 16;
  static constexpr bool kHasSixteenthPowers = true;
  static constexpr bool kReducesFourRows = true;
  __m512 v;

  static Avx512Float broadcast(float value) { return {_mm512_set1_ps(value)}; }

  static Avx512Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Avx512Float load(const bfloat16_t* p) { return from_bfloat16(_mm256_loadu_si256(as_vector(p))); }
  static Avx512Float load(const float16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(as_vector(p)))}; }

  static Avx512Float load_partial(const float* p, int count, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(count), p)};
  }
  static Avx512Float load_partial(const bfloat16_t* p, int count, float fill) {
    const Avx512Float loaded = from_bfloat16(_mm256_maskz_loadu_epi16(first(count), p));
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(count), loaded.v)};
  }
  static Avx512Float load_partial(const float16_t* p, int count, float fill) {
    const __m512 loaded = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(count), loaded)};
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16_t* p) const { _mm256_storeu_si256(as_vector(p), to_bfloat16()); }
  void store(float16_t* p) const { _mm256_storeu_si256(as_vector(p), to_float16()); }

  void store_partial(float* p, int count) const { _mm512_mask_storeu_ps(p, first(count), v); }
  void store_partial(bfloat16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), to_bfloat16()); }
  void store_partial(float16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), to_float16()); }

  static Avx512Float add(Avx512Float a, Avx512Float b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Avx512Float sub(Avx512Float a, Avx512Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Avx512Float mul(Avx512Float a, Avx512Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Avx512Float fma(Avx512Float a, Avx512Float b, Avx512Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx512Float fms(Avx512Float a, Avx512Float b, Avx512Float c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
  static Avx512Float max(Avx512Float a, Avx512Float b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Avx512Float min(Avx512Float a, Avx512Float b) { return {_mm512_min_ps(a.v, b.v)}; }

  static Avx512Float scale_by_power(Avx512Float p, Avx512Float n, Avx512Float /*shifted*/, float smallest) {
    const __mmask16 normal = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(smallest), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(normal, p.v, n.v)};
  }
  static Avx512Float zero_where_zero(Avx512Float t, Avx512Float value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), value.v)};
  }
  Avx512Float first_lanes(int count) const { return {_mm512_maskz_mov_ps(first(count), v)}; }
  static Avx512Float one_where_zero(Avx512Float t) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t.v, _mm512_setzero_ps(), _CMP_EQ_OQ), _mm512_set1_ps(1.0f))};
  }

  // 2^(k/16) for k in the low four bits of each lane.
  static Avx512Float sixteenth_powers(Avx512Float k) {
    const __m512 powers =
        _mm512_setr_ps(0x1.0p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fep+0f, 0x1.3dea64p+0f,
                       0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                       0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f);
    return {_mm512_permutexvar_ps(_mm512_castps_si512(k.v), powers)};
  }

  // In double, rounded once.
  float reduce_add() const {
    const __m256 low = _mm512_castps512_ps256(v);
    const __m256 high = _mm512_extractf32x8_ps(v, 1);
    return Four::add_one(add_quarters(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1),
                                      _mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1)));
  }
  static void reduce_add_four(const float* lanes, float* sums) {
    __m256d rows[4];
    for (int r = 0; r < 4; ++r) {
      const float* row = lanes + r * kLanes;
      rows[r] = add_quarters(_mm_loadu_ps(row), _mm_loadu_ps(row + 4), _mm_loadu_ps(row + 8), _mm_loadu_ps(row + 12));
    }
    _mm_storeu_ps(sums, Four::add(rows));
  }
  float reduce_max() const { return _mm512_reduce_max_ps(v); }
  static void reduce_max_four(const float* lanes, float* maxima) {
    __m128 rows[4];
    for (int r = 0; r < 4; ++r) {
      const __m256 half = _mm256_max_ps(_mm256_loadu_ps(lanes + r * kLanes), _mm256_loadu_ps(lanes + r * kLanes + 8));
      rows[r] = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    _mm_storeu_ps(maxima, Four::max(rows));
  }

 private:
  using Four = FourRows<Avx512Float>;

  static __m256d add_quarters(__m128 a, __m128 b, __m128 c, __m128 d) {
    return _mm256_add_pd(Four::add_as_doubles(a, b), Four::add_as_doubles(c, d));
  }
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static const __m256i* as_vector(const void* p) { return static_cast<const __m256i*>(p); }
  static __m256i* as_vector(void* p) { return static_cast<__m256i*>(p); }
  // A bfloat16 is the upper half of a float: word i of sixteen becomes, or comes from, word 2 i + 1 of thirty-two.
  static Avx512Float from_bfloat16(__m256i words) {
    constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
    const __m512i order = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                           4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpperHalves, order, _mm512_castsi256_si512(words)))};
  }
  // To nearest, ties to even. (The AVX512_BF16 instruction flushes subnormals, so it is not used.)
  __m256i to_bfloat16() const {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25,
                                           23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half_up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_add_epi32(half_up, odd, half_up, _mm512_set1_epi32(1));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(order, chosen));
  }
  __m256i to_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct Avx512Double {
  using acc_t = double;
  static constexpr int kLanes = 8;
  static constexpr bool kHasSixteenthPowers = false;
  static constexpr bool kReducesFourRows = false;
  __m512d v;

  static Avx512Double broadcast(double value) { return {_mm512_set1_pd(value)}; }

  static Avx512Double load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Avx512Double load_partial(const double* p, int count, double fill) {
    return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), first(count), p)};
  }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_partial(double* p, int count) const { _mm512_mask_storeu_pd(p, first(count), v); }

  static Avx512Double add(Avx512Double a, Avx512Double b) { return {_mm512_add_pd(a.v, b.v)}; }
  static Avx512Double sub(Avx512Double a, Avx512Double b) { return {_mm512_sub_pd(a.v, b.v)}; }
  static Avx512Double mul(Avx512Double a, Avx512Double b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static Avx512Double fma(Avx512Double a, Avx512Double b, Avx512Double c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static Avx512Double fms(Avx512Double a, Avx512Double b, Avx512Double c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
  static Avx512Double max(Avx512Double a, Avx512Double b) { return {_mm512_max_pd(a.v, b.v)}; }
  static Avx512Double min(Avx512Double a, Avx512Double b) { return {_mm512_min_pd(a.v, b.v)}; }

  static Avx512Double scale_by_power(Avx512Double p, Avx512Double n, Avx512Double /*shifted*/, double smallest) {
    const __mmask8 normal = _mm512_cmp_pd_mask(n.v, _mm512_set1_pd(smallest), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_pd(normal, p.v, n.v)};
  }
  static Avx512Double zero_where_zero(Avx512Double t, Avx512Double value) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(t.v, _mm512_setzero_pd(), _CMP_NEQ_UQ), value.v)};
  }
  Avx512Double first_lanes(int count) const { return {_mm512_maskz_mov_pd(first(count), v)}; }
  static Avx512Double one_where_zero(Avx512Double t) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(t.v, _mm512_setzero_pd(), _CMP_EQ_OQ), _mm512_set1_pd(1.0))};
  }

  double reduce_add() const {
    double lanes[kLanes];
    store(lanes);
    return compensated_sum(lanes, kLanes);
  }
  double reduce_max() const { return _mm512_reduce_max_pd(v); }

 private:
  static __mmask8 first(int count) { return static_cast<__mmask8>((1u << count) - 1u); }
};

}  // namespace masked_softmax
