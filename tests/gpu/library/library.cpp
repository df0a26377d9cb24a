// The CUDA kernels as a small C library, for Python without the extension (../kernel_library.py). It is built for a GPU
// with nvcc, or for the emulator with g++ (../build_kernel_library.py).
#include <string>

#include "call.h"
#include "common/row_dimensions.h"
#include "cuda/launch.h"
#include "device.h"

namespace kernel_library {
namespace {

using namespace masked_softmax;
using kernel_tests::Call;

// The problem that the operators make of the same tensors (binding/make_problem.cpp): row dimensions are merged.
Problem make_problem(const Call& call) { return with_merged_row_dimensions(kernel_tests::problem_of(call)); }

cuda::LaunchPlan make_plan(const Call& call, const Problem& problem) {
  const cuda::Strategy forced = kernel_tests::find(cuda::kStrategies, call.strategy, cuda::strategy_name);
  return cuda::plan_problem(problem, device_properties(), forced);
}

}  // namespace
}  // namespace kernel_library

using namespace kernel_library;

extern "C" {

// Returns the name of the plan's strategy: "automatic" if the forced one cannot compute such rows. Precondition: there
// is at least one row and one column.
const char* masked_softmax_plan(const Call* call, int64_t* workspace_bytes) {
  const cuda::LaunchPlan plan = make_plan(*call, make_problem(*call));
  *workspace_bytes = plan.workspace_bytes;
  return cuda::strategy_name(plan.strategy);
}

// Enqueues the kernels on the stream. Returns what went wrong, or an empty string. Precondition: the plan is valid.
const char* masked_softmax_launch(const Call* call, void* workspace, void* stream) {
  static thread_local std::string error;
  const Problem problem = make_problem(*call);
  const cuda::Status status =
      cuda::launch_problem(problem, make_plan(*call, problem), workspace, static_cast<cuda::Stream>(stream));
  error = error_of_launch(status);
  return error.c_str();
}

}  // extern "C"
