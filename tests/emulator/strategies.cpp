// The CUDA kernels' strategies in the place of the CPU's instruction sets: whatever tests/kernel promises of one, the
// other must keep. Links instead of csrc/cpu/dispatch.cpp.
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "checker.h"
#include "common/row_walker.h"
#include "cpu/dispatch.h"
#include "cuda/launch.h"
#include "simt.h"

namespace masked_softmax {
namespace {

using cuda::Strategy;

constexpr cuda::DeviceProperties kDevice{4, true};

// Whether the kernels were compiled to announce their accesses: run.sh says so.
constexpr bool kIsChecked = MASKED_SOFTMAX_EMULATOR_IS_CHECKED != 0;

int64_t size_bytes(ElementType type) {
  int64_t size = 0;
  visit_element_type(type, [&](auto element) { size = sizeof(element); });
  return size;
}

const char* at(const void* data, int64_t offset, ElementType type) {
  return static_cast<const char*>(data) + offset * size_bytes(type);
}

void allow_columns(const Operand& operand, int64_t row_offset, int64_t begin, int64_t end, uint8_t permission) {
  for (int64_t col = begin; col < end; ++col) {
    simt::allow(at(operand.data, row_offset + col * operand.col_stride, operand.type),
                static_cast<size_t>(size_bytes(operand.type)), permission);
  }
}

int64_t index_offset(const Problem& problem, const RowIndex& index, int64_t row) {
  int64_t offset = 0;
  for (int dim = problem.row_ndim - 1; dim >= 0; --dim) {
    offset += row % problem.row_sizes[dim] * index.row_strides[dim];
    row /= problem.row_sizes[dim];
  }
  return offset;
}

void allow_index(const Problem& problem, const RowIndex& index, int64_t row) {
  if (index.data != nullptr) {
    simt::allow(at(index.data, index_offset(problem, index, row), index.type),
                static_cast<size_t>(size_bytes(index.type)), simt::kMayRead);
  }
}

// Exactly what a kernel may touch: the valid elements of its inputs, all elements of its output, its bounds. Padding is
// out of bounds.
void allow_problem(const Problem& problem) {
  simt::forget_buffers();
  RowWalker walker(problem, 0, problem.rows);
  int64_t row = 0;
  for (RowRun run; walker.next(run);) {
    for (int64_t ahead = 0; ahead < run.rows; ++ahead, ++row) {
      allow_index(problem, problem.lengths, row);
      allow_index(problem, problem.starts, row);
      allow_columns(problem.output, run.output_offset(ahead), 0, problem.cols, simt::kMayWrite);
      if (bounds_are_valid(run.raw_start(ahead), run.raw_length(ahead), problem.cols)) {
        const RowBounds bounds = run.bounds(ahead);
        for (int k = 0; k < problem.input_count; ++k) {
          allow_columns(problem.inputs[k], run.input_offset(k, ahead), bounds.start, bounds.end, simt::kMayRead);
        }
      }
    }
  }
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
      row.output.data = const_cast<char*>(at(problem.output.data, run.output_offset(ahead), problem.output.type));
      for (int k = 0; k < problem.input_count; ++k) {
        row.inputs[k].data =
            const_cast<char*>(at(problem.inputs[k].data, run.input_offset(k, ahead), problem.inputs[k].type));
      }
      row.lengths.data = row.starts.data = nullptr;
      row.lengths.value = run.raw_length(ahead);
      row.starts.value = run.raw_start(ahead);
      visit(row);
    }
  }
}

uint64_t seed = 1;
int launches[sizeof(cuda::kStrategies) / sizeof(cuda::kStrategies[0])];

void launch_checked(const Problem& problem, Strategy strategy) {
  cuda::LaunchPlan plan = cuda::plan_problem(problem, kDevice, strategy);
  if (plan.strategy == Strategy::kAutomatic) {  // not for rows like these
    return launch_checked(problem, Strategy::kStrided);
  }
  ++launches[static_cast<size_t>(plan.strategy)];
  if (kIsChecked) {
    allow_problem(problem);
  }
  simt::set_order(seed % 3 == 0   ? simt::Order::kRandom
                  : seed % 3 == 1 ? simt::Order::kForwards
                                  : simt::Order::kBackwards,
                  seed);
  ++seed;
  const cuda::Status status = cuda::launch_problem(problem, plan, nullptr);
  CHECK(status == simt::kSuccess && simt::error().empty(), cuda::strategy_name(strategy) << ": " << simt::error());
  simt::clear_error();
  const size_t unwritten = simt::count_unwritten();
  CHECK(!kIsChecked || unwritten == 0, cuda::strategy_name(strategy)
                                           << ": " << unwritten << " bytes of the output were not written");
}

template <Strategy kStrategy>
void run(const Problem& problem, int64_t begin, int64_t end) {
  if (problem.rows == 0 || problem.cols == 0 || begin >= end) {
    return;
  }
  if (begin == 0 && end == problem.rows) {
    launch_checked(problem, kStrategy);
  } else {
    for_each_row(problem, begin, end, [](const Problem& row) { launch_checked(row, kStrategy); });
  }
}

bool is_supported() { return true; }

const std::vector<CpuCapability> kCapabilities = {
    {"strided", run<Strategy::kStrided>, is_supported}, {"column", run<Strategy::kColumn>, is_supported},
    {"lanes", run<Strategy::kLanes>, is_supported},     {"block", run<Strategy::kBlock>, is_supported},
    {"cluster", run<Strategy::kCluster>, is_supported}, {"automatic", run<Strategy::kAutomatic>, is_supported},
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
