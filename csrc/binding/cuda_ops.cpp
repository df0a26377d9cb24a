// The operators on CUDA tensors: one kernel on the current stream (up to three for very long rows, one more for packed
// rows), no synchronisation. The kernels check bounds; validate=True checks them before the launch. If the caller gives
// no upper bound of packed rows' lengths, finding it synchronises.
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "binding/cuda_ops.h"
#include "binding/device_ops.h"
#include "binding/make_problem.h"
#include "cuda/device_properties.h"
#include "cuda/launch.h"

namespace masked_softmax {
namespace {

std::atomic<cuda::Strategy> forced_strategy{cuda::Strategy::kAutomatic};  // kAutomatic: none is forced
std::atomic<cuda::Strategy> last_strategy{cuda::Strategy::kAutomatic};    // kAutomatic: no call yet

// On copies in host memory.
void check_bounds_on_host(Operation operation, const at::Tensor& output,
                          std::initializer_list<const at::Tensor*> inputs, const CallArguments& arguments) {
  const auto copy_to_host = [&](const OptionalTensor& index) -> OptionalTensor {
    if (!index.has_value()) {
      return std::nullopt;
    }
    check_storage(*index, arguments.name);
    return index->cpu();
  };
  const OptionalTensor lengths = copy_to_host(arguments.lengths);
  const OptionalTensor starts = copy_to_host(arguments.starts);
  const CallArguments on_host{{lengths, arguments.dim, starts, arguments.scale},
                              arguments.name,
                              arguments.packed,
                              /*validate=*/true};
  Problem problem = make_problem(operation, output, inputs, on_host);
  check_bounds(problem, scores_of(operation, output, inputs), on_host);
}

// A misaligned load on a GPU is an error that invalidates the context. torch makes no misaligned tensors, but accepts
// them from other libraries.
void check_alignment(const void* data, ElementType type, const char* what, const char* name) {
  const int64_t bytes = size_bytes(type);
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0, name, "(): expected ", what,
                    " at an address that is a multiple of its elements' size, ", bytes, " bytes, but got ", data,
                    "; clone() makes a tensor at such an address");
}

void check_alignment(const Problem& problem, const char* name) {
  check_alignment(problem.output.data, problem.output.type, "the output", name);
  for (int k = 0; k < problem.input_count; ++k) {
    check_alignment(problem.inputs[k].data, problem.inputs[k].type, "an input", name);
  }
  check_alignment(problem.lengths.data, problem.lengths.type, "lengths", name);
  check_alignment(problem.starts.data, problem.starts.type, "starts", name);
  check_alignment(problem.row_input.data, problem.row_input.type, "sink", name);
}

struct Cuda {
  static at::Tensor empty(const at::Tensor& like, at::ScalarType dtype, const CallArguments& /*arguments*/) {
    return at::empty(like.sizes(), like.options().dtype(dtype));
  }

  static void compute(Operation operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
                      const CallArguments& arguments) {
    if (arguments.validate) {
      check_bounds_on_host(operation, output, inputs, arguments);
    }
    Problem problem = make_problem(operation, output, inputs, arguments);
    if (problem.rows == 0 || problem.cols == 0) {
      return fill_uncovered(operation, output, arguments);
    }
    check_alignment(problem, arguments.name);
    const c10::cuda::CUDAGuard guard(output.device());
    if (arguments.packed.has_value() && arguments.packed_bound() < 0) {
      problem.packing.longest =
          std::clamp<int64_t>(arguments.lengths->to(at::kLong).max().item<int64_t>(), 0, problem.cols);
    }
    if (problem.longest() == 0) {
      return fill_uncovered(operation, output, arguments);
    }
    const cuda::Strategy forced = forced_strategy.load(std::memory_order_relaxed);
    cuda::DeviceProperties device;
    C10_CUDA_CHECK(cuda::get_device_properties(device));
    const cuda::LaunchPlan plan = cuda::plan_problem(problem, device, forced);
    TORCH_CHECK_VALUE(plan.is_valid(), arguments.name, "(): the strategy '", cuda::strategy_name(forced),
                      "' is forced, but it cannot compute rows like these");
    last_strategy.store(plan.strategy, std::memory_order_relaxed);
    at::Tensor workspace;  // stream-ordered: the allocator reuses it only after the kernels
    if (plan.workspace_bytes > 0) {
      workspace = at::empty({plan.workspace_bytes}, output.options().dtype(at::kByte));
    }
    void* const memory = workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
    C10_CUDA_CHECK(
        cuda::launch_problem(problem, plan, memory, c10::cuda::getCurrentCUDAStream(output.device().index())));
  }

 private:
  // Elements that no packed row covers are NaN: all of them, where no row may have any. A launch fills them itself.
  static void fill_uncovered(Operation operation, const at::Tensor& output, const CallArguments& arguments) {
    if (is_reduction(operation)) {
      output.fill_(operation == Operation::kLogSumExp ? -std::numeric_limits<double>::infinity() : 0.0);
      return;
    }
    if (arguments.row_result != nullptr) {
      arguments.row_result->fill_(1);  // the sink is all that an empty row has
    }
    if (arguments.packed.has_value()) {
      output.fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }
};

}  // namespace

void set_cuda_strategy(const std::string& name) {
  std::string known;
  for (cuda::Strategy strategy : cuda::kStrategies) {
    if (name == cuda::strategy_name(strategy)) {
      forced_strategy.store(strategy, std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(cuda::strategy_name(strategy));
  }
  throw std::invalid_argument("expected a strategy out of " + known + ", but got '" + name + "'");
}

const char* last_cuda_strategy() { return cuda::strategy_name(last_strategy.load(std::memory_order_relaxed)); }

TORCH_LIBRARY_IMPL(masked_softmax_ext, CUDA, m) { DeviceOps<Cuda>::register_all(m); }

}  // namespace masked_softmax
