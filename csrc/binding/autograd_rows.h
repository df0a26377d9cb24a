// What autograd.cpp needs of autograd_rows.cpp.
#pragma once

#include "binding/operators.h"

namespace masked_softmax {

// masked_softmax_with_sink_ where the sink or its weight is differentiated, or an argument has a tangent.
void differentiate_sink_in_place(at::Tensor& input, const at::Tensor& sink, const OptionalTensor& sink_weight,
                                 const RowArguments& rows, bool validate);

}  // namespace masked_softmax
