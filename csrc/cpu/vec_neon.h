// NEON on aarch64: 4 floats or 2 doubles. Masked access goes element by element through a small array.
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

struct Float : VectorDefaults<Float, float, 4> {
  float32x4_t v;

  Float() = default;
  Float(float32x4_t value) : v(value) {}

  static Float broadcast(float value) { return vdupq_n_f32(value); }

  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load(const bfloat16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  static Float load(const float16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  template <class T>
  static Float load(const T* p, Mask mask) {
    float elements[kLanes] = {};
    for (int i = 0; i < kLanes && i < mask.count; ++i) {
      elements[i] = element(p + i);
    }
    return load(elements);
  }

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
    for (int i = 0; i < kLanes && i < mask.count; ++i) {
      write_element(p + i, elements[i]);
    }
  }

  Float operator+(Float b) const { return vaddq_f32(v, b.v); }
  Float operator-(Float b) const { return vsubq_f32(v, b.v); }
  Float operator*(Float b) const { return vmulq_f32(v, b.v); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c.v, a.v, b.v); }
  static Float fms(Float a, Float b, Float c) { return vfmaq_f32(vnegq_f32(c.v), a.v, b.v); }
  // Compare and choose: of a NaN and a number, vmaxq would return the NaN and vmaxnmq the number.
  static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v); }
  static Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v); }

  static Float exp2_of(Float encoded) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(encoded.v), 23));
  }
  static Float zero_where_less(Float n, Float least, Float value) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.v), vcltq_f32(n.v, least.v)));
  }
  static Float zero_where_zero(Float t, Float value) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.v), vceqzq_f32(t.v)));
  }
  Float masked(Mask mask, float fill = 0) const {
    const int32_t lanes[kLanes] = {0, 1, 2, 3};
    return vbslq_f32(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(mask.count)), v, vdupq_n_f32(fill));
  }
  static Float one_where_zero(Float t) {
    return vreinterpretq_f32_u32(vandq_u32(vceqzq_f32(t.v), vreinterpretq_u32_f32(vdupq_n_f32(1.0f))));
  }

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
  float64x2_t v;

  Double() = default;
  Double(float64x2_t value) : v(value) {}

  static Double broadcast(double value) { return vdupq_n_f64(value); }

  static Double load(const double* p) { return vld1q_f64(p); }
  static Double load(const double* p, Mask mask) {
    const double elements[kLanes] = {mask.count > 0 ? read_element(p) : 0, mask.count > 1 ? read_element(p + 1) : 0};
    return load(elements);
  }
  void store(double* p) const { vst1q_f64(p, v); }
  void store(double* p, Mask mask) const {
    if (mask.count > 1) {
      store(p);
    } else if (mask.count > 0) {
      write_element(p, vgetq_lane_f64(v, 0));
    }
  }

  Double operator+(Double b) const { return vaddq_f64(v, b.v); }
  Double operator-(Double b) const { return vsubq_f64(v, b.v); }
  Double operator*(Double b) const { return vmulq_f64(v, b.v); }
  static Double fma(Double a, Double b, Double c) { return vfmaq_f64(c.v, a.v, b.v); }
  static Double fms(Double a, Double b, Double c) { return vfmaq_f64(vnegq_f64(c.v), a.v, b.v); }
  static Double max(Double a, Double b) { return vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v); }
  static Double min(Double a, Double b) { return vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v); }

  static Double exp2_of(Double encoded) {
    return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(encoded.v), 52));
  }
  static Double zero_where_less(Double n, Double least, Double value) {
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(value.v), vcltq_f64(n.v, least.v)));
  }
  static Double zero_where_zero(Double t, Double value) {
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(value.v), vceqzq_f64(t.v)));
  }
  Double masked(Mask mask, double fill = 0) const {
    const int64_t lanes[kLanes] = {0, 1};
    return vbslq_f64(vcltq_s64(vld1q_s64(lanes), vdupq_n_s64(mask.count)), v, vdupq_n_f64(fill));
  }
  static Double one_where_zero(Double t) {
    return vreinterpretq_f64_u64(vandq_u64(vceqzq_f64(t.v), vreinterpretq_u64_f64(vdupq_n_f64(1.0))));
  }

  double reduce_add() const { return vgetq_lane_f64(v, 0) + vgetq_lane_f64(v, 1); }
  double reduce_max() const { return vmaxvq_f64(v); }
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
