#include <cuda_runtime_api.h>

#include "device.h"

namespace kernel_library {

using namespace masked_softmax;

cuda::DeviceProperties device_properties() {
  int device = 0;
  int major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cuda::DeviceProperties properties;
  properties.has_clusters = major >= 9;
  return properties;
}

std::string error_of_launch(cuda::Status status) {
  return status == cudaSuccess ? std::string() : cudaGetErrorString(status);
}

}  // namespace kernel_library
