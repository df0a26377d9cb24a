// Derivatives. Each function saves its output and the lengths (and starts, where given), nothing else. The backward
// operators are differentiable themselves; their derivatives are not. Writes are counted below (in_place.cpp).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
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

const Operators& operators_of(bool is_log) { return is_log ? log_softmax_operators() : softmax_operators(); }

// What the call was, beside its tensors.
void save_call(AutogradContext* ctx, bool is_log, int64_t dim, OptionalScale scale, at::ScalarType input_dtype) {
  ctx->saved_data["is_log"] = is_log;
  ctx->saved_data["dim"] = dim;
  if (scale.has_value()) {
    ctx->saved_data["scale"] = *scale;
  }
  ctx->saved_data["input_dtype"] = static_cast<int64_t>(input_dtype);
}

struct SavedCall {
  bool is_log;
  int64_t dim;
  OptionalScale scale;
  at::ScalarType input_dtype;

  explicit SavedCall(AutogradContext* ctx) {
    is_log = ctx->saved_data["is_log"].toBool();
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

bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(0).defined(); }

bool needs_graph(const at::Tensor& tensor) {
  return (at::GradMode::is_enabled() && tensor.requires_grad()) || has_tangent(tensor);
}

// The backward operator as a function: its own derivatives with respect to grad_output and output.
struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static at::Tensor forward(AutogradContext* ctx, bool is_log, const at::Tensor& grad_output, const at::Tensor& output,
                            const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts, OptionalScale scale,
                            at::ScalarType input_dtype) {
    ctx->save_for_backward({grad_output, output, lengths, starts.value_or(at::Tensor())});
    save_call(ctx, is_log, dim, scale, input_dtype);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return operators_of(is_log).backward.call(grad_output, output, lengths, dim, starts, scale, input_dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& grad_output = saved[0];
    const at::Tensor& output = saved[1];
    const at::Tensor& lengths = saved[2];
    const OptionalTensor starts = defined_or_none(saved[3]);
    const SavedCall call(ctx);
    const at::Tensor& tangent = grads[0];
    variable_list result(8);
    if (ctx->needs_input_grad(0)) {
      result[1] = call.is_log ? masked_log_softmax_jvp().call(tangent.to(output.scalar_type()), output, lengths,
                                                              call.dim, starts, call.scale)
                              : softmax_operators().backward.call(tangent, output, lengths, call.dim, starts,
                                                                  call.scale, grad_output.scalar_type());
    }
    if (ctx->needs_input_grad(1)) {
      result[2] = operators_of(call.is_log)
                      .backward_wrt_output.call(tangent, grad_output, output, lengths, call.dim, starts, call.scale);
    }
    return result;
  }
};

template <bool kIsLog>
at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& lengths, int64_t dim,
                    const OptionalTensor& starts, OptionalScale scale, at::ScalarType input_dtype) {
  if (!needs_graph(grad_output) && !needs_graph(output)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return operators_of(kIsLog).backward.call(grad_output, output, lengths, dim, starts, scale, input_dtype);
  }
  return BackwardFunction::apply(kIsLog, grad_output, output, lengths, dim, starts, scale, input_dtype);
}

variable_list grad_of_input(AutogradContext* ctx, const variable_list& grads, size_t input, size_t argument_count) {
  variable_list result(argument_count);
  if (grads[0].defined()) {
    const variable_list saved = ctx->get_saved_variables();
    const SavedCall call(ctx);
    result[input] = operators_of(call.is_log)
                        .backward.call(grads[0], saved[0], saved[1], call.dim, defined_or_none(saved[2]), call.scale,
                                       call.input_dtype);
  }
  return result;
}

struct ForwardFunction : torch::autograd::Function<ForwardFunction> {
  static at::Tensor forward(AutogradContext* ctx, bool is_log, const at::Tensor& input, const at::Tensor& lengths,
                            int64_t dim, const OptionalTensor& starts, OptionalScale scale, OptionalType dtype,
                            bool validate) {
    at::Tensor output;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      output = operators_of(is_log).forward.call(input, lengths, dim, starts, scale, dtype, validate);
    }
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({output, lengths, starts.value_or(at::Tensor())});
    save_call(ctx, is_log, dim, scale, input.scalar_type());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) { return grad_of_input(ctx, grads, 1, 8); }
};

template <bool kIsLog>
at::Tensor forward(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                   OptionalScale scale, OptionalType dtype, bool validate) {
  if (!needs_graph(input)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return operators_of(kIsLog).forward.call(input, lengths, dim, starts, scale, dtype, validate);
  }
  return ForwardFunction::apply(kIsLog, input, lengths, dim, starts, scale, dtype, validate);
}

template <bool kIsLog>
void forward_out(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                 OptionalScale scale, OptionalType dtype, bool validate, at::Tensor& out) {
  const Operators& operators = operators_of(kIsLog);
  TORCH_CHECK(!at::GradMode::is_enabled() || !(input.requires_grad() || out.requires_grad()), operators.name,
              "(): functions with out=... arguments don't support automatic differentiation, but one of the arguments "
              "requires grad.");
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(input) && !has_tangent(out), operators.name,
                              "(): functions with out=... arguments don't support forward-mode differentiation, but "
                              "one of the arguments has a tangent.");
  at::AutoDispatchBelowAutograd below_autograd;
  operators.forward_out.call(input, lengths, dim, starts, scale, dtype, validate, out);
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
    save_call(ctx, /*is_log=*/false, dim, scale, input.scalar_type());
    return input;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) { return grad_of_input(ctx, grads, 0, 6); }
};

void softmax_in_place(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                      OptionalScale scale, bool validate) {
  if (needs_graph(input)) {
    // torch's own checks come after the function has run, when the values are gone.
    TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(input),
                                "masked_softmax_(): forward-mode differentiation in place is not "
                                "implemented, but input has a tangent.");
    TORCH_CHECK(!lengths.is_inference() && !(starts.has_value() && starts->is_inference()), "masked_softmax_(): ",
                "Inference tensors cannot be saved for backward, but lengths or starts are one. Please clone them "
                "outside of inference mode.");
    torch::autograd::check_inplace(input, /*requires_grad=*/true);
    InPlaceFunction::apply(input, lengths, dim, starts, scale, validate);
    return;
  }
  at::AutoDispatchBelowAutograd below_autograd;
  masked_softmax_in_place().call(input, lengths, dim, starts, scale, validate);
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
  m.impl("masked_log_softmax_jvp", torch::autograd::autogradNotImplementedFallback());
  m.impl("masked_softmax_backward_wrt_output", torch::autograd::autogradNotImplementedFallback());
  m.impl("masked_log_softmax_backward_wrt_output", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace masked_softmax
