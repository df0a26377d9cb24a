// The emulator's csrc/cuda/runtime.h.
#pragma once

namespace masked_softmax {
namespace cuda {

using Stream = void*;
using Status = int;
constexpr Status kSuccess = 0;
constexpr Status kInvalidLaunch = 9;

}  // namespace cuda
}  // namespace masked_softmax
