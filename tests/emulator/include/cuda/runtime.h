// The emulator's csrc/cuda/runtime.h.
#pragma once

namespace masked_softmax::cuda {

using Stream = void*;
using Status = int;
constexpr Status kSuccess = 0;
constexpr Status kInvalidLaunch = 9;

}  // namespace masked_softmax::cuda
