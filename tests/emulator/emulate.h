// Computes a problem with the CUDA kernels, in the emulator.
#pragma once

#include <string>

#include "cuda/launch.h"

namespace emulator {

struct Emulation {
  masked_softmax::cuda::Strategy strategy;  // kAutomatic: the forced strategy cannot compute such rows
  std::string error;                        // empty: success
};

constexpr masked_softmax::cuda::DeviceProperties kWithClusters{true};
constexpr masked_softmax::cuda::DeviceProperties kWithoutClusters{false};

// `seed` determines the order in which threads run. Precondition: problem.rows and problem.cols are at least 1.
Emulation emulate(const masked_softmax::Problem& problem, masked_softmax::cuda::Strategy forced,
                  const masked_softmax::cuda::DeviceProperties& device, unsigned seed);

}  // namespace emulator
