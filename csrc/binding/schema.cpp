// Every operator, declared in one place, and looked up in one place. What they compute: Operation in common/problem.h.
#include <torch/library.h>

#include <string>

#include "binding/operators.h"

// Operators that write to an argument return nothing: torch functionalises no others. What `packed` means: operators.h.
TORCH_LIBRARY(masked_softmax_ext, m) {
  m.def(
      "masked_softmax(Tensor input, Tensor lengths, int dim=-1, Tensor? starts=None, *, float? scale=None, "
      "ScalarType? dtype=None, bool validate=False, int? packed=None) -> Tensor");
  m.def(
      "masked_softmax.out(Tensor input, Tensor lengths, int dim=-1, Tensor? starts=None, *, float? scale=None, "
      "ScalarType? dtype=None, bool validate=False, Tensor(a!) out) -> ()");
  m.def(
      "masked_softmax_(Tensor(a!) input, Tensor lengths, int dim=-1, Tensor? starts=None, *, float? scale=None, "
      "bool validate=False) -> ()");
  m.def(
      "masked_log_softmax(Tensor input, Tensor lengths, int dim=-1, Tensor? starts=None, *, float? scale=None, "
      "ScalarType? dtype=None, bool validate=False, int? packed=None) -> Tensor");
  m.def(
      "masked_log_softmax.out(Tensor input, Tensor lengths, int dim=-1, Tensor? starts=None, *, float? scale=None, "
      "ScalarType? dtype=None, bool validate=False, Tensor(a!) out) -> ()");

  // Derivatives. `output` is the saved result of the forward pass; starts, scale and packed are those of its call.
  m.def(
      "masked_softmax_backward(Tensor grad_output, Tensor output, Tensor lengths, int dim, Tensor? starts, "
      "float? scale, ScalarType input_dtype, int? packed=None) -> Tensor");
  m.def(
      "masked_log_softmax_backward(Tensor grad_output, Tensor output, Tensor lengths, int dim, Tensor? starts, "
      "float? scale, ScalarType input_dtype, int? packed=None) -> Tensor");
  m.def(
      "masked_log_softmax_jvp(Tensor tangent, Tensor output, Tensor lengths, int dim, Tensor? starts, float? scale, "
      "int? packed=None) -> Tensor");

  // Second derivatives: of the backward operators with respect to `output`, given the gradient of their result or the
  // tangent of `output`, and the same of the jvp.
  for (const char* name : masked_softmax::kSecondOrderNames) {
    const std::string schema = std::string(name) +
                               "(Tensor tangent, Tensor grad_output, Tensor output, Tensor lengths, int dim, "
                               "Tensor? starts, float? scale, int? packed=None) -> Tensor";
    m.def(schema.c_str());
  }
}

namespace masked_softmax {

const Operators& softmax_operators() {
  static const Operators operators{
      "masked_softmax",
      find_operator<Forward>("masked_softmax_ext::masked_softmax"),
      find_operator<ForwardOut>("masked_softmax_ext::masked_softmax", "out"),
      find_operator<Backward>("masked_softmax_ext::masked_softmax_backward"),
      find_operator<SecondOrder>("masked_softmax_ext::masked_softmax_backward_wrt_output"),
      find_operator<SecondOrder>("masked_softmax_ext::masked_softmax_backward_jvp_wrt_output"),
  };
  return operators;
}

const Operators& log_softmax_operators() {
  static const Operators operators{
      "masked_log_softmax",
      find_operator<Forward>("masked_softmax_ext::masked_log_softmax"),
      find_operator<ForwardOut>("masked_softmax_ext::masked_log_softmax", "out"),
      find_operator<Backward>("masked_softmax_ext::masked_log_softmax_backward"),
      find_operator<SecondOrder>("masked_softmax_ext::masked_log_softmax_backward_wrt_output"),
      find_operator<SecondOrder>("masked_softmax_ext::masked_log_softmax_backward_wrt_output"),  // it is diagonal
  };
  return operators;
}

const c10::TypedOperatorHandle<InPlace>& masked_softmax_in_place() {
  static const auto handle = find_operator<InPlace>("masked_softmax_ext::masked_softmax_");
  return handle;
}

const c10::TypedOperatorHandle<Jvp>& masked_log_softmax_jvp() {
  static const auto handle = find_operator<Jvp>("masked_softmax_ext::masked_log_softmax_jvp");
  return handle;
}

const c10::TypedOperatorHandle<SecondOrder>& masked_log_softmax_jvp_jvp_wrt_output() {
  static const auto handle = find_operator<SecondOrder>("masked_softmax_ext::masked_log_softmax_jvp_jvp_wrt_output");
  return handle;
}

}  // namespace masked_softmax
