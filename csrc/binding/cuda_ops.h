// For tests and benchmarks: which strategy the CUDA kernels use.
#pragma once

#include <string>

namespace masked_softmax {

// Forces a strategy for all later calls, which raise ValueError where it cannot compute them; "automatic" is the
// plan's own choice. Raises std::invalid_argument for an unknown name.
void set_cuda_strategy(const std::string& name);

// The strategy of the last call.
const char* last_cuda_strategy();

}  // namespace masked_softmax
