// The emulator's csrc/cuda/runtime.h.
#pragma once

namespace masked_softmax::cuda {

using Stream = void*;
using Status = int;
constexpr Status kSuccess = 0;
constexpr Status kInvalidLaunch = 9;

inline int emulated_device = 0;  // the current one; tests change it

inline Status current_device(int& device) {
  device = emulated_device;
  return kSuccess;
}
inline Status count_sms(int& count) {
  count = 0;
  return kSuccess;
}
inline Status shared_memory_of_sm(int& bytes) {
  bytes = 228 * 1024;
  return kSuccess;
}

}  // namespace masked_softmax::cuda
