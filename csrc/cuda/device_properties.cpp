#include "cuda/device_properties.h"

#include <map>
#include <mutex>

namespace masked_softmax::cuda {

// Defined in held_rows.cuh.
template <bool kForward, class input_t, class output_t>
Status query_clusters(ClusterSupport& support);

namespace {

std::mutex mutex;
std::map<int, DeviceProperties> known;  // by device

}  // namespace

Status get_device_properties(DeviceProperties& properties) {
  int device = 0;
  Status status = current_device(device);
  if (status != kSuccess) {
    return status;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    properties = found->second;
    return kSuccess;
  }
  // All pairs' kernels are compiled for the same architectures, with the same launch bounds.
  ClusterSupport support;
  status = query_clusters<true, float, float>(support);
  if (status == kSuccess) {
    status = count_sms(properties.sm_count);
  }
  int shared_bytes = 0;
  if (status == kSuccess) {
    status = shared_memory_of_sm(shared_bytes);
  }
  if (status == kSuccess) {  // an error may be a passing one
    properties.has_clusters = has_clusters(support);
    properties.architecture = support.binary_version;
    properties.stage_memory_bytes = has_bulk_copies(support) ? shared_bytes : 0;
    known.emplace(device, properties);
  }
  return status;
}

}  // namespace masked_softmax::cuda
