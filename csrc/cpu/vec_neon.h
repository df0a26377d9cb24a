// NEON on aarch64: 4 floats or 2 doubles. Masked access goes element by element.
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

struct Float : VectorDefaults<Float, float, 4> {
  Float() = default;
  Float(vector_t value) { v = value; }

  using VectorDefaults::load;
  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load(const bfloat16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  static Float load(const float16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }

  using VectorDefaults::store;
  void store(float* p) const { vst1q_f32(p, v); }
  void store(bfloat16_t* p) const {
    const uint32x4_t is_number = vceqq_f32(v, v);
    store_words(p, vbslq_u32(is_number, rounded_to_bfloat16(), vdupq_n_u32(0x7fc00000)));
  }
  void store(bfloat16_no_nan_t* p) const { store_words(p, rounded_to_bfloat16()); }
  void store(float16_t* p) const { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  template <class T>
  void store(T* p, Mask mask) const {
    T elements[kLanes];
    store(elements);
    for (int i = 0; i < kLanes && i < mask.size(); ++i) {
      write_element(p + i, elements[i]);
    }
  }

  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c.v, a.v, b.v); }

  // Added in double.
  float reduce_add() const {
    const float64x2_t two = vaddq_f64(vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v));
    return static_cast<float>(vgetq_lane_f64(two, 0) + vgetq_lane_f64(two, 1));
  }
  float reduce_max() const { return vmaxvq_f32(v); }

 private:
  // The upper halves of the lanes are the bfloat16 bits, rounded to nearest, ties to even.
  uint32x4_t rounded_to_bfloat16() const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  }
  static void store_words(void* p, uint32x4_t words) { vst1_u16(static_cast<uint16_t*>(p), vshrn_n_u32(words, 16)); }
};

struct Double : VectorDefaults<Double, double, 2> {
  Double() = default;
  Double(vector_t value) { v = value; }

  using VectorDefaults::load;
  using VectorDefaults::store;
  static Double load(const double* p) { return vld1q_f64(p); }
  void store(double* p) const { vst1q_f64(p, v); }

  static Double fma(Double a, Double b, Double c) { return vfmaq_f64(c.v, a.v, b.v); }
  double reduce_add() const { return vgetq_lane_f64(v, 0) + vgetq_lane_f64(v, 1); }
  double reduce_max() const { return vmaxvq_f64(v); }
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
