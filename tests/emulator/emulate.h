// Computes a problem with the CUDA kernels, in the emulator.
#pragma once

#include <string>

#include "cuda/launch.h"

namespace emulator {

struct Emulation {
  masked_softmax::cuda::Strategy strategy;  // kAutomatic: the forced strategy cannot compute such rows
  bool is_plain;                            // the kernels of plain rows ran
  std::string error;                        // empty: success
};

// As an H100, but that any grid runs at once.
constexpr masked_softmax::cuda::DeviceProperties kWithClusters{true, 0, 90, 228 * 1024};
constexpr masked_softmax::cuda::DeviceProperties kWithoutClusters{false};

// It computes no other rows: they have no starts, and lengths of int32 or int64.
constexpr bool takes_plain_rows_only(masked_softmax::cuda::Strategy strategy) {
  return strategy == masked_softmax::cuda::Strategy::kStaged;
}

// `seed` determines the order in which threads run. Precondition: problem.rows and problem.cols are at least 1.
Emulation emulate(const masked_softmax::Problem& problem, masked_softmax::cuda::Strategy forced,
                  const masked_softmax::cuda::DeviceProperties& device, unsigned seed);

// The problems that emulate() has computed with a strategy, as plain rows or as others.
int launch_count(masked_softmax::cuda::Strategy strategy, bool is_plain);

}  // namespace emulator
