// The types of the CUDA runtime that launch.h names.
#pragma once

#include <cuda_runtime_api.h>

namespace masked_softmax::cuda {

using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;
constexpr Status kInvalidLaunch = cudaErrorInvalidConfiguration;

}  // namespace masked_softmax::cuda
