// How results are written.
#pragma once

#include <optional>

#include "common/problem.h"

namespace masked_softmax {

// What no cache can hold until it is read goes past them all: a store to a cache first reads the line that it writes
// to, which is a third of a large copy's traffic.
enum class Writing { kToCache, kPastCaches };

// Past the caches where inputs and output together are about as large as the last of them, so that the output's first
// lines would be gone before its last are written; but not where the input's lines, which were just read, are the
// output's own. Narrow rows (narrow_rows.h) go to the caches whatever this says. (Zen 4, backward, 4096 x 512 floats,
// November 2026: 210 ns a row to the cache, 120 past it.)
Writing writing_of(const Problem& problem);

// For tests: the answer from now on, whatever the problem; without one, writing_of()'s own.
void force_writing(std::optional<Writing> writing);

}  // namespace masked_softmax
