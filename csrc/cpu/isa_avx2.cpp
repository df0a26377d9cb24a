#include "cpu/prelude.h"

#if defined(__x86_64__)

#define MASKED_SOFTMAX_ISA_NAMESPACE avx2
MASKED_SOFTMAX_BEGIN_TARGET("avx2,fma,f16c")
#include "cpu/vec_avx2.h"

#include "cpu/rows.h"
MASKED_SOFTMAX_END_TARGET

#endif
