// The CUDA kernels' strategies in the place of the CPU's instruction sets: whatever tests/kernel promises of one, the
// other must keep. Links instead of csrc/cpu/dispatch.cpp.
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "common/row_walker.h"
#include "cpu/dispatch.h"
#include "emulate.h"

namespace masked_softmax {
namespace {

using cuda::Strategy;

template <class T>
T* moved(T* data, int64_t offset, ElementType type) {
  visit_element_type(
      type, [&](auto element) { data = static_cast<char*>(data) + offset * static_cast<int64_t>(sizeof(element)); });
  return data;
}

// The rows [begin, end) of a problem as a problem of their own, one by one: a launch computes all of its rows.
template <class Visitor>
void for_each_row(const Problem& problem, int64_t begin, int64_t end, const Visitor& visit) {
  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run);) {
    for (int64_t ahead = 0; ahead < run.rows; ++ahead) {
      Problem row = problem;
      row.rows = 1;
      row.row_ndim = 0;
      row.output.data = moved(problem.output.data, run.output_offset(ahead), problem.output.type);
      for (int k = 0; k < problem.input_count; ++k) {
        row.inputs[k].data = moved(problem.inputs[k].data, run.input_offset(k, ahead), problem.inputs[k].type);
      }
      row.lengths.data = row.starts.data = nullptr;
      row.lengths.value = run.raw_length(ahead);
      row.starts.value = run.raw_start(ahead);
      visit(row);
    }
  }
}

int launches[sizeof(cuda::kStrategies) / sizeof(cuda::kStrategies[0])];

void launch(const Problem& problem, Strategy forced) {
  static unsigned seed = 0;
  emulator::Emulation done = emulator::emulate(problem, forced, emulator::kWithClusters, ++seed);
  if (done.strategy == Strategy::kAutomatic) {  // not for rows like these
    done = emulator::emulate(problem, Strategy::kAutomatic, emulator::kWithClusters, seed);
  }
  ++launches[static_cast<size_t>(done.strategy)];
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
    {"lanes", run<Strategy::kLanes>, is_supported},         {"block", run<Strategy::kBlock>, is_supported},
    {"cluster", run<Strategy::kCluster>, is_supported},     {"split", run<Strategy::kSplit>, is_supported},
    {"column", run<Strategy::kColumn>, is_supported},       {"strided", run<Strategy::kStrided>, is_supported},
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

// Comes last: it counts what the other tests have run.
TEST("strategies: each was launched") {
  using namespace masked_softmax;
  for (cuda::Strategy strategy : cuda::kStrategies) {
    const int count = launches[static_cast<size_t>(strategy)];
    if (strategy != cuda::Strategy::kAutomatic) {
      CHECK(count > 0, cuda::strategy_name(strategy));
      std::printf("  %s: %d launches\n", cuda::strategy_name(strategy), count);
    }
  }
}

}  // namespace kernel_tests
