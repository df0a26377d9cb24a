// Whether two strided tensors share an element.
#pragma once

#include <ATen/core/Tensor.h>

namespace masked_softmax {

// Exact, up to a bound on the search that no layout of practice comes near; beyond the bound, true.
bool shares_elements(const at::Tensor& a, const at::Tensor& b);

}  // namespace masked_softmax
