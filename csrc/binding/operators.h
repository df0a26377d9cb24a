// The operators' C++ signatures, and calls of them that go through torch's dispatcher.
//
// `packed`: none for rows that are padded to one length. For rows that lie end to end in dimension `dim` it says that
// none is longer than so much (negative: look for the longest), and lengths and starts, one for each of them, say
// where.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace masked_softmax {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalScale = std::optional<double>;
using OptionalType = std::optional<at::ScalarType>;
using OptionalInt = std::optional<int64_t>;

using Forward = at::Tensor(const at::Tensor& input, const at::Tensor& lengths, int64_t dim,
                           const OptionalTensor& starts, OptionalScale scale, OptionalType dtype, bool validate,
                           OptionalInt packed);
using ForwardOut = void(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                        OptionalScale scale, OptionalType dtype, bool validate, at::Tensor& out);
using InPlace = void(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                     OptionalScale scale, bool validate);
using Backward = at::Tensor(const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& lengths,
                            int64_t dim, const OptionalTensor& starts, OptionalScale scale, at::ScalarType input_dtype,
                            OptionalInt packed);
using Jvp = at::Tensor(const at::Tensor& tangent, const at::Tensor& output, const at::Tensor& lengths, int64_t dim,
                       const OptionalTensor& starts, OptionalScale scale, OptionalInt packed);
using SecondOrder = at::Tensor(const at::Tensor& tangent, const at::Tensor& grad_output, const at::Tensor& output,
                               const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                               OptionalScale scale, OptionalInt packed);

// The operators of that last signature.
constexpr const char* kSecondOrderNames[] = {
    "masked_softmax_backward_wrt_output", "masked_log_softmax_backward_wrt_output",
    "masked_softmax_backward_jvp_wrt_output", "masked_log_softmax_jvp_jvp_wrt_output"};

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
  // The derivatives of `backward` with respect to `output`: backward, and along a tangent of it.
  c10::TypedOperatorHandle<SecondOrder> backward_wrt_output;
  c10::TypedOperatorHandle<SecondOrder> backward_jvp_wrt_output;
};

const Operators& softmax_operators();
const Operators& log_softmax_operators();
const c10::TypedOperatorHandle<InPlace>& masked_softmax_in_place();

// softmax's own is its `backward`, whose Jacobian is symmetric.
const c10::TypedOperatorHandle<Jvp>& masked_log_softmax_jvp();
const c10::TypedOperatorHandle<SecondOrder>& masked_log_softmax_jvp_jvp_wrt_output();

}  // namespace masked_softmax
