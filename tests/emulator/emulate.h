// Computes a problem with the CUDA kernels, in the emulator.
#pragma once

#include <string>

#include "cuda/launch.h"

namespace emulator {

struct Emulation {
  // What ran; kAutomatic: the forced strategy cannot compute such rows, and nothing did.
  masked_softmax::cuda::Strategy strategy;
  std::string error;  // empty where all went well
};

constexpr masked_softmax::cuda::DeviceProperties kWithClusters{4, true};
constexpr masked_softmax::cuda::DeviceProperties kWithoutClusters{4, false};

// `seed` decides in which order threads run. problem.rows and problem.cols are at least 1.
Emulation emulate(const masked_softmax::Problem& problem, masked_softmax::cuda::Strategy forced,
                  const masked_softmax::cuda::DeviceProperties& device, unsigned seed);

}  // namespace emulator
