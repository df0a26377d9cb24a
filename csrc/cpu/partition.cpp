#include "cpu/partition.h"

#include "common/row_walker.h"

namespace masked_softmax {
namespace {

constexpr int64_t kChunkRows = 64;  // rows whose cost is found at once

// Of `count` rows of the run, from row `first` on. Lengths are not clamped, which would take longer than their sum:
// where another thread changes them after they were checked, the parts become uneven, but still have every row once.
// Unsigned, because such sums may overflow.
uint64_t cost_of(const Problem& problem, const RowRun& run, int64_t first, int64_t count) {
  const uint64_t length = run.raw_total_length(first, count);
  const uint64_t written = problem.packing.is_packed ? length : static_cast<uint64_t>(count * problem.cols);
  return static_cast<uint64_t>(count * kRowCost) + written + length * kValidCost;
}

}  // namespace

int64_t max_total_cost(const Problem& problem) {
  return problem.rows * kRowCost + problem.output_elems() * (1 + kValidCost);
}

std::vector<int64_t> partition_rows(const Problem& problem, int parts) {
  RowRun run;
  uint64_t total = 0;
  for (RowWalker walker(problem, 0, problem.rows); walker.next(run);) {
    total += cost_of(problem, run, 0, run.rows);
  }

  const auto count = static_cast<size_t>(parts);
  const uint64_t share = total / count;
  std::vector<int64_t> boundaries{0};
  uint64_t before = 0;
  for (RowWalker walker(problem, 0, problem.rows); walker.next(run);) {
    for (int64_t i = 0; i < run.rows && boundaries.size() < count;) {
      const uint64_t target = share * boundaries.size();
      // Takes as many rows as stay below the target, or one that reaches it.
      int64_t rows = std::min(kChunkRows, run.rows - i);
      uint64_t after = 0;
      while ((after = before + cost_of(problem, run, i, rows)) >= target && rows > 1) {
        rows /= 2;
      }
      before = after;
      i += rows;
      if (before >= target) {
        boundaries.push_back(run.first_row + i);
      }
    }
  }
  boundaries.resize(count + 1, problem.rows);
  return boundaries;
}

}  // namespace masked_softmax
