// Whether every row's start and length lie within its columns.
#pragma once

#include "common/problem.h"

namespace masked_softmax {

// The number of the first row whose bounds are invalid, -1 where all are valid. Broadcast bounds are looked at once.
int64_t first_invalid_row(const Problem& problem);

}  // namespace masked_softmax
