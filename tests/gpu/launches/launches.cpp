// Which kernels csrc/cuda/launch.cu launches for a problem, with which grid and argument. Reads a Call from the
// standard input and writes a Plan to the standard output: see launches.py, whose structures these are.
//
// launch() records instead of launching (cuda/device.cuh), so nothing is computed and no pointer is dereferenced. The
// kernels are compiled for their names only: what they call of the emulator is not linked.
#include "cuda/launch.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"
#include "cuda/kernel_problem.h"

namespace {

using namespace masked_softmax;

constexpr int kDims = 4;
constexpr int kMaxLaunches = 8;
constexpr int kNameBytes = 48;

struct CallOperand {
  void* data;
  char type[kNameBytes];
  int64_t col_stride;
  int64_t row_strides[kDims];
};

struct Call {
  char operation[kNameBytes];
  char strategy[kNameBytes];
  int32_t architecture;  // 90: sm_90
  int32_t sm_count;      // 0: unknown
  int32_t sm_shared_bytes;
  int32_t row_ndim;
  double scale;
  int64_t cols;
  int64_t row_sizes[kDims];
  CallOperand output;
  CallOperand inputs[kMaxInputs];
  CallOperand lengths;  // col_stride is not used
  CallOperand sinks;    // nor here; data is null: none
  CallOperand weights;  // contiguous; only data and type are used
  void* workspace;
};

struct RecordedLaunch {
  char kernel[512];  // mangled
  uint32_t blocks;
  uint32_t threads_per_block;
  uint32_t cluster_size;
  uint32_t shared_bytes;  // dynamic
  uint32_t argument_bytes;
  uint8_t argument[4096];
};

struct Plan {
  char error[256];            // empty: none
  char strategy[kNameBytes];  // "automatic": the forced strategy cannot compute such rows
  int64_t workspace_bytes;
  int32_t launch_count;
  RecordedLaunch launches[kMaxLaunches];
};

Plan* recording = nullptr;

constexpr ElementType kElementTypes[] = {
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) ElementType::k##Name,
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
};

// Returns the entry of `table` with that name.
template <class T, size_t kCount, class NameOf>
T find(const T (&table)[kCount], const std::string& name, const NameOf& name_of) {
  for (T entry : table) {
    if (name == name_of(entry)) {
      return entry;
    }
  }
  throw std::invalid_argument("unknown name: " + name);
}

ElementType type_named(const char* name) { return find(kElementTypes, name, element_type_name); }

Operand operand_of(const CallOperand& from) {
  Operand to;
  to.data = from.data;
  to.type = type_named(from.type);
  to.col_stride = from.col_stride;
  std::memcpy(to.row_strides, from.row_strides, sizeof(from.row_strides));
  return to;
}

Problem problem_of(const Call& call) {
  Problem problem{};
  problem.operation = find(kOperations, "masked_" + std::string(call.operation),
                           [](Operation operation) { return info_of(operation).name; });
  problem.scale = call.scale;
  problem.cols = call.cols;
  problem.rows = 1;
  problem.row_ndim = call.row_ndim;
  for (int dim = 0; dim < call.row_ndim; ++dim) {
    problem.row_sizes[dim] = call.row_sizes[dim];
    problem.rows *= call.row_sizes[dim];
  }
  problem.input_count = input_count(problem.operation);
  problem.output = operand_of(call.output);
  for (int k = 0; k < problem.input_count; ++k) {
    problem.inputs[k] = operand_of(call.inputs[k]);
  }
  problem.lengths.data = call.lengths.data;
  problem.lengths.type = type_named(call.lengths.type);
  std::memcpy(problem.lengths.row_strides, call.lengths.row_strides, sizeof(call.lengths.row_strides));
  if (call.sinks.data != nullptr) {
    problem.row_input.data = call.sinks.data;
    problem.row_input.type = type_named(call.sinks.type);
    std::memcpy(problem.row_input.row_strides, call.sinks.row_strides, sizeof(call.sinks.row_strides));
    problem.row_result = {call.weights.data, type_named(call.weights.type)};
  }
  std::memset(problem.starts.row_strides, 0, sizeof(problem.starts.row_strides));
  return problem;
}

}  // namespace

namespace launches {

void record(const void* kernel, const cuda::LaunchPlan& plan, const void* argument, size_t argument_bytes) {
  if (recording->launch_count == kMaxLaunches || argument_bytes > sizeof(RecordedLaunch::argument)) {
    throw std::length_error("more launches, or a larger argument, than Plan holds");
  }
  RecordedLaunch& launch = recording->launches[recording->launch_count++];
  Dl_info symbol = {};
  if (dladdr(kernel, &symbol) == 0 || symbol.dli_sname == nullptr || symbol.dli_saddr != kernel) {
    throw std::runtime_error("a kernel without a name: it must have external linkage");
  }
  std::strncpy(launch.kernel, symbol.dli_sname, sizeof(launch.kernel) - 1);
  launch.blocks = plan.blocks;
  launch.threads_per_block = plan.threads_per_block;
  launch.cluster_size = plan.cluster_size;
  launch.shared_bytes = plan.shared_bytes;
  launch.argument_bytes = static_cast<uint32_t>(argument_bytes);
  std::memcpy(launch.argument, argument, argument_bytes);
}

}  // namespace launches

namespace {

void plan_launches(const Call& call, Plan& plan) {
  const Problem problem = problem_of(call);
  cuda::DeviceProperties device;
  device.has_clusters = call.architecture >= cuda::kClusterArchitecture;
  device.sm_count = call.sm_count;
  device.architecture = call.architecture;
  device.stage_memory_bytes = call.architecture >= cuda::kBulkCopyArchitecture ? call.sm_shared_bytes : 0;
  const cuda::LaunchPlan chosen =
      cuda::plan_problem(problem, device, find(cuda::kStrategies, call.strategy, cuda::strategy_name));
  std::strncpy(plan.strategy, cuda::strategy_name(chosen.strategy), sizeof(plan.strategy) - 1);
  if (!chosen.is_valid()) {
    return;
  }
  plan.workspace_bytes = chosen.workspace_bytes;
  recording = &plan;
  if (cuda::launch_problem(problem, chosen, call.workspace, nullptr) != cuda::kSuccess) {
    throw std::runtime_error("the launch failed");
  }
}

}  // namespace

int main() {
  static Call call;
  static Plan plan;
  while (std::fread(&call, sizeof(call), 1, stdin) == 1) {
    std::memset(&plan, 0, sizeof(plan));
    try {
      plan_launches(call, plan);
    } catch (const std::exception& error) {
      std::strncpy(plan.error, error.what(), sizeof(plan.error) - 1);
    }
    std::fwrite(&plan, sizeof(plan), 1, stdout);
    std::fflush(stdout);
  }
}
