// No instruction set beyond the compiler's baseline: vectors of 16 bytes, which the compiler knows how to compute with
// (vector_size, of GCC and clang).
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class T, int kCount>
struct Array : VectorDefaults<Array<T, kCount>, T, kCount> {
  using bits_t = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using Mask = typename VectorDefaults<Array, T, kCount>::Mask;
  typedef T vector_t __attribute__((vector_size(sizeof(T) * kCount)));
  typedef bits_t bits_vector_t __attribute__((vector_size(sizeof(T) * kCount)));
  static constexpr bool kLoads16Bit = false;
  // (Zen 5, November 2026: with them, rows of 16 columns took 1.0 to 1.1 times as long, their derivatives 1.4 to 2.0.)
  static constexpr bool kHasShortRowKernels = false;
  static constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  vector_t v;

  template <class E>
  static constexpr bool is_loadable =
      std::is_same_v<E, T> ||
      (std::is_same_v<T, float> && (std::is_same_v<E, bfloat16_t> || std::is_same_v<E, float16_t>));

  static Array broadcast(T value) { return {{}, value - vector_t{}}; }

  template <class E, class = std::enable_if_t<is_loadable<E>>>
  static Array load(const E* p) {
    return load(p, Mask{kCount});
  }
  template <class E>
  static Array load(const E* p, Mask mask) {
    Array result{};
    for (int i = 0; i < kCount && i < mask.count; ++i) {
      result.v[i] = Array::element(p + i);
    }
    return result;
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
    Array result = *this;
    for (int i = 0; i < kCount; ++i) {
      result.v[i] = i < mask.count ? v[i] : fill;
    }
    return result;
  }

  Array operator+(const Array& b) const { return {{}, v + b.v}; }
  Array operator-(const Array& b) const { return {{}, v - b.v}; }
  Array operator*(const Array& b) const { return {{}, v * b.v}; }
  static Array fma(const Array& a, const Array& b, const Array& c) {
    if constexpr (std::is_same_v<T, float>) {  // a double holds the product exactly
      typedef double doubles_t __attribute__((vector_size(sizeof(double) * kCount)));
      const doubles_t product = __builtin_convertvector(a.v, doubles_t) * __builtin_convertvector(b.v, doubles_t);
      return {{}, __builtin_convertvector(product + __builtin_convertvector(c.v, doubles_t), vector_t)};
    } else {
      Array result;
      for (int i = 0; i < kCount; ++i) {
        result.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
      }
      return result;
    }
  }
  static Array fms(const Array& a, const Array& b, const Array& c) { return fma(a, b, {{}, -c.v}); }
  static Array max(const Array& a, const Array& b) { return {{}, a.v > b.v ? a.v : b.v}; }
  static Array min(const Array& a, const Array& b) { return {{}, a.v < b.v ? a.v : b.v}; }

  static Array exp2_of(const Array& encoded) { return {{}, (vector_t)((bits_vector_t)encoded.v << kMantissaBits)}; }
  static Array zero_where_less(const Array& n, const Array& least, const Array& value) {
    return {{}, n.v < least.v ? vector_t{} : value.v};
  }
  static Array zero_where_zero(const Array& t, const Array& value) { return {{}, t.v == 0 ? vector_t{} : value.v}; }
  static Array one_where_zero(const Array& t) { return {{}, t.v == 0 ? 1 - vector_t{} : vector_t{}}; }

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
