#include "cpu/prelude.h"

#if defined(__aarch64__)

#define MASKED_SOFTMAX_ISA_NAMESPACE neon
#include "cpu/vec_neon.h"

#include "cpu/rows.h"

#endif
