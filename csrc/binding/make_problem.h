// Describes a call's tensors to the kernels.
#pragma once

#include <initializer_list>

#include "binding/checks.h"
#include "common/problem.h"

namespace masked_softmax {

// A tensor of the call's shape: the output, or where that has one number a row, the first input.
const at::Tensor& scores_of(Operation operation, const at::Tensor& output,
                            std::initializer_list<const at::Tensor*> inputs);

// Precondition: the arguments were checked.
Problem make_problem(Operation operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
                     const CallArguments& arguments);

}  // namespace masked_softmax
