// The operators' C++ signatures, and calls of them that go through torch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace masked_softmax {

using Forward = at::Tensor(const at::Tensor& input, const at::Tensor& lengths, int64_t dim,
                           const std::optional<at::Tensor>& starts, std::optional<double> scale,
                           std::optional<at::ScalarType> dtype, bool validate);
using ForwardOut = void(const at::Tensor& input, const at::Tensor& lengths, int64_t dim,
                        const std::optional<at::Tensor>& starts, std::optional<double> scale,
                        std::optional<at::ScalarType> dtype, bool validate, at::Tensor& out);
using InPlace = void(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const std::optional<at::Tensor>& starts,
                     std::optional<double> scale, bool validate);
using Backward = at::Tensor(const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& lengths,
                            int64_t dim, const std::optional<at::Tensor>& starts, std::optional<double> scale,
                            at::ScalarType input_dtype);
using Jvp = at::Tensor(const at::Tensor& tangent, const at::Tensor& output, const at::Tensor& lengths, int64_t dim,
                       const std::optional<at::Tensor>& starts, std::optional<double> scale);
using BackwardWrtOutput = at::Tensor(const at::Tensor& tangent, const at::Tensor& grad_output, const at::Tensor& output,
                                     const at::Tensor& lengths, int64_t dim, const std::optional<at::Tensor>& starts,
                                     std::optional<double> scale);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// One of the two functions, and the handles of its operators, looked up once.
struct Operators {
  const char* name;
  c10::TypedOperatorHandle<Forward> forward;
  c10::TypedOperatorHandle<ForwardOut> forward_out;
  c10::TypedOperatorHandle<Backward> backward;
  c10::TypedOperatorHandle<BackwardWrtOutput> backward_wrt_output;
};

const Operators& softmax_operators();
const Operators& log_softmax_operators();
const c10::TypedOperatorHandle<InPlace>& masked_softmax_in_place();
const c10::TypedOperatorHandle<Jvp>& masked_log_softmax_jvp();

}  // namespace masked_softmax
