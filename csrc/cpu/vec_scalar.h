// No instruction set beyond the compiler's baseline: small arrays, whose loops the compiler may vectorize.
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// a * b + c, rounded once. A double holds the product of two floats exactly.
inline float fused_multiply_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

template <class T, int kCount>
struct Array : VectorDefaults<Array<T, kCount>, T, kCount> {
  using bits_t = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using Mask = typename VectorDefaults<Array, T, kCount>::Mask;
  static constexpr bool kLoads16Bit = false;
  static constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  T v[kCount];

  template <class E>
  static constexpr bool is_loadable =
      std::is_same_v<E, T> ||
      (std::is_same_v<T, float> && (std::is_same_v<E, bfloat16_t> || std::is_same_v<E, float16_t>));

  template <class F>
  static Array each(const F& lane) {
    Array result;
    for (int i = 0; i < kCount; ++i) {
      result.v[i] = lane(i);
    }
    return result;
  }

  static Array broadcast(T value) {
    return each([&](int) { return value; });
  }

  template <class E, class = std::enable_if_t<is_loadable<E>>>
  static Array load(const E* p) {
    return each([&](int i) { return Array::element(p + i); });
  }
  template <class E>
  static Array load(const E* p, Mask mask) {
    return each([&](int i) { return i < mask.count ? Array::element(p + i) : T{0}; });
  }
  template <class E>
  void store(E* p) const {
    store(p, Mask{kCount});
  }
  template <class E>
  void store(E* p, Mask mask) const {
    for (int i = 0; i < kCount && i < mask.count; ++i) {
      write_element(p + i, from_acc<E>(v[i]));
    }
  }
  Array masked(Mask mask, T fill = 0) const {
    return each([&](int i) { return i < mask.count ? v[i] : fill; });
  }

  Array operator+(const Array& b) const {
    return each([&](int i) { return v[i] + b.v[i]; });
  }
  Array operator-(const Array& b) const {
    return each([&](int i) { return v[i] - b.v[i]; });
  }
  Array operator*(const Array& b) const {
    return each([&](int i) { return v[i] * b.v[i]; });
  }
  static Array fma(const Array& a, const Array& b, const Array& c) {
    return each([&](int i) { return fused_multiply_add(a.v[i], b.v[i], c.v[i]); });
  }
  static Array fms(const Array& a, const Array& b, const Array& c) {
    return each([&](int i) { return fused_multiply_add(a.v[i], b.v[i], -c.v[i]); });
  }
  static Array max(const Array& a, const Array& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Array min(const Array& a, const Array& b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }

  static Array exp2_of(const Array& encoded) {
    return each(
        [&](int i) { return bit_cast<T>(static_cast<bits_t>(bit_cast<bits_t>(encoded.v[i]) << kMantissaBits)); });
  }
  static Array zero_where_less(const Array& n, const Array& least, const Array& value) {
    return each([&](int i) { return n.v[i] < least.v[i] ? T{0} : value.v[i]; });
  }
  static Array zero_where_zero(const Array& t, const Array& value) {
    return each([&](int i) { return t.v[i] == T{0} ? T{0} : value.v[i]; });
  }
  static Array one_where_zero(const Array& t) {
    return each([&](int i) { return t.v[i] == T{0} ? T{1} : T{0}; });
  }

  T reduce_max() const {
    T result = v[0];
    for (int i = 1; i < kCount; ++i) {
      result = v[i] > result ? v[i] : result;
    }
    return result;
  }
};

using Float = Array<float, 4>;
using Double = Array<double, 2>;

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
