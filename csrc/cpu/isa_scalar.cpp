#include "cpu/prelude.h"

#define MASKED_SOFTMAX_ISA_NAMESPACE scalar
#include "cpu/vec_scalar.h"

#include "cpu/rows.h"
