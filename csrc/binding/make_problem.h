// Describes a call's tensors to the kernels.
#pragma once

#include <initializer_list>

#include "binding/checks.h"
#include "common/problem.h"

namespace masked_softmax {

// Precondition: the arguments were checked.
Problem make_problem(Operation operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
                     const CallArguments& arguments);

}  // namespace masked_softmax
