#include "cpu/prelude.h"

#if defined(__x86_64__)

#if !defined(__clang__)  // GCC 12 warns about its own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define MASKED_SOFTMAX_ISA_NAMESPACE avx512
MASKED_SOFTMAX_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "cpu/vec_avx512.h"

#include "cpu/rows.h"
MASKED_SOFTMAX_END_TARGET

#endif
