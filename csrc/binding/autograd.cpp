// Derivatives, backward and forward: of the two functions, and of their own derivatives, so that all second derivatives
// exist in every mode. Third ones do not.
//
// A function's node saves its output and the lengths (and starts, where given), nothing else. Writes are counted below
// (in_place.cpp).
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "binding/operators.h"
#include "binding/rows_node.h"

namespace masked_softmax {
namespace {

using torch::autograd::variable_list;

const Operators& operators_of(bool is_log) { return is_log ? log_softmax_operators() : softmax_operators(); }

at::Tensor call_backward(const Rows& rows, const at::Tensor& g, const at::Tensor& y, at::ScalarType input_dtype) {
  return operators_of(rows.is_log)
      .backward.call(g, y, rows.lengths, rows.dim, rows.starts, rows.scale, input_dtype, rows.packed);
}

// Of the function's output y along a tangent of its input; it has y's type.
at::Tensor call_jvp(const Rows& rows, const at::Tensor& tangent, const at::Tensor& y) {
  if (!rows.is_log) {
    return call_backward(rows, tangent, y, y.scalar_type());
  }
  return masked_log_softmax_jvp().call(tangent, y, rows.lengths, rows.dim, rows.starts, rows.scale, rows.packed);
}

at::Tensor call_second_order(const c10::TypedOperatorHandle<SecondOrder>& of, const Rows& rows,
                             const at::Tensor& tangent, const at::Tensor& g, const at::Tensor& y) {
  return of.call(tangent, g, y, rows.lengths, rows.dim, rows.starts, rows.scale, rows.packed);
}

at::Tensor call_backward_wrt_output(const Rows& rows, const at::Tensor& grad, const at::Tensor& g,
                                    const at::Tensor& y) {
  return call_second_order(operators_of(rows.is_log).backward_wrt_output, rows, grad, g, y);
}

// saved: the output.
variable_list forward_gradients(const Rows& rows, at::ScalarType input_dtype, const at::Tensor& grad,
                                const variable_list& saved, const std::vector<bool>& /*is_needed*/) {
  return {call_backward(rows, grad, saved[0], input_dtype)};
}

// Of the backward operators. saved: grad_output, output.
variable_list backward_gradients(const Rows& rows, at::ScalarType /*input_dtype*/, const at::Tensor& grad,
                                 const variable_list& saved, const std::vector<bool>& is_needed) {
  const at::Tensor& g = saved[0];
  const at::Tensor& y = saved[1];
  variable_list result(2);
  if (is_needed[0]) {
    result[0] = rows.is_log ? call_jvp(rows, grad, y) : call_backward(rows, grad, y, g.scalar_type());
  }
  if (is_needed[1]) {
    result[1] = call_backward_wrt_output(rows, grad, g, y);
  }
  return result;
}

// Of log_softmax's jvp. saved: tangent, output.
variable_list jvp_gradients(const Rows& rows, at::ScalarType /*input_dtype*/, const at::Tensor& grad,
                            const variable_list& saved, const std::vector<bool>& is_needed) {
  const at::Tensor& tangent = saved[0];
  const at::Tensor& y = saved[1];
  variable_list result(2);
  if (is_needed[0]) {
    result[0] = call_backward(rows, grad, y, tangent.scalar_type());
  }
  if (is_needed[1]) {
    result[1] = call_backward_wrt_output(rows, tangent, grad, y);
  }
  return result;
}

constexpr Formula kForward[] = {{"MaskedSoftmaxExtBackward", 1, forward_gradients},
                                {"MaskedLogSoftmaxExtBackward", 1, forward_gradients}};
constexpr Formula kBackward[] = {{"MaskedSoftmaxExtBackwardBackward", 2, backward_gradients},
                                 {"MaskedLogSoftmaxExtBackwardBackward", 2, backward_gradients}};
constexpr Formula kLogSoftmaxJvp = {"MaskedLogSoftmaxExtJvpBackward", 2, jvp_gradients};

// The result of an operator that takes two tensors, and its node.
void set_history(const at::Tensor& result, const Formula& formula, const Rows& rows, const at::Tensor& first,
                 const at::Tensor& second) {
  RowsNode::Pointer owner;
  if (RowsNode* node = node_for(formula, rows, result.scalar_type(), {&first, &second}, owner)) {
    node->save(first);
    node->save(second);
    torch::autograd::set_history(result, owner);
  }
}

at::Tensor tangent_of(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0); }

bool has_tangent(const at::Tensor& tensor) { return tangent_of(tensor).defined(); }

// Without its tangent.
at::Tensor primal_of(const at::Tensor& tensor) { return has_tangent(tensor) ? tensor._fw_primal(/*level=*/0) : tensor; }

void set_tangent(const at::Tensor& tensor, const at::Tensor& tangent, bool is_in_place) {
  tensor._set_fw_grad(tangent, /*level=*/0, is_in_place);
}

// The tangent of an operator that takes two tensors: what along_first(tangent, second) and along_second(tangent, first)
// make of those that have one.
template <class AlongFirst, class AlongSecond>
void set_tangent_of(const at::Tensor& result, const at::Tensor& first, const at::Tensor& second,
                    const AlongFirst& along_first, const AlongSecond& along_second) {
  at::Tensor tangent;
  if (has_tangent(first)) {
    tangent = along_first(tangent_of(first), primal_of(second));
  }
  if (has_tangent(second)) {
    const at::Tensor other = along_second(tangent_of(second), primal_of(first));
    tangent = tangent.defined() ? tangent.add(other) : other;
  }
  if (tangent.defined()) {
    set_tangent(result, tangent.to(result.scalar_type()), /*is_in_place=*/false);
  }
}

template <bool kIsLog>
at::Tensor forward(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                   OptionalScale scale, OptionalType dtype, bool validate, OptionalInt packed) {
  at::Tensor output;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = operators_of(kIsLog).forward.call(input, lengths, dim, starts, scale, dtype, validate, packed);
  }
  const Rows rows{{kIsLog, dim, scale, packed}, lengths, starts};
  RowsNode::Pointer owner;
  RowsNode* const node = node_for(kForward[kIsLog], rows, input.scalar_type(), {&input}, owner);
  if (node != nullptr) {
    torch::autograd::set_history(output, owner);
  }
  if (has_tangent(input)) {
    set_tangent(output, call_jvp(rows, tangent_of(input), output), /*is_in_place=*/false);
  }
  if (node != nullptr) {
    node->save_output(output, /*is_in_place=*/false);
  }
  return output;
}

