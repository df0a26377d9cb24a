// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Partial access goes through masks, so no byte outside is touched.
#pragma once

#include "cpu/four_rows_x86.h"
#include "cpu/prelude.h"

namespace masked_softmax {

struct Avx512Float {
  using acc_t = float;
  static constexpr int kLanes = 16;
  static constexpr int kPowerSteps = 32;
  static constexpr int kTogether = 4;
  static constexpr bool kStoresPastCaches = true;
  static void finish_stores() { _mm_sfence(); }  // store_past_caches is not ordered by itself
  static constexpr int kMostHeldVectors = 4;
  static constexpr int kRegisters = 32;
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

  void store_past_caches(float* p) const { _mm512_stream_ps(p, v); }
  void store_past_caches(bfloat16_t* p) const { _mm256_stream_si256(as_vector(p), to_bfloat16()); }
  void store_past_caches(float16_t* p) const { _mm256_stream_si256(as_vector(p), to_float16()); }

  void store_partial(float* p, int count) const { _mm512_mask_storeu_ps(p, first(count), v); }
  void store_partial(bfloat16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), to_bfloat16()); }
  void store_partial(float16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), to_float16()); }

  static Avx512Float add(Avx512Float a, Avx512Float b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Avx512Float sub(Avx512Float a, Avx512Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Avx512Float mul(Avx512Float a, Avx512Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Avx512Float fma(Avx512Float a, Avx512Float b, Avx512Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx512Float fms(Avx512Float a, Avx512Float b, Avx512Float c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
  static Avx512Float max(Avx512Float a, Avx512Float b) { return {_mm512_max_ps(a.v, b.v)}; }

  // 2^z, z being what the sum `shifted` was rounded to: its low five bits look up 2^(k/32), and the bits above them are
  // added to the exponent. The shift brings k along, which the table's entries are therefore less by.
  static Avx512Float power(Avx512Float shifted) {
    const __m512i low = _mm512_setr_epi32(0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a,
                                          0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043,
                                          0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6);
    const __m512i high = _mm512_setr_epi32(0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be,
                                           0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
                                           0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3);
    const __m512i bits = _mm512_castps_si512(shifted.v);
    const __m512i fraction = _mm512_permutex2var_epi32(low, bits, high);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bits, 18), fraction))};
  }
  // value, or 0 where n < smallest; a NaN is not less.
  static Avx512Float zero_where_less(Avx512Float n, Avx512Float smallest, Avx512Float value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(n.v, smallest.v, _CMP_NLT_UQ), value.v)};
  }
  static Avx512Float zero_where_zero(Avx512Float t, Avx512Float value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), value.v)};
  }
  Avx512Float first_lanes(int count) const { return {_mm512_maskz_mov_ps(first(count), v)}; }
  static Avx512Float one_where_zero(Avx512Float t) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t.v, _mm512_setzero_ps(), _CMP_EQ_OQ), _mm512_set1_ps(1.0f))};
  }

  // In double, rounded once.
  float reduce_add() const { return Four::add_one(add_quarters()); }
  static void reduce_add_four(const Avx512Float* lanes, float* sums) {
    __m256d rows[4];
    for (int r = 0; r < 4; ++r) {
      rows[r] = lanes[r].add_quarters();
    }
    _mm_storeu_ps(sums, Four::add(rows));
  }
  float reduce_max() const { return _mm512_reduce_max_ps(v); }
  static void reduce_max_four(const Avx512Float* lanes, float* maxima) {
    __m128 rows[4];
    for (int r = 0; r < 4; ++r) {
      const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(lanes[r].v), _mm512_extractf32x8_ps(lanes[r].v, 1));
      rows[r] = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    _mm_storeu_ps(maxima, Four::max(rows));
  }

 private:
  using Four = FourRows<Avx512Float>;

  // Halves are added as they are: half an eps more, and half as much to convert.
  __m256d add_quarters() const {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return Four::add_as_doubles(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
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
  static constexpr int kPowerSteps = 1;
  static constexpr int kTogether = 4;
  static constexpr bool kStoresPastCaches = true;
  static void finish_stores() { _mm_sfence(); }  // store_past_caches is not ordered by itself
  static constexpr bool kReducesFourRows = false;
  __m512d v;

  static Avx512Double broadcast(double value) { return {_mm512_set1_pd(value)}; }

  static Avx512Double load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Avx512Double load_partial(const double* p, int count, double fill) {
    return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), first(count), p)};
  }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_past_caches(double* p) const { _mm512_stream_pd(p, v); }
  void store_partial(double* p, int count) const { _mm512_mask_storeu_pd(p, first(count), v); }

  static Avx512Double add(Avx512Double a, Avx512Double b) { return {_mm512_add_pd(a.v, b.v)}; }
  static Avx512Double sub(Avx512Double a, Avx512Double b) { return {_mm512_sub_pd(a.v, b.v)}; }
  static Avx512Double mul(Avx512Double a, Avx512Double b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static Avx512Double fma(Avx512Double a, Avx512Double b, Avx512Double c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static Avx512Double fms(Avx512Double a, Avx512Double b, Avx512Double c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
  static Avx512Double max(Avx512Double a, Avx512Double b) { return {_mm512_max_pd(a.v, b.v)}; }

  static Avx512Double power(Avx512Double shifted) {
    return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(shifted.v), 52))};
  }
  static Avx512Double zero_where_less(Avx512Double n, Avx512Double smallest, Avx512Double value) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(n.v, smallest.v, _CMP_NLT_UQ), value.v)};
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
