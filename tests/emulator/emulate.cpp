#include "emulate.h"

#include <cstddef>
#include <vector>

#include "checker.h"
#include "common/row_walker.h"
#include "simt.h"

namespace emulator {
namespace {

using namespace masked_softmax;

// Whether the kernels are compiled to announce their accesses: set by run.sh.
constexpr bool kIsChecked = MASKED_SOFTMAX_EMULATOR_IS_CHECKED != 0;

const char* at(const void* data, int64_t offset, ElementType type) {
  return static_cast<const char*>(data) + offset * static_cast<int64_t>(size_bytes(type));
}

void allow_columns(const Operand& operand, int64_t row_offset, int64_t begin, int64_t end, uint8_t permission) {
  for (int64_t col = begin; col < end; ++col) {
    simt::allow(at(operand.data, row_offset + col * operand.col_stride, operand.type), size_bytes(operand.type),
                permission);
  }
}

// Lengths, starts or a RowInput.
template <class Index>
void allow_index(const Problem& problem, const Index& index, int64_t row) {
  if (index.data != nullptr) {
    int64_t offset = 0;
    for (int dim = problem.row_ndim - 1; dim >= 0; --dim) {
      offset += row % problem.row_sizes[dim] * index.row_strides[dim];
      row /= problem.row_sizes[dim];
    }
    simt::allow(at(index.data, offset, index.type), size_bytes(index.type), simt::kMayRead);
  }
}

// Whether a launch also writes the elements that no packed row covers.
bool fills_gaps(const Problem& problem) { return problem.packing.count > 0; }

// Whether packed rows are valid, and follow one another from the first position to the last. Then no element is filled
// before it is computed.
bool tile_their_buffer(const Problem& problem) {
  int64_t position = 0;
  for (int64_t row = 0; row < problem.packing.count; ++row) {
    const int64_t start = load_index(problem.starts, row * problem.starts.row_strides[0]);
    const int64_t length = load_index(problem.lengths, row * problem.lengths.row_strides[0]);
    if (start != position || !bounds_are_valid(problem, start, length)) {
      return false;
    }
    position += length;
  }
  return position == problem.cols;
}

// Allows a kernel exactly the valid elements of its inputs, all elements of its output, and its lengths and starts.
// Padding of inputs is out of bounds.
void allow_problem(const Problem& problem) {
  constexpr uint8_t kIsWritten = simt::kMayWrite | simt::kMustBeWritten;
  if (fills_gaps(problem)) {
    const uint8_t permission = tile_their_buffer(problem) ? kIsWritten : kIsWritten | simt::kManyWriters;
    simt::allow(problem.output.data,
                static_cast<size_t>(problem.packing.output_elems * size_bytes(problem.output.type)), permission);
  }
  RowWalker walker(problem, 0, problem.rows);
  int64_t row = 0;
  for (RowRun run; walker.next(run);) {
    for (int64_t i = 0; i < run.rows; ++i, ++row) {
      allow_index(problem, problem.lengths, row);
      allow_index(problem, problem.starts, row);
      allow_index(problem, problem.row_input, row);
      if (problem.row_result.data != nullptr) {
        simt::allow(at(problem.row_result.data, row, problem.row_result.type), size_bytes(problem.row_result.type),
                    kIsWritten);
      }
      const RowBounds bounds = run.bounds(i);
      const bool is_valid = bounds_are_valid(problem, run.raw_start(i), run.raw_length(i));
      if (is_reduction(problem.operation)) {
        // its output is row_result
      } else if (!problem.packing.is_packed) {
        allow_columns(problem.output, run.output_offset(i), 0, problem.cols, kIsWritten);
      } else if (is_valid && !fills_gaps(problem)) {  // the columns around it are another row's
        allow_columns(problem.output, run.output_offset(i), bounds.start, bounds.end, kIsWritten);
      }
      if (is_valid) {
        for (int k = 0; k < problem.input_count; ++k) {
          allow_columns(problem.inputs[k], run.input_offset(k, i), bounds.start, bounds.end, simt::kMayRead);
        }
      }
    }
  }
}

int launch_counts[sizeof(cuda::kStrategies) / sizeof(cuda::kStrategies[0])][2];

void set_order(unsigned seed) {
  constexpr simt::Order kOrders[] = {simt::Order::kRandom, simt::Order::kForwards, simt::Order::kBackwards};
  simt::set_order(kOrders[seed % 3], seed);
}

}  // namespace

Emulation emulate(const Problem& problem, cuda::Strategy forced, const cuda::DeviceProperties& device, unsigned seed) {
  const cuda::LaunchPlan plan = cuda::plan_problem(problem, device, forced);
  if (!plan.is_valid()) {
    return {plan.strategy, plan.is_plain, "the strategy cannot compute such rows"};
  }
  const auto workspace_bytes = static_cast<size_t>(plan.workspace_bytes);
  std::vector<std::max_align_t> workspace(workspace_bytes / sizeof(std::max_align_t) + 1);
  simt::forget_buffers();
  if (kIsChecked) {
    allow_problem(problem);
    simt::allow(workspace.data(), workspace_bytes, simt::kMayRead | simt::kMayWrite | simt::kUninitialized);
  }
  set_order(seed);
  ++launch_counts[static_cast<size_t>(plan.strategy)][plan.is_plain ? 1 : 0];
  const cuda::Status status = cuda::launch_problem(problem, plan, workspace.data(), nullptr);
  std::string error = simt::error();
  simt::clear_error();
  if (error.empty() && status != cuda::kSuccess) {
    error = "the launch failed: " + std::to_string(status);
  }
  if (error.empty() && simt::count_unwritten() > 0) {
    error = std::to_string(simt::count_unwritten()) + " bytes of the output were not written";
  }
  const bool may_rewrite = fills_gaps(problem) && !tile_their_buffer(problem);
  if (error.empty() && simt::count_rewritten() > 0 && !may_rewrite) {
    error = std::to_string(simt::count_rewritten()) + " bytes of the output were written again";
  }
  return {plan.strategy, plan.is_plain, error};
}

int launch_count(cuda::Strategy strategy, bool is_plain) {
  return launch_counts[static_cast<size_t>(strategy)][is_plain ? 1 : 0];
}

}  // namespace emulator