template <bool kIsLog>
at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& lengths, int64_t dim,
                    const OptionalTensor& starts, OptionalScale scale, at::ScalarType input_dtype, OptionalInt packed) {
  const Rows rows{{kIsLog, dim, scale, packed}, lengths, starts};
  at::Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = call_backward(rows, grad_output, output, input_dtype);
  }
  set_history(result, kBackward[kIsLog], rows, grad_output, output);
  set_tangent_of(
      result, grad_output, output,
      [&](const at::Tensor& tangent, const at::Tensor& y) { return call_backward(rows, tangent, y, input_dtype); },
      [&](const at::Tensor& tangent, const at::Tensor& g) {
        return call_second_order(operators_of(kIsLog).backward_jvp_wrt_output, rows, tangent, g, primal_of(output));
      });
  return result;
}

at::Tensor log_softmax_jvp(const at::Tensor& tangent, const at::Tensor& output, const at::Tensor& lengths, int64_t dim,
                           const OptionalTensor& starts, OptionalScale scale, OptionalInt packed) {
  const Rows rows{{/*is_log=*/true, dim, scale, packed}, lengths, starts};
  at::Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = call_jvp(rows, tangent, output);
  }
  set_history(result, kLogSoftmaxJvp, rows, tangent, output);
  set_tangent_of(
      result, tangent, output, [&](const at::Tensor& along, const at::Tensor& y) { return call_jvp(rows, along, y); },
      [&](const at::Tensor& along, const at::Tensor& u) {
        return call_second_order(masked_log_softmax_jvp_jvp_wrt_output(), rows, along, u, primal_of(output));
      });
  return result;
}

template <bool kIsLog>
void forward_out(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                 OptionalScale scale, OptionalType dtype, bool validate, at::Tensor& out) {
  const Operators& operators = operators_of(kIsLog);
  TORCH_CHECK(!torch::autograd::compute_requires_grad(input, out), operators.name,
              "(): functions with out=... arguments don't support automatic differentiation, but one of the arguments "
              "requires grad.");
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(input) && !has_tangent(out), operators.name,
                              "(): functions with out=... arguments don't support forward-mode differentiation, but "
                              "one of the arguments has a tangent.");
  at::AutoDispatchBelowAutograd below_autograd;
  operators.forward_out.call(input, lengths, dim, starts, scale, dtype, validate, out);
}

void softmax_in_place(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                      OptionalScale scale, bool validate) {
  torch::autograd::check_inplace(input, torch::autograd::compute_requires_grad(input));
  const Rows rows{{/*is_log=*/false, dim, scale, std::nullopt}, lengths, starts};
  RowsNode::Pointer owner;
  // Before anything is written: lengths may be what cannot be saved.
  RowsNode* const node = node_for(kForward[0], rows, input.scalar_type(), {&input}, owner);
  at::Tensor tangent;
  if (has_tangent(input)) {
    // Before anything is written as well: it takes memory that there may not be.
    const at::Tensor primal = primal_of(input);
    const at::Tensor y = softmax_operators().forward.call(primal, lengths, dim, starts, scale, primal.scalar_type(),
                                                          validate, std::nullopt);
    tangent = call_jvp(rows, tangent_of(input), y);
  }
  {
    at::AutoDispatchBelowAutograd below_autograd;
    masked_softmax_in_place().call(input, lengths, dim, starts, scale, validate);
  }
  if (node != nullptr) {
    torch::autograd::rebase_history(input, owner);
  }
  if (tangent.defined()) {
    // Into the tangent's own memory: a view of input, or what input is a view of, may have a view of it.
    set_tangent(input, tangent_of(input).copy_(tangent), /*is_in_place=*/true);
  }
  if (node != nullptr) {
    node->save_output(input, /*is_in_place=*/true);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Autograd, m) {
  m.impl("masked_softmax", forward<false>);
  m.impl("masked_softmax.out", forward_out<false>);
  m.impl("masked_softmax_", softmax_in_place);
  m.impl("masked_log_softmax", forward<true>);
  m.impl("masked_log_softmax.out", forward_out<true>);
  m.impl("masked_softmax_backward", backward<false>);
  m.impl("masked_log_softmax_backward", backward<true>);
  m.impl("masked_log_softmax_jvp", log_softmax_jvp);
  for (const char* name : kSecondOrderNames) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace masked_softmax
