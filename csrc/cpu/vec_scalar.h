// No instruction set beyond the compiler's baseline: vectors of 16 bytes.
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class T, int kCount>
struct Array : VectorDefaults<Array<T, kCount>, T, kCount> {
  using typename VectorDefaults<Array, T, kCount>::vector_t;
  static constexpr bool kLoads16Bit = false;
  // (Zen 5, November 2026: with them, rows of 16 columns took 1.0 to 1.1 times as long, their derivatives 1.4 to 2.0.)
  static constexpr bool kHasShortRowKernels = false;

  Array() = default;
  Array(vector_t value) { this->v = value; }

  static Array fma(Array a, Array b, Array c) {
    if constexpr (std::is_same_v<T, float>) {  // a double holds the product exactly
      typedef double doubles_t __attribute__((vector_size(sizeof(double) * kCount)));
      const doubles_t product = __builtin_convertvector(a.v, doubles_t) * __builtin_convertvector(b.v, doubles_t);
      return __builtin_convertvector(product + __builtin_convertvector(c.v, doubles_t), vector_t);
    } else {
      Array result;
      for (int i = 0; i < kCount; ++i) {
        result.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
      }
      return result;
    }
  }
};

using Float = Array<float, 4>;
using Double = Array<double, 2>;

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
