// The CUDA strategies instead of the CPU's instruction sets, so that the tests in tests/kernel run the CUDA kernels.
// Linked instead of csrc/cpu/dispatch.cpp.
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "common/row_walker.h"
#include "cpu/dispatch.h"
#include "cpu/gather.h"
#include "emulate.h"

namespace masked_softmax {
namespace {

using cuda::Strategy;

// Calls visit() with each of the rows [begin, end) as a separate problem: a launch computes all rows of a problem.
template <class Visitor>
void for_each_row(const Problem& problem, int64_t begin, int64_t end, const Visitor& visit) {
  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run);) {
    for (int64_t i = 0; i < run.rows; ++i) {
      Problem row = problem;
      row.rows = 1;
      row.row_ndim = 0;
      row.packing.count = 0;  // a launch for one row leaves the others alone
      row.output.data = element_at(problem.output.data, problem.output.type, run.output_offset(i));
      for (int k = 0; k < problem.input_count; ++k) {
        row.inputs[k].data = element_at(problem.inputs[k].data, problem.inputs[k].type, run.input_offset(k, i));
      }
      row.lengths.data = row.starts.data = nullptr;
      row.lengths.value = run.raw_length(i);
      row.starts.value = run.raw_start(i);
      CHECK(row.row_input.data == nullptr && row.row_result.data == nullptr, "rows with numbers, one by one");
      visit(row);
    }
  }
}

void launch(const Problem& problem, Strategy forced) {
  static unsigned seed = 0;
  emulator::Emulation done = emulator::emulate(problem, forced, emulator::kWithClusters, ++seed);
  if (done.strategy == Strategy::kAutomatic) {  // it cannot compute such rows
    done = emulator::emulate(problem, Strategy::kAutomatic, emulator::kWithClusters, seed);
  }
  CHECK(done.error.empty(), cuda::strategy_name(done.strategy) << ": " << done.error);
}

template <Strategy kStrategy>
void run(const Problem& problem, int64_t begin, int64_t end) {
  if (problem.rows == 0 || problem.cols == 0 || begin >= end) {
    return;
  }
  if (begin == 0 && end == problem.rows) {
    launch(problem, kStrategy);
  } else {
    for_each_row(problem, begin, end, [](const Problem& row) { launch(row, kStrategy); });
  }
}

bool is_supported() { return true; }

const std::vector<CpuCapability> kCapabilities = {
#define MASKED_SOFTMAX_STRATEGY(Name, name, rows) {#name, run<Strategy::k##Name>, is_supported},
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
    {"automatic", run<Strategy::kAutomatic>, is_supported},
};
const CpuCapability* in_use = &kCapabilities.back();

}  // namespace

const std::vector<CpuCapability>& supported_cpu_capabilities() { return kCapabilities; }
const CpuCapability& cpu_capability() { return *in_use; }
void set_cpu_capability(const std::string& name) {
  for (const CpuCapability& capability : kCapabilities) {
    if (name == capability.name) {
      in_use = &capability;
      return;
    }
  }
  throw std::invalid_argument("no strategy " + name);
}

}  // namespace masked_softmax

namespace kernel_tests {

// Linked last: it counts the launches of all other tests.
TEST("strategies: each was launched, for plain rows and for others where it has kernels of them") {
  using namespace masked_softmax;
  for (cuda::Strategy strategy : cuda::kStrategies) {
    if (strategy == cuda::Strategy::kAutomatic) {
      continue;
    }
    for (bool is_plain : {false, true}) {
      const int count = emulator::launch_count(strategy, is_plain);
      const char* rows = is_plain ? "plain rows" : "any rows";
      const bool has_kernels = is_plain ? strategy != cuda::Strategy::kSplit && strategy != cuda::Strategy::kStrided
                                        : !emulator::takes_plain_rows_only(strategy);
      if (has_kernels) {
        CHECK(count > 0, cuda::strategy_name(strategy) << ", " << rows);
        std::printf("  %s, %s: %d launches\n", cuda::strategy_name(strategy), rows, count);
      } else {
        CHECK(count == 0, cuda::strategy_name(strategy) << " has no kernels of " << rows);
      }
    }
  }
}

}  // namespace kernel_tests
