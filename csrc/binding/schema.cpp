// Declares every operator of the table of operations, with its overloads: torch.ops.masked_softmax_ext.
#include <torch/library.h>

#include "binding/operators.h"

TORCH_LIBRARY(masked_softmax_ext, m) {
  const auto define = [&](auto op) {
    using Operator = decltype(op);
    m.def((masked_softmax::full_name(op) + Operator::Signature::kSchema).c_str());
  };
  masked_softmax::for_each_functional_operator(define);
  masked_softmax::for_each_writing_operator(define);
}
