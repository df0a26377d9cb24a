// No instruction set beyond the compiler's baseline: one element at a time. What runs where nothing better does, and
// what shows plainly what a vector has to offer.
#pragma once

#include "cpu/prelude.h"

namespace masked_softmax {

// The product is not rounded before the sum. A double holds the product of two floats; for doubles the C library
// knows whether the processor has the instruction.
inline float fused_multiply_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

template <class T>
struct ScalarVec {
  using acc_t = T;
  using bits_t = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static constexpr int kLanes = 1;
  static constexpr int kPowerSteps = 1;
  static constexpr int kTogether = 1;
  static constexpr bool kStoresPastCaches = false;
  static void finish_stores() {}
  static constexpr bool kReducesFourRows = false;
  static constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  T v;

  static ScalarVec broadcast(T value) { return {value}; }

  template <class E>
  static ScalarVec load(const E* p) {
    return {to_acc<T>(*p)};
  }
  template <class E>
  static ScalarVec load_partial(const E* p, int count, T fill) {
    return {count > 0 ? to_acc<T>(*p) : fill};
  }
  template <class E>
  void store(E* p) const {
    *p = from_acc<E>(v);
  }
  template <class E>
  void store_partial(E* p, int count) const {
    if (count > 0) {
      store(p);
    }
  }

  static ScalarVec add(ScalarVec a, ScalarVec b) { return {a.v + b.v}; }
  static ScalarVec sub(ScalarVec a, ScalarVec b) { return {a.v - b.v}; }
  static ScalarVec mul(ScalarVec a, ScalarVec b) { return {a.v * b.v}; }
  static ScalarVec fma(ScalarVec a, ScalarVec b, ScalarVec c) { return {fused_multiply_add(a.v, b.v, c.v)}; }
  static ScalarVec fms(ScalarVec a, ScalarVec b, ScalarVec c) { return {fused_multiply_add(a.v, b.v, -c.v)}; }
  // b where either is NaN.
  static ScalarVec max(ScalarVec a, ScalarVec b) { return a.v > b.v ? a : b; }

  // 2^n, n being what the sum `shifted` was rounded to.
  static ScalarVec power(ScalarVec shifted) {
    return {bit_cast<T>(static_cast<bits_t>(bit_cast<bits_t>(shifted.v) << kMantissaBits))};
  }
  // value, or 0 where n < smallest; a NaN is not less.
  static ScalarVec zero_where_less(ScalarVec n, ScalarVec smallest, ScalarVec value) {
    return {n.v < smallest.v ? T{0} : value.v};
  }
  static ScalarVec zero_where_zero(ScalarVec t, ScalarVec value) { return {t.v == T{0} ? T{0} : value.v}; }
  static ScalarVec one_where_zero(ScalarVec t) { return {t.v == T{0} ? T{1} : T{0}}; }
  ScalarVec first_lanes(int count) const { return {count > 0 ? v : T{0}}; }

  T reduce_add() const { return v; }
  T reduce_max() const { return v; }
};

}  // namespace masked_softmax
