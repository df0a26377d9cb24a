// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Masked loads and stores touch no byte outside of the mask.
#pragma once

#include "cpu/vec_x86.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// Bit i is lane i.
template <class lanes_t>
struct BitMask {
  lanes_t bits;
};

struct Float : X86Float<Float, 16> {
  static constexpr int kExp2TableSize = 32;
  static constexpr bool kHasScalef = true;
  static constexpr bool kHasMaskedLoads16Bit = true;
  Float() = default;
  Float(vector_t value) { v = value; }

  using Mask = BitMask<__mmask16>;
  static Mask first_n(int64_t n, int k = 0) {
    const __m512i lanes = _mm512_add_epi32(_mm512_set1_epi32(k * kLanes),
                                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return {_mm512_cmpgt_epi32_mask(_mm512_set1_epi32(static_cast<int>(n)), lanes)};
  }

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const bfloat16_t* p) { return from_bfloat16(_mm256_loadu_si256(as_vector(p))); }
  static Float load(const float16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(as_vector(p))); }

  static Float load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask.bits, p); }
  static Float load(const bfloat16_t* p, Mask mask) { return from_bfloat16(_mm256_maskz_loadu_epi16(mask.bits, p)); }
  static Float load(const float16_t* p, Mask mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask.bits, p)); }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16_t* p) const { _mm256_storeu_si256(as_vector(p), to_bfloat16<true>()); }
  void store(bfloat16_no_nan_t* p) const { _mm256_storeu_si256(as_vector(p), to_bfloat16<false>()); }
  void store(float16_t* p) const { _mm256_storeu_si256(as_vector(p), to_float16()); }

  void store_non_temporal(float* p) const { _mm512_stream_ps(p, v); }
  void store_non_temporal(bfloat16_t* p) const { _mm256_stream_si256(as_vector(p), to_bfloat16<true>()); }
  void store_non_temporal(bfloat16_no_nan_t* p) const { _mm256_stream_si256(as_vector(p), to_bfloat16<false>()); }
  void store_non_temporal(float16_t* p) const { _mm256_stream_si256(as_vector(p), to_float16()); }

  void store(float* p, Mask mask) const { _mm512_mask_storeu_ps(p, mask.bits, v); }
  void store(bfloat16_t* p, Mask mask) const { _mm256_mask_storeu_epi16(p, mask.bits, to_bfloat16<true>()); }
  void store(bfloat16_no_nan_t* p, Mask mask) const { _mm256_mask_storeu_epi16(p, mask.bits, to_bfloat16<false>()); }
  void store(float16_t* p, Mask mask) const { _mm256_mask_storeu_epi16(p, mask.bits, to_float16()); }

  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a.v, b.v); }

  Float masked(Mask mask) const { return _mm512_maskz_mov_ps(mask.bits, v); }
  Float masked(Mask mask, float fill) const { return _mm512_mask_mov_ps(_mm512_set1_ps(fill), mask.bits, v); }

  // 2^(k/32), where k is the low five bits of `encoded`.
  static Float table_lookup(Float encoded) {
    const __m512 low = _mm512_setr_ps(0x1p0f, 0x1.059b0ep0f, 0x1.0b5586p0f, 0x1.11301ep0f, 0x1.172b84p0f, 0x1.1d4874p0f,
                                      0x1.2387a6p0f, 0x1.29e9ep0f, 0x1.306fep0f, 0x1.371a74p0f, 0x1.3dea64p0f,
                                      0x1.44e086p0f, 0x1.4bfdaep0f, 0x1.5342b6p0f, 0x1.5ab07ep0f, 0x1.6247ecp0f);
    const __m512 high =
        _mm512_setr_ps(0x1.6a09e6p0f, 0x1.71f75ep0f, 0x1.7a1148p0f, 0x1.82589ap0f, 0x1.8ace54p0f, 0x1.93737cp0f,
                       0x1.9c4918p0f, 0x1.a5503cp0f, 0x1.ae89fap0f, 0x1.b7f77p0f, 0x1.c199bep0f, 0x1.cb720ep0f,
                       0x1.d5818ep0f, 0x1.dfc974p0f, 0x1.ea4afap0f, 0x1.f50766p0f);
    return _mm512_permutex2var_ps(low, _mm512_castps_si512(encoded.v), high);
  }
  static Float scalef(Float value, Float n) { return _mm512_scalef_ps(value.v, n.v); }
  // The low five bits of `encoded` are an index of the table, the bits above them are added to the exponent.
  static Float exp2_of(Float encoded) {
    const __m512i bits = _mm512_castps_si512(encoded.v);
    const __m512i whole = _mm512_slli_epi32(_mm512_srli_epi32(bits, 5), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(whole, _mm512_castps_si512(table_lookup(encoded).v)));
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

  static void transpose(Float* vectors) {
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

  float reduce_max() const { return _mm512_reduce_max_ps(v); }
  // The halves are added in float, the rest in double: a sum is rounded twice, but converting costs half as much.
  __m256d four_sums() const {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return add_as_doubles(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  __m128 four_maxima() const {
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }

 private:
  static const __m256i* as_vector(const void* p) { return static_cast<const __m256i*>(p); }
  static __m256i* as_vector(void* p) { return static_cast<__m256i*>(p); }
  // A bfloat16 is the upper half of a float: word i of sixteen becomes, or comes from, word 2 i + 1 of thirty-two.
  static Float from_bfloat16(__m256i words) {
    constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
    const __m512i order = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                           4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpperHalves, order, _mm512_castsi256_si512(words)));
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

struct Double : X86Defaults<Double, double, 8> {
  Double() = default;
  Double(vector_t value) { v = value; }

  using Mask = BitMask<__mmask8>;
  static Mask first_n(int64_t n, int k = 0) {
    const __m512i lanes = _mm512_add_epi64(_mm512_set1_epi64(k * kLanes), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    return {_mm512_cmpgt_epi64_mask(_mm512_set1_epi64(n), lanes)};
  }

  static Double load(const double* p) { return _mm512_loadu_pd(p); }
  static Double load(const double* p, Mask mask) { return _mm512_maskz_loadu_pd(mask.bits, p); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_non_temporal(double* p) const { _mm512_stream_pd(p, v); }
  void store(double* p, Mask mask) const { _mm512_mask_storeu_pd(p, mask.bits, v); }

  static Double fma(Double a, Double b, Double c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
  static Double max(Double a, Double b) { return _mm512_max_pd(a.v, b.v); }
  static Double min(Double a, Double b) { return _mm512_min_pd(a.v, b.v); }

  Double masked(Mask mask) const { return _mm512_maskz_mov_pd(mask.bits, v); }
  Double masked(Mask mask, double fill) const { return _mm512_mask_mov_pd(_mm512_set1_pd(fill), mask.bits, v); }

  static void transpose(Double* vectors) {
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
      Float::transpose_quarters(quarters);
      for (int k = 0; k < 4; ++k) {
        vectors[2 * k + i].v = _mm512_castps_pd(quarters[k]);
      }
    }
  }

  double reduce_max() const { return _mm512_reduce_max_pd(v); }
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
