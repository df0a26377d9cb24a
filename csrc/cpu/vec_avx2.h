// AVX2 with FMA and F16C: 8 floats or 4 doubles. Partial access is by masks or by pieces of 4, 2 and 1 elements (a
// masked store is microcoded on AMD), so no byte outside is touched.
#pragma once

#include "cpu/four_rows_x86.h"
#include "cpu/prelude.h"

namespace masked_softmax {

struct Avx2Float {
  using acc_t = float;
  static constexpr int kLanes = 8;
  static constexpr int kPowerSteps = 8;
  static constexpr bool kScalesByPowers = false;
  static constexpr int kTogether = 2;
  static constexpr bool kStoresNumbers = true;
  static constexpr bool kMasksCheaply = true;
  static constexpr bool kTransposes = true;
  static constexpr bool kStoresPastCaches = true;
  static void finish_stores() { _mm_sfence(); }  // store_past_caches is not ordered by itself
  static constexpr int kNarrowVectors = 8;
  static constexpr bool kReducesFourRows = true;
  __m256 v;

  static Avx2Float broadcast(float value) { return {_mm256_set1_ps(value)}; }

  static float element(const float* p) { return read_element(p); }
  static float element(const bfloat16_t* p) { return to_acc<float>(read_element(p)); }
  static float element(const float16_t* p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(read_element(p).bits)));
  }

  static Avx2Float load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Avx2Float load(const bfloat16_t* p) { return from_bfloat16(_mm_loadu_si128(as_vector(p))); }
  static Avx2Float load(const float16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(as_vector(p)))}; }

  static Avx2Float load_partial(const float* p, int count, float fill) {
    const __m256i mask = first(count);
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
  }
  static Avx2Float load_partial(const bfloat16_t* p, int count, float fill) {
    return filled(load_within(p, 0, extent(p, count)), count, fill);
  }
  static Avx2Float load_partial(const float16_t* p, int count, float fill) {
    return filled(load_within(p, 0, extent(p, count)), count, fill);
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16_t* p) const { _mm_storeu_si128(as_vector(p), to_bfloat16<true>()); }
  void store(bfloat16_number_t* p) const { _mm_storeu_si128(as_vector(p), to_bfloat16<false>()); }
  void store(float16_t* p) const { _mm_storeu_si128(as_vector(p), to_float16()); }

  void store_past_caches(float* p) const { _mm256_stream_ps(p, v); }
  void store_past_caches(bfloat16_t* p) const { _mm_stream_si128(as_vector(p), to_bfloat16<true>()); }
  void store_past_caches(bfloat16_number_t* p) const { _mm_stream_si128(as_vector(p), to_bfloat16<false>()); }
  void store_past_caches(float16_t* p) const { _mm_stream_si128(as_vector(p), to_float16()); }

  void store_partial(float* p, int count) const {
    __m128 rest = _mm256_castps256_ps128(v);
    if (count & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (count & 2) {
      _mm_storel_epi64(as_vector(p), _mm_castps_si128(rest));
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (count & 1) {
      write_element(p, _mm_cvtss_f32(rest));
    }
  }
  void store_partial(bfloat16_t* p, int count) const { store_16bit(p, count, to_bfloat16<true>()); }
  void store_partial(bfloat16_number_t* p, int count) const { store_16bit(p, count, to_bfloat16<false>()); }
  void store_partial(float16_t* p, int count) const { store_16bit(p, count, to_float16()); }

  static Avx2Float add(Avx2Float a, Avx2Float b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Avx2Float sub(Avx2Float a, Avx2Float b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Avx2Float mul(Avx2Float a, Avx2Float b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Avx2Float fma(Avx2Float a, Avx2Float b, Avx2Float c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx2Float fms(Avx2Float a, Avx2Float b, Avx2Float c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
  static Avx2Float max(Avx2Float a, Avx2Float b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Avx2Float min(Avx2Float a, Avx2Float b) { return {_mm256_min_ps(a.v, b.v)}; }

  // Which columns hold a row's elements; and of 16 bits the last of them, which no load of pairs brings.
  template <class T>
  struct Extent {
    __m256i length;
    __m128i last_column;
    __m128i last_element;
    __m256i mask(int first) const {
      return _mm256_cmpgt_epi32(length, _mm256_setr_epi32(first, first + 1, first + 2, first + 3, first + 4, first + 5,
                                                          first + 6, first + 7));
    }
    __m128i pairs(int first) const {
      return _mm_cmpgt_epi32(_mm256_castsi256_si128(length),
                             _mm_setr_epi32(first + 1, first + 3, first + 5, first + 7));
    }
    __m128i is_last(int first) const {
      const auto column = [&](int i) { return static_cast<int16_t>(first + i); };
      return _mm_cmpeq_epi16(last_column, _mm_setr_epi16(column(0), column(1), column(2), column(3), column(4),
                                                         column(5), column(6), column(7)));
    }
  };
  template <class T>
  static Extent<T> extent(const T* row, int length) {
    Extent<T> result{_mm256_set1_epi32(length), {}, {}};
    if constexpr (sizeof(T) == 2) {
      constexpr T kNone{};
      const T* const last = length > 0 ? row + (length - 1) : &kNone;
      result.last_column = _mm_set1_epi16(static_cast<int16_t>(length - 1));
      result.last_element = _mm_set1_epi16(static_cast<int16_t>(read_element(last).bits));
    }
    return result;
  }
  // The elements row[first..first + kLanes) within the extent, zeros elsewhere.
  static Avx2Float load_within(const float* row, int first, const Extent<float>& extent) {
    return {_mm256_maskload_ps(row + first, extent.mask(first))};
  }
  static Avx2Float load_within(const bfloat16_t* row, int first, const Extent<bfloat16_t>& extent) {
    return from_bfloat16(load_16bit_within(row, first, extent));
  }
  static Avx2Float load_within(const float16_t* row, int first, const Extent<float16_t>& extent) {
    return {_mm256_cvtph_ps(load_16bit_within(row, first, extent))};
  }
  template <class T>
  Avx2Float within(int first, const Extent<T>& extent) const {
    return {_mm256_and_ps(v, _mm256_castsi256_ps(extent.mask(first)))};
  }

  // 2^z, z being what the sum `shifted` was rounded to: its low three bits look up 2^(k/8), and the bits above them are
  // added to the exponent. The shift brings k along, which the table's entries are therefore less by.
  static Avx2Float power(Avx2Float shifted) {
    const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                                            0x3f7744fd, 0x3f7ac0c7);
    const __m256i bits = _mm256_castps_si256(shifted.v);
    return {
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 20), _mm256_permutevar8x32_epi32(table, bits)))};
  }
  // value, or 0 where n < smallest; a NaN is not less.
  static Avx2Float zero_where_less(Avx2Float n, Avx2Float smallest, Avx2Float value) {
    return {_mm256_and_ps(_mm256_cmp_ps(n.v, smallest.v, _CMP_NLT_UQ), value.v)};
  }
  static Avx2Float zero_where_zero(Avx2Float t, Avx2Float value) {
    return {_mm256_and_ps(_mm256_cmp_ps(t.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), value.v)};
  }
  Avx2Float first_lanes(int count) const { return {_mm256_and_ps(v, _mm256_castsi256_ps(first(count)))}; }
  static Avx2Float one_where_zero(Avx2Float t) {
    return {_mm256_and_ps(_mm256_cmp_ps(t.v, _mm256_setzero_ps(), _CMP_EQ_OQ), _mm256_set1_ps(1.0f))};
  }

  static void transpose(Avx2Float* vectors) {
    __m256 pairs[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(vectors[i].v, vectors[i + 1].v);
      pairs[i + 1] = _mm256_unpackhi_ps(vectors[i].v, vectors[i + 1].v);
    }
    __m256 fours[8];
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        const __m256d a = _mm256_castps_pd(pairs[i + k]);
        const __m256d b = _mm256_castps_pd(pairs[i + k + 2]);
        fours[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        fours[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
      }
    }
    for (int i = 0; i < 4; ++i) {
      vectors[i].v = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
      vectors[4 + i].v = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
  }

  // In double, rounded once.
  float reduce_add() const {
    return Four::add_one(Four::add_as_doubles(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
  }
  static void reduce_add_four(const Avx2Float* lanes, float* sums) {
    __m256d rows[4];
    for (int r = 0; r < 4; ++r) {
      rows[r] = Four::add_as_doubles(_mm256_castps256_ps128(lanes[r].v), _mm256_extractf128_ps(lanes[r].v, 1));
    }
    _mm_storeu_ps(sums, Four::add(rows));
  }
  float reduce_max() const {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static void reduce_max_four(const Avx2Float* lanes, float* maxima) {
    __m128 rows[4];
    for (int r = 0; r < 4; ++r) {
      rows[r] = _mm_max_ps(_mm256_castps256_ps128(lanes[r].v), _mm256_extractf128_ps(lanes[r].v, 1));
    }
    _mm_storeu_ps(maxima, Four::max(rows));
  }

 private:
  using Four = FourRows<Avx2Float>;

  static const __m128i* as_vector(const void* p) { return static_cast<const __m128i*>(p); }
  static __m128i* as_vector(void* p) { return static_cast<__m128i*>(p); }

  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Avx2Float filled(Avx2Float loaded, int count, float fill) {
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), loaded.v, _mm256_castsi256_ps(first(count)))};
  }

  // In pairs, and the last by itself.
  template <class T>
  static __m128i load_16bit_within(const T* row, int first, const Extent<T>& extent) {
    const __m128i pairs = _mm_maskload_epi32(reinterpret_cast<const int*>(row + first), extent.pairs(first));
    return _mm_blendv_epi8(pairs, extent.last_element, extent.is_last(first));
  }
  static void store_16bit(void* to, int count, __m128i bits) {
    char* p = static_cast<char*>(to);
    uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(bits));
    if (count & 4) {
      std::memcpy(p, &rest, 8);
      rest = static_cast<uint64_t>(_mm_extract_epi64(bits, 1));
      p += 8;
    }
    if (count & 2) {
      const uint32_t pair = static_cast<uint32_t>(rest);
      std::memcpy(p, &pair, 4);
      rest >>= 32;
      p += 4;
    }
    if (count & 1) {
      const uint16_t single = static_cast<uint16_t>(rest);
      std::memcpy(p, &single, 2);
    }
  }

  static Avx2Float from_bfloat16(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  // To nearest, ties to even.
  template <bool kMayBeNan>
  __m128i to_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i chosen = kMayBeNan ? _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan) : rounded;
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  __m128i to_float16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct Avx2Double {
  using acc_t = double;
  static constexpr int kLanes = 4;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kScalesByPowers = false;
  static constexpr int kTogether = 2;
  static constexpr bool kStoresNumbers = false;
  static constexpr bool kMasksCheaply = true;
  static constexpr bool kTransposes = true;
  static constexpr bool kStoresPastCaches = true;
  static void finish_stores() { _mm_sfence(); }  // store_past_caches is not ordered by itself
  static constexpr bool kReducesFourRows = false;
  static constexpr int kNarrowVectors = 0;
  __m256d v;

  static Avx2Double broadcast(double value) { return {_mm256_set1_pd(value)}; }

  static double element(const double* p) { return read_element(p); }

  static Avx2Double load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Avx2Double load_partial(const double* p, int count, double fill) {
    const __m256i mask = first(count);
    return {_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask))};
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_past_caches(double* p) const { _mm256_stream_pd(p, v); }
  void store_partial(double* p, int count) const {
    __m128d rest = _mm256_castpd256_pd128(v);
    if (count & 2) {
      _mm_storeu_pd(p, rest);
      rest = _mm256_extractf128_pd(v, 1);
      p += 2;
    }
    if (count & 1) {
      write_element(p, _mm_cvtsd_f64(rest));
    }
  }

  static Avx2Double add(Avx2Double a, Avx2Double b) { return {_mm256_add_pd(a.v, b.v)}; }
  static Avx2Double sub(Avx2Double a, Avx2Double b) { return {_mm256_sub_pd(a.v, b.v)}; }
  static Avx2Double mul(Avx2Double a, Avx2Double b) { return {_mm256_mul_pd(a.v, b.v)}; }
  static Avx2Double fma(Avx2Double a, Avx2Double b, Avx2Double c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static Avx2Double fms(Avx2Double a, Avx2Double b, Avx2Double c) { return {_mm256_fmsub_pd(a.v, b.v, c.v)}; }
  static Avx2Double max(Avx2Double a, Avx2Double b) { return {_mm256_max_pd(a.v, b.v)}; }
  static Avx2Double min(Avx2Double a, Avx2Double b) { return {_mm256_min_pd(a.v, b.v)}; }

  static Avx2Double power(Avx2Double shifted) {
    return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(shifted.v), 52))};
  }
  static Avx2Double zero_where_less(Avx2Double n, Avx2Double smallest, Avx2Double value) {
    return {_mm256_and_pd(_mm256_cmp_pd(n.v, smallest.v, _CMP_NLT_UQ), value.v)};
  }
  static Avx2Double zero_where_zero(Avx2Double t, Avx2Double value) {
    return {_mm256_and_pd(_mm256_cmp_pd(t.v, _mm256_setzero_pd(), _CMP_NEQ_UQ), value.v)};
  }
  Avx2Double first_lanes(int count) const { return {_mm256_and_pd(v, _mm256_castsi256_pd(first(count)))}; }
  static Avx2Double one_where_zero(Avx2Double t) {
    return {_mm256_and_pd(_mm256_cmp_pd(t.v, _mm256_setzero_pd(), _CMP_EQ_OQ), _mm256_set1_pd(1.0))};
  }

  static void transpose(Avx2Double* vectors) {
    __m256d pairs[4];
    for (int i = 0; i < 4; i += 2) {
      pairs[i] = _mm256_unpacklo_pd(vectors[i].v, vectors[i + 1].v);
      pairs[i + 1] = _mm256_unpackhi_pd(vectors[i].v, vectors[i + 1].v);
    }
    for (int i = 0; i < 2; ++i) {
      vectors[i].v = _mm256_permute2f128_pd(pairs[i], pairs[2 + i], 0x20);
      vectors[2 + i].v = _mm256_permute2f128_pd(pairs[i], pairs[2 + i], 0x31);
    }
  }

  double reduce_add() const {
    double lanes[kLanes];
    store(lanes);
    return compensated_sum(lanes, kLanes);
  }
  double reduce_max() const {
    const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
  }

 private:
  static __m256i first(int count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
};

}  // namespace masked_softmax
