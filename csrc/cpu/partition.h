// The partition of rows among threads, by the work they take.
#pragma once

#include <cstdint>
#include <vector>

#include "common/problem.h"

namespace masked_softmax {

// A row's cost, in units of writing one element of padding: kRowCost, 1 for each column, and kValidCost more for each
// valid one. (Zen 4, float32 in cache: 0.13 ns for a valid element, 0.03 ns for one of padding, 4 ns for a row.)
constexpr int64_t kValidCost = 4;
constexpr int64_t kRowCost = 128;

// Upper bound of the cost of all rows together. Reads no lengths.
int64_t max_total_cost(const Problem& problem);

// Returns parts + 1 ascending row numbers from 0 to problem.rows. Part i is rows [result[i], result[i + 1]), and all
// parts cost about the same.
std::vector<int64_t> partition_rows(const Problem& problem, int parts);

}  // namespace masked_softmax
