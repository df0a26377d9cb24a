// What every instruction set's file includes before it turns that instruction set on.
//
// isa_avx2.cpp and isa_avx512.cpp compile everything behind a target pragma for their processor. An inline function
// that is not bound to a vector type must not be compiled there: the linker keeps one copy of it for the whole
// library, and that copy must run on every processor. So all such functions come in here, ahead of the pragma; what
// comes after it is a template over a vector type (or a member of one), whose name no other file shares.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/numeric.h"
#include "common/problem.h"
#include "common/row_walker.h"
#include "cpu/staging.h"

#define MASKED_SOFTMAX_INLINE inline __attribute__((always_inline))
#define MASKED_SOFTMAX_NOINLINE __attribute__((noinline))
#define MASKED_SOFTMAX_LAMBDA_INLINE __attribute__((always_inline))
