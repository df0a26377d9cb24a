// What code without kernels uses of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

namespace masked_softmax::cuda {

using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;
constexpr Status kInvalidLaunch = cudaErrorInvalidConfiguration;

inline Status current_device(int& device) { return cudaGetDevice(&device); }

// Sets the number of SMs of the current device.
inline Status count_sms(int& count) {
  int device = 0;
  const Status status = current_device(device);
  return status == kSuccess ? cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) : status;
}

// Sets the shared memory of an SM of the current device, in bytes.
inline Status shared_memory_of_sm(int& bytes) {
  int device = 0;
  const Status status = current_device(device);
  return status == kSuccess ? cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)
                            : status;
}

}  // namespace masked_softmax::cuda
