// For tests and benchmarks: which of the CUDA kernels' strategies runs.
#pragma once

#include <string>

namespace masked_softmax {

// All calls from now on take this strategy, or raise where it cannot compute what they ask for; "automatic" is the
// plan's own choice. Raises std::invalid_argument for a name that is none.
void set_cuda_strategy(const std::string& name);

// What the last call took.
const char* last_cuda_strategy();

}  // namespace masked_softmax
