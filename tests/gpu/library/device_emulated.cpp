#include "device.h"
#include "simt.h"

namespace kernel_library {

using namespace masked_softmax;

cuda::DeviceProperties device_properties() {
  cuda::DeviceProperties properties;
  properties.has_clusters = true;
  properties.sm_count = 132;
  properties.architecture = 90;
  properties.stage_memory_bytes = 228 * 1024;
  return properties;
}

std::string error_of_launch(cuda::Status status) {
  std::string error = simt::error();
  simt::clear_error();
  if (error.empty() && status != cuda::kSuccess) {
    error = "the launch failed: " + std::to_string(status);
  }
  return error;
}

}  // namespace kernel_library
