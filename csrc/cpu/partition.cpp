#include "cpu/partition.h"

#include "common/row_walker.h"

namespace masked_softmax {
namespace {

// Calls visit(row, cost) for every row.
template <class Visitor>
void for_each_cost(const Problem& problem, const Visitor& visit) {
  RowWalker walker(problem, 0, problem.rows);
  int64_t row = 0;
  for (RowRun run; walker.next(run);) {
    for (int64_t i = 0; i < run.rows; ++i, ++row) {
      const int64_t length = run.bounds(i).length();
      visit(row, kRowCost + (problem.packing.is_packed ? length : problem.cols) + length * kValidCost);
    }
  }
}

}  // namespace

int64_t max_total_cost(const Problem& problem) {
  return problem.rows * kRowCost + problem.output_elems() * (1 + kValidCost);
}

std::vector<int64_t> partition_rows(const Problem& problem, int parts) {
  int64_t total = 0;
  for_each_cost(problem, [&](int64_t /*row*/, int64_t cost) { total += cost; });

  std::vector<int64_t> boundaries{0};
  int64_t before = 0;
  for_each_cost(problem, [&](int64_t row, int64_t cost) {
    const auto part = static_cast<int64_t>(boundaries.size());
    if (part < parts && before >= total / parts * part) {
      boundaries.push_back(row);
    }
    before += cost;
  });
  boundaries.resize(static_cast<size_t>(parts) + 1, problem.rows);
  return boundaries;
}

}  // namespace masked_softmax
