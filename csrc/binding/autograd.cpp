// Derivatives. Each function saves its output and the lengths (and starts, where given), nothing else. The backward
// operators are differentiable themselves; their derivatives are not.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;
using OptionalScale = std::optional<double>;
using OptionalType = std::optional<at::ScalarType>;

// What the call was, beside its tensors.
void save_call(AutogradContext* ctx, int64_t dim, OptionalScale scale, at::ScalarType input_dtype) {
  ctx->saved_data["dim"] = dim;
  if (scale.has_value()) {
    ctx->saved_data["scale"] = *scale;
  }
  ctx->saved_data["input_dtype"] = static_cast<int64_t>(input_dtype);
}

struct SavedCall {
  int64_t dim;
  OptionalScale scale;
  at::ScalarType input_dtype;

  explicit SavedCall(AutogradContext* ctx) {
    dim = ctx->saved_data["dim"].toInt();
    const auto found = ctx->saved_data.find("scale");
    if (found != ctx->saved_data.end()) {
      scale = found->second.toDouble();
    }
    input_dtype = static_cast<at::ScalarType>(ctx->saved_data["input_dtype"].toInt());
  }
};

OptionalTensor defined_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

bool needs_graph(const at::Tensor& tensor) {
  return (at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(0).defined();
}

using OperatorsOf = const Operators& (*)();

// The backward operator as a function: its own derivatives with respect to grad_output and output.
template <OperatorsOf operators_of>
struct BackwardFunction : torch::autograd::Function<BackwardFunction<operators_of>> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& output,
                            const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts, OptionalScale scale,
                            at::ScalarType input_dtype) {
    ctx->save_for_backward({grad_output, output, lengths, starts.value_or(at::Tensor())});
    save_call(ctx, dim, scale, input_dtype);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return operators_of().backward.call(grad_output, output, lengths, dim, starts, scale, input_dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& grad_output = saved[0];
    const at::Tensor& output = saved[1];
    const at::Tensor& lengths = saved[2];
    const OptionalTensor starts = defined_or_none(saved[3]);
    const SavedCall call(ctx);
    const at::Tensor& tangent = grads[0];
    variable_list result(7);
    if (ctx->needs_input_grad(0)) {
      const bool is_log = operators_of == log_softmax_operators;
      result[0] = is_log ? masked_log_softmax_jvp().call(tangent.to(output.scalar_type()), output, lengths, call.dim,
                                                         starts, call.scale)
                         : operators_of().backward.call(tangent, output, lengths, call.dim, starts, call.scale,
                                                        grad_output.scalar_type());
    }
    if (ctx->needs_input_grad(1)) {
      result[1] =
          operators_of().backward_wrt_output.call(tangent, grad_output, output, lengths, call.dim, starts, call.scale);
    }
    return result;
  }
};

template <OperatorsOf operators_of>
at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& lengths, int64_t dim,
                    const OptionalTensor& starts, OptionalScale scale, at::ScalarType input_dtype) {
  if (!needs_graph(grad_output) && !needs_graph(output)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return operators_of().backward.call(grad_output, output, lengths, dim, starts, scale, input_dtype);
  }
  return BackwardFunction<operators_of>::apply(grad_output, output, lengths, dim, starts, scale, input_dtype);
}

variable_list grad_of_input(AutogradContext* ctx, const variable_list& grads, OperatorsOf operators_of,
                            size_t argument_count) {
  variable_list result(argument_count);
  if (grads[0].defined()) {
    const variable_list saved = ctx->get_saved_variables();
    const SavedCall call(ctx);
    result[0] = operators_of().backward.call(grads[0], saved[0], saved[1], call.dim, defined_or_none(saved[2]),
                                             call.scale, call.input_dtype);
  }
  return result;
}

template <OperatorsOf operators_of>
struct ForwardFunction : torch::autograd::Function<ForwardFunction<operators_of>> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& lengths, int64_t dim,
                            const OptionalTensor& starts, OptionalScale scale, OptionalType dtype, bool validate) {
    at::Tensor output;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      output = operators_of().forward.call(input, lengths, dim, starts, scale, dtype, validate);
    }
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({output, lengths, starts.value_or(at::Tensor())});
    save_call(ctx, dim, scale, input.scalar_type());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return grad_of_input(ctx, grads, operators_of, 7);
  }
};

template <OperatorsOf operators_of>
at::Tensor forward(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                   OptionalScale scale, OptionalType dtype, bool validate) {
  if (!needs_graph(input)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return operators_of().forward.call(input, lengths, dim, starts, scale, dtype, validate);
  }
  return ForwardFunction<operators_of>::apply(input, lengths, dim, starts, scale, dtype, validate);
}

template <OperatorsOf operators_of>
void forward_out(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                 OptionalScale scale, OptionalType dtype, bool validate, at::Tensor& out) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !(input.requires_grad() || out.requires_grad()), operators_of().name,
              "(): functions with out=... arguments don't support automatic differentiation, but one of the arguments "
              "requires grad.");
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    operators_of().forward_out.call(input, lengths, dim, starts, scale, dtype, validate, out);
  }
  torch::autograd::impl::bump_version(out);
}

struct InPlaceFunction : torch::autograd::Function<InPlaceFunction> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor input, const at::Tensor& lengths, int64_t dim,
                            const OptionalTensor& starts, OptionalScale scale, bool validate) {
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      masked_softmax_in_place().call(input, lengths, dim, starts, scale, validate);
    }
    ctx->mark_dirty({input});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, lengths, starts.value_or(at::Tensor())});
    save_call(ctx, dim, scale, input.scalar_type());
    return input;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return grad_of_input(ctx, grads, softmax_operators, 6);
  }
};

void softmax_in_place(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                      OptionalScale scale, bool validate) {
  if (needs_graph(input)) {
    // torch's own check comes after the function has run, when the values are gone.
    const bool is_view = input.is_view();
    TORCH_CHECK(!input.requires_grad() || !(is_view ? input._base() : input).is_leaf(), is_view ? "a view of " : "",
                "a leaf Variable that requires grad is being used in an in-place operation.");
    InPlaceFunction::apply(input, lengths, dim, starts, scale, validate);
    return;
  }
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    masked_softmax_in_place().call(input, lengths, dim, starts, scale, validate);
  }
  torch::autograd::impl::bump_version(input);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Autograd, m) {
  m.impl("masked_softmax", forward<softmax_operators>);
  m.impl("masked_softmax.out", forward_out<softmax_operators>);
  m.impl("masked_softmax_", softmax_in_place);
  m.impl("masked_log_softmax", forward<log_softmax_operators>);
  m.impl("masked_log_softmax.out", forward_out<log_softmax_operators>);
  m.impl("masked_softmax_backward", backward<softmax_operators>);
  m.impl("masked_log_softmax_backward", backward<log_softmax_operators>);
  m.impl("masked_log_softmax_jvp", torch::autograd::autogradNotImplementedFallback());
  m.impl("masked_softmax_backward_wrt_output", torch::autograd::autogradNotImplementedFallback());
  m.impl("masked_log_softmax_backward_wrt_output", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace masked_softmax
