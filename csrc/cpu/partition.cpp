#include "cpu/partition.h"

#include "common/row_walker.h"

namespace masked_softmax {
namespace {

int64_t row_cost(const Problem& problem, const RowWalker& row) {
  return kRowCost + problem.cols + row.bounds().length() * kValidCost;
}

}  // namespace

int64_t largest_cost(const Problem& problem) { return problem.rows * (kRowCost + problem.cols * (1 + kValidCost)); }

std::vector<int64_t> partition_rows(const Problem& problem, int parts) {
  int64_t total = 0;
  RowWalker counting(problem, 0);
  for (int64_t row = 0; row < problem.rows; ++row, counting.advance(1)) {
    total += row_cost(problem, counting);
  }

  std::vector<int64_t> boundaries{0};
  int64_t before = 0;
  RowWalker walker(problem, 0);
  for (int64_t row = 0; row < problem.rows; ++row, walker.advance(1)) {
    const auto part = static_cast<int64_t>(boundaries.size());
    if (part < parts && before >= total / parts * part) {
      boundaries.push_back(row);
    }
    before += row_cost(problem, walker);
  }
  boundaries.resize(static_cast<size_t>(parts) + 1, problem.rows);
  return boundaries;
}

}  // namespace masked_softmax
