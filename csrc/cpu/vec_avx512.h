// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Partial access goes through masks, so no byte outside is touched.
#pragma once

#include "cpu/four_rows_x86.h"
#include "cpu/prelude.h"

namespace masked_softmax {

struct Avx512Float {
  using acc_t = float;
  static constexpr int kLanes = 16;
  static constexpr int kPowerSteps = 32;
  static constexpr bool kScalesByPowers = true;
  static constexpr int kTogether = 4;
  static constexpr bool kStoresNumbers = true;
  static constexpr bool kMasksCheaply = true;
  static constexpr bool kTransposes = true;
  static constexpr bool kStoresPastCaches = true;
  static void finish_stores() { _mm_sfence(); }  // store_past_caches is not ordered by itself
  static constexpr int kNarrowVectors = 4;
  static constexpr bool kReducesFourRows = true;
  __m512 v;

  static Avx512Float broadcast(float value) { return {_mm512_set1_ps(value)}; }

  static float element(const float* p) { return read_element(p); }
  static float element(const bfloat16_t* p) { return to_acc<float>(read_element(p)); }
  static float element(const float16_t* p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(read_element(p).bits)));
  }

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
  void store(bfloat16_t* p) const { _mm256_storeu_si256(as_vector(p), to_bfloat16<true>()); }
  void store(bfloat16_number_t* p) const { _mm256_storeu_si256(as_vector(p), to_bfloat16<false>()); }
  void store(float16_t* p) const { _mm256_storeu_si256(as_vector(p), to_float16()); }

  void store_past_caches(float* p) const { _mm512_stream_ps(p, v); }
  void store_past_caches(bfloat16_t* p) const { _mm256_stream_si256(as_vector(p), to_bfloat16<true>()); }
  void store_past_caches(bfloat16_number_t* p) const { _mm256_stream_si256(as_vector(p), to_bfloat16<false>()); }
  void store_past_caches(float16_t* p) const { _mm256_stream_si256(as_vector(p), to_float16()); }

  void store_partial(float* p, int count) const { _mm512_mask_storeu_ps(p, first(count), v); }
  void store_partial(bfloat16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), to_bfloat16<true>()); }
  void store_partial(bfloat16_number_t* p, int count) const {
    _mm256_mask_storeu_epi16(p, first(count), to_bfloat16<false>());
  }
  void store_partial(float16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), to_float16()); }

  static Avx512Float add(Avx512Float a, Avx512Float b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Avx512Float sub(Avx512Float a, Avx512Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Avx512Float mul(Avx512Float a, Avx512Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Avx512Float fma(Avx512Float a, Avx512Float b, Avx512Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx512Float fms(Avx512Float a, Avx512Float b, Avx512Float c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
  static Avx512Float max(Avx512Float a, Avx512Float b) { return {_mm512_max_ps(a.v, b.v)}; }

  // The lanes of up to four vectors that hold a row's elements.
  struct Extent {
    uint64_t lanes;
    __mmask16 of(int first) const { return static_cast<__mmask16>(lanes >> first); }
  };
  template <class T>
  static Extent extent(const T* /*row*/, int length) {
    return {length >= 64 ? ~uint64_t{0} : (uint64_t{1} << length) - 1};
  }
  // The elements row[first..first + kLanes) within the extent, zeros elsewhere.
  static Avx512Float load_within(const float* row, int first, Extent extent) {
    return {_mm512_maskz_loadu_ps(extent.of(first), row + first)};
  }
  static Avx512Float load_within(const bfloat16_t* row, int first, Extent extent) {
    return from_bfloat16(_mm256_maskz_loadu_epi16(extent.of(first), row + first));
  }
  static Avx512Float load_within(const float16_t* row, int first, Extent extent) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(extent.of(first), row + first))};
  }
  Avx512Float within(int first, Extent extent) const { return {_mm512_maskz_mov_ps(extent.of(first), v)}; }

  // 2^(k/32), k being the low five bits of the sum `shifted`.
  static Avx512Float fraction_power(Avx512Float shifted) {
    const __m512 low = _mm512_setr_ps(0x1p0f, 0x1.059b0ep0f, 0x1.0b5586p0f, 0x1.11301ep0f, 0x1.172b84p0f, 0x1.1d4874p0f,
                                      0x1.2387a6p0f, 0x1.29e9ep0f, 0x1.306fep0f, 0x1.371a74p0f, 0x1.3dea64p0f,
                                      0x1.44e086p0f, 0x1.4bfdaep0f, 0x1.5342b6p0f, 0x1.5ab07ep0f, 0x1.6247ecp0f);
    const __m512 high =
        _mm512_setr_ps(0x1.6a09e6p0f, 0x1.71f75ep0f, 0x1.7a1148p0f, 0x1.82589ap0f, 0x1.8ace54p0f, 0x1.93737cp0f,
                       0x1.9c4918p0f, 0x1.a5503cp0f, 0x1.ae89fap0f, 0x1.b7f77p0f, 0x1.c199bep0f, 0x1.cb720ep0f,
                       0x1.d5818ep0f, 0x1.dfc974p0f, 0x1.ea4afap0f, 0x1.f50766p0f);
    return {_mm512_permutex2var_ps(low, _mm512_castps_si512(shifted.v), high)};
  }
  // value * 2^floor(n); where that is too small, 0 or nearly.
  static Avx512Float scale_by_power(Avx512Float value, Avx512Float n) { return {_mm512_scalef_ps(value.v, n.v)}; }
  // 2^z, z being what the sum `shifted` was rounded to: the bits above the low five are added to the exponent, and the
  // low five, which come along, are taken away.
  static Avx512Float power(Avx512Float shifted) {
    const __m512i bits = _mm512_castps_si512(shifted.v);
    const __m512i whole = _mm512_slli_epi32(_mm512_srli_epi32(bits, 5), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(whole, _mm512_castps_si512(fraction_power(shifted).v)))};
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

  // Quarter i of vector k becomes quarter k of vector i.
  static void transpose_quarters(__m512* vectors) {
    const __m512 even_low = _mm512_shuffle_f32x4(vectors[0], vectors[1], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(vectors[0], vectors[1], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(vectors[2], vectors[3], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(vectors[2], vectors[3], 0xdd);
    vectors[0] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    vectors[1] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    vectors[2] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    vectors[3] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }

  static void transpose(Avx512Float* vectors) {
    __m512 pairs[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(vectors[i].v, vectors[i + 1].v);
      pairs[i + 1] = _mm512_unpackhi_ps(vectors[i].v, vectors[i + 1].v);
    }
    __m512 fours[16];
    for (int i = 0; i < 16; i += 4) {
      for (int k = 0; k < 2; ++k) {
        const __m512d a = _mm512_castps_pd(pairs[i + k]);
        const __m512d b = _mm512_castps_pd(pairs[i + k + 2]);
        fours[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        fours[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    }
    for (int i = 0; i < 4; ++i) {
      __m512 quarters[4] = {fours[i], fours[4 + i], fours[8 + i], fours[12 + i]};
      transpose_quarters(quarters);
      for (int k = 0; k < 4; ++k) {
        vectors[4 * k + i].v = quarters[k];
      }
    }
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
  static __mmask16 first(int count) {
    return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1u);
  }
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
  template <bool kMayBeNan>
  __m256i to_bfloat16() const {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25,
                                           23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half_up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_add_epi32(half_up, odd, half_up, _mm512_set1_epi32(1));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = kMayBeNan ? _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)) : rounded;
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(order, chosen));
  }
  __m256i to_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct Avx512Double {
  using acc_t = double;
  static constexpr int kLanes = 8;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kScalesByPowers = false;
  static constexpr int kTogether = 4;
  static constexpr bool kStoresNumbers = false;
  static constexpr bool kMasksCheaply = true;
  static constexpr bool kTransposes = true;
  static constexpr bool kStoresPastCaches = true;
  static void finish_stores() { _mm_sfence(); }  // store_past_caches is not ordered by itself
  static constexpr bool kReducesFourRows = false;
  static constexpr int kNarrowVectors = 0;
  __m512d v;

  static Avx512Double broadcast(double value) { return {_mm512_set1_pd(value)}; }

  static double element(const double* p) { return read_element(p); }

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
  static Avx512Double min(Avx512Double a, Avx512Double b) { return {_mm512_min_pd(a.v, b.v)}; }

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

  static void transpose(Avx512Double* vectors) {
    __m512d pairs[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm512_unpacklo_pd(vectors[i].v, vectors[i + 1].v);
      pairs[i + 1] = _mm512_unpackhi_pd(vectors[i].v, vectors[i + 1].v);
    }
    for (int i = 0; i < 2; ++i) {
      __m512 quarters[4];
      for (int k = 0; k < 4; ++k) {
        quarters[k] = _mm512_castpd_ps(pairs[2 * k + i]);
      }
      Avx512Float::transpose_quarters(quarters);
      for (int k = 0; k < 4; ++k) {
        vectors[2 * k + i].v = _mm512_castps_pd(quarters[k]);
      }
    }
  }

  double reduce_add() const {
    double lanes[kLanes];
    store(lanes);
    return compensated_sum(lanes, kLanes);
  }
  double reduce_max() const { return _mm512_reduce_max_pd(v); }

 private:
  static __mmask8 first(int count) {
    return count >= kLanes ? 0xff : static_cast<__mmask8>((1u << (count > 0 ? count : 0)) - 1u);
  }
};

}  // namespace masked_softmax
