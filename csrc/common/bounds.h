// Checks that every row's start and length lie within its columns.
#pragma once

#include "common/problem.h"

namespace masked_softmax {

// Returns the number of the first row whose bounds are invalid, or -1. Broadcast bounds are checked once.
int64_t first_invalid_row(const Problem& problem);

}  // namespace masked_softmax
