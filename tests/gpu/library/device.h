// What differs between a GPU (device_cuda.cpp) and the emulator of tests/emulator (device_emulated.cpp).
#pragma once

#include <string>

#include "cuda/launch.h"

namespace kernel_library {

// Of the current device. The emulated one is an H200.
masked_softmax::cuda::DeviceProperties device_properties();

// What went wrong, given what a launch returned; empty if nothing did.
std::string error_of_launch(masked_softmax::cuda::Status status);

}  // namespace kernel_library
