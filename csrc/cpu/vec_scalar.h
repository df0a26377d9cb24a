// No instruction set beyond the compiler's baseline: small arrays, whose loops the compiler may vectorise.
#pragma once

#include "cpu/prelude.h"

namespace masked_softmax {

// The product is not rounded before the sum. A double holds the product of two floats; for doubles the C library
// knows whether the processor has the instruction.
inline float fused_multiply_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

template <class T, int kCount>
struct ScalarVec {
  using acc_t = T;
  using bits_t = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static constexpr int kLanes = kCount;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kScalesByPowers = false;
  static constexpr int kTogether = 1;
  static constexpr bool kStoresNumbers = false;
  static constexpr bool kMasksCheaply = false;
  static constexpr bool kTransposes = false;
  static constexpr bool kStoresPastCaches = false;
  static void finish_stores() {}
  static constexpr bool kReducesFourRows = false;
  static constexpr int kNarrowVectors = 0;
  static constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  T v[kCount];

  template <class F>
  static ScalarVec each(const F& lane) {
    ScalarVec result;
    for (int i = 0; i < kCount; ++i) {
      result.v[i] = lane(i);
    }
    return result;
  }

  static ScalarVec broadcast(T value) {
    return each([&](int) { return value; });
  }

  template <class E>
  static T element(const E* p) {
    return to_acc<T>(read_element(p));
  }

  template <class E>
  static ScalarVec load(const E* p) {
    return each([&](int i) { return to_acc<T>(read_element(p + i)); });
  }
  template <class E>
  static ScalarVec load_partial(const E* p, int count, T fill) {
    return each([&](int i) { return i < count ? to_acc<T>(read_element(p + i)) : fill; });
  }
  template <class E>
  void store(E* p) const {
    store_partial(p, kCount);
  }
  template <class E>
  void store_partial(E* p, int count) const {
    for (int i = 0; i < count; ++i) {
      write_element(p + i, from_acc<E>(v[i]));
    }
  }

  static ScalarVec add(ScalarVec a, ScalarVec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static ScalarVec sub(ScalarVec a, ScalarVec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static ScalarVec mul(ScalarVec a, ScalarVec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static ScalarVec fma(ScalarVec a, ScalarVec b, ScalarVec c) {
    return each([&](int i) { return fused_multiply_add(a.v[i], b.v[i], c.v[i]); });
  }
  static ScalarVec fms(ScalarVec a, ScalarVec b, ScalarVec c) {
    return each([&](int i) { return fused_multiply_add(a.v[i], b.v[i], -c.v[i]); });
  }
  static ScalarVec max(ScalarVec a, ScalarVec b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static ScalarVec min(ScalarVec a, ScalarVec b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }

  static ScalarVec power(ScalarVec shifted) {
    return each(
        [&](int i) { return bit_cast<T>(static_cast<bits_t>(bit_cast<bits_t>(shifted.v[i]) << kMantissaBits)); });
  }
  static ScalarVec zero_where_less(ScalarVec n, ScalarVec smallest, ScalarVec value) {
    return each([&](int i) { return n.v[i] < smallest.v[i] ? T{0} : value.v[i]; });
  }
  static ScalarVec zero_where_zero(ScalarVec t, ScalarVec value) {
    return each([&](int i) { return t.v[i] == T{0} ? T{0} : value.v[i]; });
  }
  ScalarVec first_lanes(int count) const {
    return each([&](int i) { return i < count ? v[i] : T{0}; });
  }
  static ScalarVec one_where_zero(ScalarVec t) {
    return each([&](int i) { return t.v[i] == T{0} ? T{1} : T{0}; });
  }

  T reduce_add() const { return compensated_sum(v, kCount); }
  T reduce_max() const {
    T result = v[0];
    for (int i = 1; i < kCount; ++i) {
      result = v[i] > result ? v[i] : result;
    }
    return result;
  }
};

}  // namespace masked_softmax
