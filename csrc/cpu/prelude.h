// What every instruction set's file includes before it turns that instruction set on.
//
// isa_avx2.cpp and isa_avx512.cpp compile everything behind a target pragma for their processor. An inline function
// that is not bound to a vector type must not be compiled there: the linker keeps one copy of it for the whole
// library, and that copy must run on every processor. So all such functions come in here, ahead of the pragma; what
// comes after it is a template over a vector type (or a member of one), whose name no other file shares.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/exponential.h"
#include "common/numeric.h"
#include "common/problem.h"
#include "common/row_walker.h"
#include "cpu/staging.h"
#include "cpu/writing.h"

namespace masked_softmax {

// The lanes of one vector, added so that no rounding error is lost but the last: floats in double, doubles with their
// errors kept (Neumaier, ZAMM 54, 1974). NaN where the plain sum is.
inline float compensated_sum(const float* lanes, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) {
    sum += static_cast<double>(lanes[i]);
  }
  return static_cast<float>(sum);
}

inline double compensated_sum(const double* lanes, int count) {
  double sum = lanes[0];
  double lost = 0;
  for (int i = 1; i < count; ++i) {
    const double next = sum + lanes[i];
    lost += std::fabs(sum) >= std::fabs(lanes[i]) ? (sum - next) + lanes[i] : (lanes[i] - next) + sum;
    sum = next;
  }
  return sum + lost;
}

// A bfloat16 to be written that is not NaN: rounding need not look for one, which is two operations of nine.
struct bfloat16_number_t {
  uint16_t bits;
};

// The value, of which the compiler knows nothing: it makes a call of memset out of a loop that stores a few known
// zeros.
template <class T>
inline T hidden(T value) {
  asm("" : "+m"(value));
  return value;
}

}  // namespace masked_softmax

#define MASKED_SOFTMAX_INLINE inline __attribute__((always_inline))
#define MASKED_SOFTMAX_NOINLINE __attribute__((noinline))
#define MASKED_SOFTMAX_LAMBDA_INLINE __attribute__((always_inline))
#define MASKED_SOFTMAX_UNROLL _Pragma("GCC unroll 16")
