#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda/device_properties.h"
#include "device.h"

namespace kernel_library {

using namespace masked_softmax;

cuda::DeviceProperties device_properties() {
  cuda::DeviceProperties properties;
  const cuda::Status status = cuda::get_device_properties(properties);
  if (status != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(status));
  }
  return properties;
}

std::string error_of_launch(cuda::Status status) {
  return status == cudaSuccess ? std::string() : cudaGetErrorString(status);
}

}  // namespace kernel_library
