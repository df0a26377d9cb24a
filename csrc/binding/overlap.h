// Whether strided tensors share elements.
#pragma once

#include <ATen/core/Tensor.h>

namespace masked_softmax {

// Whether a and b have a byte in common. Exact, up to a limit on the search that practical layouts never reach; beyond
// the limit, true.
bool shares_elements(const at::Tensor& a, const at::Tensor& b);

// Whether two elements of one tensor lie at the same address. Same limit.
bool shares_own_elements(const at::Tensor& tensor);

}  // namespace masked_softmax
