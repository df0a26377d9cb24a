// What every isa_*.cpp includes before it enables its instruction set.
//
// isa_avx2.cpp and isa_avx512.cpp compile the kernels under a target pragma, each in its namespace. Everything
// else must be included here, before the pragma: the linker keeps one copy of an inline function of the standard
// library, of common/ or of this file, and that copy has to run on every processor. The exception is common/formulas.h,
// whose templates take the vector types and belong behind the pragma.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/exponential.h"
#include "common/inline.h"
#include "common/numeric.h"
#include "common/problem.h"
#include "common/row_walker.h"
#include "cpu/gather.h"
#include "cpu/sink.h"
#include "cpu/store_hint.h"

namespace masked_softmax {

// The sum of one vector's lanes with a single rounding: floats are added in double, doubles with their rounding errors
// kept (Neumaier, ZAMM 54, 1974). NaN where the plain sum is NaN.
inline float compensated_sum(const float* lanes, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) {
    sum += static_cast<double>(lanes[i]);
  }
  return static_cast<float>(sum);
}

inline double compensated_sum(const double* lanes, int count) {
  double sum = lanes[0];
  double error = 0;
  for (int i = 1; i < count; ++i) {
    const double next = sum + lanes[i];
    error += std::fabs(sum) >= std::fabs(lanes[i]) ? (sum - next) + lanes[i] : (lanes[i] - next) + sum;
    sum = next;
  }
  return sum + error;
}

// Hides a value from the optimizer, which would otherwise replace a loop that stores a few zeros by a call of memset.
template <class T>
inline T optimization_barrier(T value) {
  asm("" : "+m"(value));
  return value;
}

}  // namespace masked_softmax

// Functions between the two are compiled for an instruction set, given as features of the compiler's target attribute.
#define MASKED_SOFTMAX_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define MASKED_SOFTMAX_BEGIN_TARGET(features) \
  MASKED_SOFTMAX_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MASKED_SOFTMAX_END_TARGET _Pragma("clang attribute pop")
#else
#define MASKED_SOFTMAX_BEGIN_TARGET(features) _Pragma("GCC push_options") MASKED_SOFTMAX_PRAGMA(GCC target(features))
#define MASKED_SOFTMAX_END_TARGET _Pragma("GCC pop_options")
#endif

#define MASKED_SOFTMAX_LAMBDA_INLINE __attribute__((always_inline))
#define MASKED_SOFTMAX_UNROLL _Pragma("GCC unroll 16")
#define MASKED_SOFTMAX_UNROLL_2 _Pragma("GCC unroll 2")
