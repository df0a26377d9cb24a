// How results are written.
#pragma once

#include "common/problem.h"

namespace masked_softmax {

// What no cache can hold until it is read goes past them all: a store to a cache first reads the line that it writes
// to, which is a third of a large copy's traffic.
enum class Writing { kToCache, kPastCaches };

// Past the caches where the output is about as large as the last of them; but not where the input's lines, which were
// just read, are the output's own.
Writing writing_of(const Problem& problem);

}  // namespace masked_softmax
