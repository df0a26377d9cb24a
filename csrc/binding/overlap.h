// Whether strided tensors share elements.
#pragma once

#include <ATen/core/Tensor.h>

namespace masked_softmax {

// Whether two have one in common. Exact, up to a bound on the search that no layout of practice comes near; beyond the
// bound, true.
bool shares_elements(const at::Tensor& a, const at::Tensor& b);

// The same of two elements of one tensor.
bool shares_own_elements(const at::Tensor& tensor);

}  // namespace masked_softmax
