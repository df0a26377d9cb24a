// csrc/cuda/device.cuh for launches.cpp: the emulator's, but launch() records what it would launch. Found first on the
// include path.
#pragma once

#define launch emulated_launch
#include "../../../emulator/include/cuda/device.cuh"
#undef launch

namespace launches {

// The kernel's address names it; the argument is what the kernel takes by value.
void record(const void* kernel, const masked_softmax::cuda::LaunchPlan& plan, const void* argument,
            size_t argument_bytes);

}  // namespace launches

namespace masked_softmax::cuda {

template <class Argument>
Status launch(void (*kernel)(Argument), const LaunchPlan& plan, Stream /*stream*/, const Argument& argument) {
  launches::record(reinterpret_cast<const void*>(kernel), plan, &argument, sizeof(Argument));
  return kSuccess;
}

}  // namespace masked_softmax::cuda
