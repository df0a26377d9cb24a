// What code without kernels uses of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

namespace masked_softmax::cuda {

using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;
constexpr Status kInvalidLaunch = cudaErrorInvalidConfiguration;

inline Status current_device(int& device) { return cudaGetDevice(&device); }

// Sets an attribute of the current device.
inline Status device_attribute(cudaDeviceAttr attribute, int& value) {
  int device = 0;
  const Status status = current_device(device);
  return status == kSuccess ? cudaDeviceGetAttribute(&value, attribute, device) : status;
}

// Sets the number of SMs of the current device.
inline Status count_sms(int& count) { return device_attribute(cudaDevAttrMultiProcessorCount, count); }

// Sets the shared memory of an SM of the current device, in bytes.
inline Status shared_memory_of_sm(int& bytes) {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, bytes);
}

}  // namespace masked_softmax::cuda
