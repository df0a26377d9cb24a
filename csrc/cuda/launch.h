// Computes a problem on the GPU.
#pragma once

#include "common/problem.h"
#include "cuda/launch_plan.h"

#if defined(__CUDACC__) || defined(MASKED_SOFTMAX_EXT_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace masked_softmax {
namespace cuda {

#if defined(__CUDACC__) || defined(MASKED_SOFTMAX_EXT_WITH_CUDA)
using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;
constexpr Status kInvalidLaunch = cudaErrorInvalidConfiguration;
#else  // the emulator's
using Stream = void*;
using Status = int;
constexpr Status kSuccess = 0;
constexpr Status kInvalidLaunch = 9;
#endif

// The plan that launch_problem() follows; its strategy is kAutomatic where the forced one cannot compute the problem.
LaunchPlan plan_problem(const Problem& problem, const DeviceProperties& device, Strategy forced);

// Enqueues the kernels and returns at once. problem.rows and problem.cols are at least 1; `workspace` is device memory
// of plan.workspace_bytes, aligned to 16.
Status launch_problem(const Problem& problem, const LaunchPlan& plan, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace masked_softmax
