// AVX2 with FMA and F16C: 8 floats or 4 doubles. Masked loads touch no byte outside of the mask. Masked stores go in
// parts, because AMD's masked store is microcoded.
#pragma once

#include "cpu/vec_x86.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// Stores the first `bytes` bytes, fewer than 32, in parts of 16, 8, 4 and 2.
MASKED_SOFTMAX_INLINE void store_bytes(void* to, __m256i vector, unsigned bytes) {
  char* p = static_cast<char*>(to);
  __m128i half = _mm256_castsi256_si128(vector);
  if (bytes & 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    half = _mm256_extracti128_si256(vector, 1);
    p += 16;
  }
  uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(half));
  if (bytes & 8) {
    std::memcpy(p, &rest, 8);
    rest = static_cast<uint64_t>(_mm_extract_epi64(half, 1));
    p += 8;
  }
  if (bytes & 4) {
    std::memcpy(p, &rest, 4);
    rest >>= 32;
    p += 4;
  }
  if (bytes & 2) {
    std::memcpy(p, &rest, 2);
  }
}

struct Float : X86Float<Float, 8> {
  static constexpr int kTileVectors = 8;
  static constexpr int kExp2TableSize = 8;
  Float() = default;
  Float(vector_t value) { v = value; }

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const bfloat16_t* p) { return from_bfloat16(_mm_loadu_si128(as_vector(p))); }
  static Float load(const float16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(as_vector(p))); }

  static Float load(const float* p, Mask mask) { return _mm256_maskload_ps(p, (__m256i)lane_mask(mask)); }
  static Float load(const bfloat16_t* p, Mask mask) { return from_bfloat16(load_16bit(p, mask)); }
  static Float load(const float16_t* p, Mask mask) { return _mm256_cvtph_ps(load_16bit(p, mask)); }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16_t* p) const { _mm_storeu_si128(as_vector(p), to_bfloat16<true>()); }
  void store(bfloat16_no_nan_t* p) const { _mm_storeu_si128(as_vector(p), to_bfloat16<false>()); }
  void store(float16_t* p) const { _mm_storeu_si128(as_vector(p), to_float16()); }

  void store_non_temporal(float* p) const { _mm256_stream_ps(p, v); }
  void store_non_temporal(bfloat16_t* p) const { _mm_stream_si128(as_vector(p), to_bfloat16<true>()); }
  void store_non_temporal(bfloat16_no_nan_t* p) const { _mm_stream_si128(as_vector(p), to_bfloat16<false>()); }
  void store_non_temporal(float16_t* p) const { _mm_stream_si128(as_vector(p), to_float16()); }

  template <class T>
  void store(T* p, Mask mask) const {
    const int n = mask.size();
    if (n >= kLanes) {
      store(p);
    } else {
      store_bytes(p, bits_for(p), static_cast<unsigned>(n > 0 ? n : 0) * sizeof(T));
    }
  }

  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a.v, b.v); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a.v, b.v); }

  // The low three bits of `encoded` are an index k of the table, the bits above them are added to the exponent.
  // Shifting moves k into the fraction, so the table's entries are 2^(k/8) less that.
  static Float exp2_of(Float encoded) {
    const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                                            0x3f7744fd, 0x3f7ac0c7);
    const __m256i bits = _mm256_castps_si256(encoded.v);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 20), _mm256_permutevar8x32_epi32(table, bits)));
  }

  static void transpose(Float* vectors) {
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

  float reduce_max() const {
    const __m128 four = four_maxima();
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  // Added in double.
  __m256d four_sums() const { return add_as_doubles(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
  __m128 four_maxima() const { return _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

 private:
  static const __m128i* as_vector(const void* p) { return static_cast<const __m128i*>(p); }
  static __m128i* as_vector(void* p) { return static_cast<__m128i*>(p); }

  // For 16-bit elements: the pairs that the mask has as a whole, and the lane of its last element.
  static __m128i pair_mask(Mask mask) {
    const int first = mask.first;
    return _mm_cmpgt_epi32(_mm_set1_epi32(mask.count), _mm_setr_epi32(first + 1, first + 3, first + 5, first + 7));
  }
  static __m128i last_lane_mask(Mask mask) {
    const auto lane = [&](int i) { return static_cast<int16_t>(mask.first + i); };
    return _mm_cmpeq_epi16(_mm_set1_epi16(static_cast<int16_t>(mask.count - 1)),
                           _mm_setr_epi16(lane(0), lane(1), lane(2), lane(3), lane(4), lane(5), lane(6), lane(7)));
  }
  // There is no masked load of 16-bit elements: pairs are loaded as 32 bits, and the last element is inserted. Its
  // address is the same for all vectors of a tile, so that the tile loads it once.
  template <class T>
  static __m128i load_16bit(const T* p, Mask mask) {
    static constexpr T kNone{};
    const T* const last = mask.count > 0 ? p - mask.first + (mask.count - 1) : &kNone;
    const __m128i pairs = _mm_maskload_epi32(reinterpret_cast<const int*>(p), pair_mask(mask));
    return _mm_blendv_epi8(pairs, _mm_set1_epi16(static_cast<int16_t>(read_element(last).bits)), last_lane_mask(mask));
  }

  // What is stored of an element type.
  __m256i bits_for(const float*) const { return _mm256_castps_si256(v); }
  __m256i bits_for(const bfloat16_t*) const { return _mm256_castsi128_si256(to_bfloat16<true>()); }
  __m256i bits_for(const bfloat16_no_nan_t*) const { return _mm256_castsi128_si256(to_bfloat16<false>()); }
  __m256i bits_for(const float16_t*) const { return _mm256_castsi128_si256(to_float16()); }

  static Float from_bfloat16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
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

struct Double : X86Defaults<Double, double, 4> {
  Double() = default;
  Double(vector_t value) { v = value; }

  static Double load(const double* p) { return _mm256_loadu_pd(p); }
  static Double load(const double* p, Mask mask) { return _mm256_maskload_pd(p, (__m256i)lane_mask(mask)); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_non_temporal(double* p) const { _mm256_stream_pd(p, v); }
  void store(double* p, Mask mask) const {
    const int n = mask.size();
    if (n >= kLanes) {
      store(p);
    } else {
      store_bytes(p, _mm256_castpd_si256(v), static_cast<unsigned>(n > 0 ? n : 0) * sizeof(double));
    }
  }

  static Double fma(Double a, Double b, Double c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
  static Double max(Double a, Double b) { return _mm256_max_pd(a.v, b.v); }
  static Double min(Double a, Double b) { return _mm256_min_pd(a.v, b.v); }

  static void transpose(Double* vectors) {
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
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
