// What a launch plan must know of a device, from what the CUDA runtime reports of it.
#pragma once

#include "cuda/launch_plan.h"
#include "cuda/runtime.h"

namespace masked_softmax::cuda {

// What the runtime reports of a cluster kernel on a device. Versions are 10 * major + minor, as in sm_90.
struct ClusterSupport {
  bool device_has_clusters = false;  // cudaDevAttrClusterLaunch
  // The architecture of the machine code that the device runs. If the driver has compiled it from PTX, it is the
  // device's own.
  int binary_version = 0;
  // The architecture that nvcc compiled for: __CUDA_ARCH__ was 10 times this. Below kClusterArchitecture the kernel has
  // no body, also if the device has clusters and the driver has compiled the PTX for it.
  int ptx_version = 0;
  int max_active_clusters = 0;  // of largest_cluster_plan(), at a time
};

constexpr int kClusterArchitecture = 90;
constexpr int kBulkCopyArchitecture = 90;

constexpr bool has_clusters(const ClusterSupport& support) {
  return support.device_has_clusters && support.binary_version >= kClusterArchitecture &&
         support.ptx_version >= kClusterArchitecture && support.max_active_clusters > 0;
}

constexpr bool has_bulk_copies(const ClusterSupport& support) {
  return support.binary_version >= kBulkCopyArchitecture && support.ptx_version >= kBulkCopyArchitecture;
}

// One cluster of the largest size. A device with few SMs, such as a slice of a partitioned GPU (MIG), may
// be too small for it.
constexpr LaunchPlan largest_cluster_plan() {
  RowShape shape;
  shape.rows = 1;
  shape.cols = int64_t{kMaxClusterBlocks} * kMaxBlockThreads * kMaxThreadElems;
  shape.can_be_held = true;
  return plan_launch(shape, DeviceProperties{/*has_clusters=*/true}, Strategy::kCluster);
}

// The properties of the current device. The runtime is asked once for each device; that neither synchronizes nor
// allocates device memory. Any thread may call.
Status get_device_properties(DeviceProperties& properties);

}  // namespace masked_softmax::cuda
