// Rows to threads by the work they hold.
#pragma once

#include <cstdint>
#include <vector>

#include "common/problem.h"

namespace masked_softmax {

// A row's cost, in units of one padding element written: its valid elements cost kValidCost each, and every row
// something of its own. (Seen on a Zen 4, float32 in cache: 0.13 ns a valid element, 0.03 ns one of padding, 4 ns a
// row.)
constexpr int64_t kValidCost = 4;
constexpr int64_t kRowCost = 128;

// The cost of all rows, at most; looks at no length.
int64_t largest_cost(const Problem& problem);

// parts + 1 ascending row numbers, the first 0, the last problem.rows: part i is rows [result[i], result[i+1]), and
// all parts cost about the same.
std::vector<int64_t> partition_rows(const Problem& problem, int parts);

}  // namespace masked_softmax
