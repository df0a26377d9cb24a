// NEON on aarch64: 4 floats or 2 doubles. Partial access goes element by element through a small array.
#pragma once

#include <arm_neon.h>

#include "cpu/prelude.h"

namespace masked_softmax {

struct NeonFloat {
  using acc_t = float;
  static constexpr int kLanes = 4;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kScalesByPowers = false;
  static constexpr int kTogether = 4;
  static constexpr bool kStoresNumbers = false;
  static constexpr bool kMasksCheaply = false;
  static constexpr bool kTransposes = false;
  static constexpr bool kStoresPastCaches = false;
  static void finish_stores() {}
  static constexpr bool kReducesFourRows = false;
  static constexpr int kNarrowVectors = 0;
  float32x4_t v;

  static NeonFloat broadcast(float value) { return {vdupq_n_f32(value)}; }

  template <class T>
  static float element(const T* p) {
    return to_acc<float>(read_element(p));
  }

  static NeonFloat load(const float* p) { return {vld1q_f32(p)}; }
  static NeonFloat load(const bfloat16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }
  static NeonFloat load(const float16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }
  template <class T>
  static NeonFloat load_partial(const T* p, int count, float fill) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      lanes[i] = i < count ? to_acc<float>(read_element(p + i)) : fill;
    }
    return load(lanes);
  }

  void store(float* p) const { vst1q_f32(p, v); }
  void store(bfloat16_t* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(v, v);
    const uint32x4_t chosen = vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(chosen, 16));
  }
  void store(float16_t* p) const { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  template <class T>
  void store_partial(T* p, int count) const {
    T lanes[kLanes];
    store(lanes);
    for (int i = 0; i < count; ++i) {
      write_element(p + i, lanes[i]);
    }
  }

  static NeonFloat add(NeonFloat a, NeonFloat b) { return {vaddq_f32(a.v, b.v)}; }
  static NeonFloat sub(NeonFloat a, NeonFloat b) { return {vsubq_f32(a.v, b.v)}; }
  static NeonFloat mul(NeonFloat a, NeonFloat b) { return {vmulq_f32(a.v, b.v)}; }
  static NeonFloat fma(NeonFloat a, NeonFloat b, NeonFloat c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static NeonFloat fms(NeonFloat a, NeonFloat b, NeonFloat c) { return {vfmaq_f32(vnegq_f32(c.v), a.v, b.v)}; }
  // vmaxnmq would return the number of a pair; vmaxq would return NaN: compare and choose, as the interface says.
  static NeonFloat max(NeonFloat a, NeonFloat b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  static NeonFloat min(NeonFloat a, NeonFloat b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }

  static NeonFloat power(NeonFloat shifted) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(shifted.v), 23))};
  }
  static NeonFloat zero_where_less(NeonFloat n, NeonFloat smallest, NeonFloat value) {
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.v), vcltq_f32(n.v, smallest.v)))};
  }
  static NeonFloat zero_where_zero(NeonFloat t, NeonFloat value) {
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.v), vceqzq_f32(t.v)))};
  }
  NeonFloat first_lanes(int count) const {
    const uint32_t lanes[kLanes] = {0, 1, 2, 3};
    const uint32x4_t kept = vcltq_u32(vld1q_u32(lanes), vdupq_n_u32(static_cast<uint32_t>(count > 0 ? count : 0)));
    return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), kept))};
  }
  static NeonFloat one_where_zero(NeonFloat t) {
    return {vreinterpretq_f32_u32(vandq_u32(vceqzq_f32(t.v), vreinterpretq_u32_f32(vdupq_n_f32(1.0f))))};
  }

  // In double, rounded once.
  float reduce_add() const {
    const float64x2_t two = vaddq_f64(vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v));
    return static_cast<float>(vgetq_lane_f64(two, 0) + vgetq_lane_f64(two, 1));
  }
  float reduce_max() const { return vmaxvq_f32(v); }
};

struct NeonDouble {
  using acc_t = double;
  static constexpr int kLanes = 2;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kScalesByPowers = false;
  static constexpr int kTogether = 4;
  static constexpr bool kStoresNumbers = false;
  static constexpr bool kMasksCheaply = false;
  static constexpr bool kTransposes = false;
  static constexpr bool kStoresPastCaches = false;
  static void finish_stores() {}
  static constexpr bool kReducesFourRows = false;
  static constexpr int kNarrowVectors = 0;
  float64x2_t v;

  static NeonDouble broadcast(double value) { return {vdupq_n_f64(value)}; }

  static double element(const double* p) { return read_element(p); }

  static NeonDouble load(const double* p) { return {vld1q_f64(p)}; }
  static NeonDouble load_partial(const double* p, int count, double fill) {
    const double lanes[kLanes] = {count > 0 ? read_element(p) : fill, fill};
    return load(lanes);
  }
  void store(double* p) const { vst1q_f64(p, v); }
  void store_partial(double* p, int count) const {
    if (count > 0) {
      write_element(p, vgetq_lane_f64(v, 0));
    }
  }

  static NeonDouble add(NeonDouble a, NeonDouble b) { return {vaddq_f64(a.v, b.v)}; }
  static NeonDouble sub(NeonDouble a, NeonDouble b) { return {vsubq_f64(a.v, b.v)}; }
  static NeonDouble mul(NeonDouble a, NeonDouble b) { return {vmulq_f64(a.v, b.v)}; }
  static NeonDouble fma(NeonDouble a, NeonDouble b, NeonDouble c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  static NeonDouble fms(NeonDouble a, NeonDouble b, NeonDouble c) { return {vfmaq_f64(vnegq_f64(c.v), a.v, b.v)}; }
  static NeonDouble max(NeonDouble a, NeonDouble b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
  static NeonDouble min(NeonDouble a, NeonDouble b) { return {vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v)}; }

  static NeonDouble power(NeonDouble shifted) {
    return {vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(shifted.v), 52))};
  }
  static NeonDouble zero_where_less(NeonDouble n, NeonDouble smallest, NeonDouble value) {
    return {vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(value.v), vcltq_f64(n.v, smallest.v)))};
  }
  static NeonDouble zero_where_zero(NeonDouble t, NeonDouble value) {
    return {vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(value.v), vceqzq_f64(t.v)))};
  }
  NeonDouble first_lanes(int count) const {
    const uint64_t lanes[kLanes] = {0, 1};
    const uint64x2_t kept = vcltq_u64(vld1q_u64(lanes), vdupq_n_u64(static_cast<uint64_t>(count > 0 ? count : 0)));
    return {vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(v), kept))};
  }
  static NeonDouble one_where_zero(NeonDouble t) {
    return {vreinterpretq_f64_u64(vandq_u64(vceqzq_f64(t.v), vreinterpretq_u64_f64(vdupq_n_f64(1.0))))};
  }

  double reduce_add() const { return vgetq_lane_f64(v, 0) + vgetq_lane_f64(v, 1); }
  double reduce_max() const { return vmaxvq_f64(v); }
};

}  // namespace masked_softmax
