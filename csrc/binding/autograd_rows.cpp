// Derivatives of the operators that return or take one number a row: softmax and log_softmax with a sink, logsumexp,
// and the two operators that their derivatives are made of. Those two are bilinear, and each is the other's derivative:
//
//   row_dot(a, b) = scale * <a, b>       row_scale(a, r) = scale * a * r
//
// So every derivative below is differentiable, and no order is the last. <,> is the sum of the products over a row's
// valid columns.
//
// A row's softmax with a sink s is that of its scores and s, whose share is w = exp(s - logsumexp). With p the
// probabilities of the columns, which are the softmax y or exp(y) of the log_softmax:
//
//   dw = w * ((1 - w) * ds - scale * <p, dx>)
//   softmax      dy = scale * y * (dx - <y, dx>) - y * w * ds
//   log_softmax  dy = scale * (dx - <p, dx>) - w * ds
//   logsumexp    dy = scale * <p, dx> + w * ds
#include "binding/autograd_rows.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/new_empty.h>
#include <ATen/ops/new_ones.h>
#include <c10/core/ScalarType.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "binding/autograd_node.h"
#include "binding/checks.h"

namespace masked_softmax {
namespace {

using torch::autograd::variable_list;

at::ScalarType accumulation_type(const at::Tensor& tensor) {
  return c10::promoteTypes(tensor.scalar_type(), at::kFloat);
}

at::Tensor row_dot(const at::Tensor& a, const at::Tensor& b, const RowArguments& rows, const OptionalSymInt& packed) {
  return call<Operation::kRowDot>(a, b, rows, packed);
}

at::Tensor row_scale(const at::Tensor& a, const at::Tensor& factor, const RowArguments& rows,
                     const OptionalSymInt& packed) {
  return call<Operation::kRowScale>(a, factor, rows, packed);
}

RowArguments unscaled(const RowArguments& rows) { return {rows.lengths, rows.dim, rows.starts, std::nullopt}; }

// The gradient of what was broadcast to the rows.
at::Tensor sum_to_given(const at::Tensor& grad, const at::Tensor& given) {
  std::vector<c10::SymInt> sizes = given.sym_sizes().vec();
  sizes.resize(static_cast<size_t>(grad.dim()), 1);
  return grad.sum_to_size_symint(sizes).reshape_symint(given.sym_sizes()).to(given.scalar_type());
}

// The gradient of the sink. That of -inf, which is no sink, is 0 where a row is NaN too.
at::Tensor sum_to_sink(const at::Tensor& grad, const at::Tensor& sink, const char* name) {
  const at::Tensor is_none = checked(sink, name).eq(-std::numeric_limits<double>::infinity());
  return sum_to_given(grad, sink).masked_fill(is_none, 0);
}

at::Tensor expanded_ones(const at::Tensor& y) {
  return y.new_ones({}, y.options().dtype(accumulation_type(y))).expand_symint(y.sym_sizes());
}

// sum or sum + term
at::Tensor plus(const at::Tensor& sum, const at::Tensor& term) { return sum.defined() ? sum.add(term) : term; }

// What differs between softmax and log_softmax.
template <Operation kForward>
struct SinkDerivatives;

template <>
struct SinkDerivatives<Operation::kSoftmax> {
  static constexpr const char* kNodeName = "MaskedSoftmaxExtWithSinkBackward";
  static at::Tensor backward(const at::Tensor& grad, const at::Tensor& y, const RowArguments& rows,
                             at::ScalarType dtype, const OptionalSymInt& packed) {
    return call<Operation::kSoftmaxBackward>(grad, y, rows, dtype, packed);
  }
  static at::Tensor jvp(const at::Tensor& tangent, const at::Tensor& y, const RowArguments& rows,
                        const OptionalSymInt& packed) {
    return call<Operation::kSoftmaxBackward>(tangent, y, rows, y.scalar_type(), packed);
  }
  static at::Tensor probabilities(const at::Tensor& y) { return y; }
  static at::Tensor minus_dy_dsink(const at::Tensor& y) { return y; }  // over the weight
};

template <>
struct SinkDerivatives<Operation::kLogSoftmax> {
  static constexpr const char* kNodeName = "MaskedLogSoftmaxExtWithSinkBackward";
  static at::Tensor backward(const at::Tensor& grad, const at::Tensor& y, const RowArguments& rows,
                             at::ScalarType dtype, const OptionalSymInt& packed) {
    return call<Operation::kLogSoftmaxBackward>(grad, y, rows, dtype, packed);
  }
  static at::Tensor jvp(const at::Tensor& tangent, const at::Tensor& y, const RowArguments& rows,
                        const OptionalSymInt& packed) {
    return call<Operation::kLogSoftmaxJvp>(tangent, y, rows, packed);
  }
  static at::Tensor probabilities(const at::Tensor& y) { return y.to(accumulation_type(y)).exp(); }
  static at::Tensor minus_dy_dsink(const at::Tensor& y) { return expanded_ones(y); }
};

template <Operation kForward>
constexpr GradientFormula kSinkFormula = {
    SinkDerivatives<kForward>::kNodeName, 2,
    // saved: sink, output, weight
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>& is_needed) {
      using D = SinkDerivatives<kForward>;
      const RowArguments rows = c.rows();
      const at::Tensor& y = saved[1];
      const at::Tensor weight = checked(saved[2], D::kNodeName);
      const at::Tensor grad_times_weight =
          grads[1].defined() ? checked(grads[1], D::kNodeName).mul(weight) : at::Tensor();
      variable_list result(2);
      if (is_needed[0]) {
        if (grads[0].defined()) {
          result[0] = D::backward(grads[0], y, rows, c.input_dtype, c.packed);
        }
        if (grad_times_weight.defined()) {
          const at::Tensor p = D::probabilities(checked(y, D::kNodeName));
          result[0] = plus(result[0], row_scale(p, grad_times_weight.neg(), rows, c.packed).to(c.input_dtype));
        }
      }
      if (is_needed[1]) {
        at::Tensor by_rows;
        if (grads[0].defined()) {
          by_rows = row_dot(grads[0], D::minus_dy_dsink(y), unscaled(rows), c.packed).mul(weight).neg();
        }
        if (grad_times_weight.defined()) {
          by_rows = plus(by_rows, grad_times_weight.sub(grad_times_weight.mul(weight)));
        }
        result[1] = sum_to_sink(by_rows, saved[0], D::kNodeName);
      }
      return result;
    }};

template <Operation kForward>
std::tuple<at::Tensor, at::Tensor> forward_with_sink(const at::Tensor& input, const at::Tensor& sink,
                                                     const RowArguments& rows, OptionalDouble padding_value,
                                                     OptionalType dtype, bool validate, OptionalSymInt packed) {
  using D = SinkDerivatives<kForward>;
  at::Tensor y;
  at::Tensor weight;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(y, weight) = call_with_sink<kForward>(input, sink, rows, padding_value, dtype, validate, packed);
  }
  OperatorNode::Pointer owner;
  const CallView view = view_of(rows, packed, input.scalar_type());
  OperatorNode* const node = OperatorNode::create(kSinkFormula<kForward>, view, {&input, &sink}, owner);
  if (node != nullptr) {
    torch::autograd::set_history(y, owner);
    torch::autograd::set_history(weight, owner);
  }
  at::Tensor y_tangent;
  at::Tensor weight_tangent;  // over the weight
  if (has_tangent(input)) {
    const at::Tensor tangent = tangent_of(input);
    y_tangent = D::jvp(tangent, y, rows, packed);
    weight_tangent = row_dot(tangent, D::probabilities(y), rows, packed).neg();
  }
  if (has_tangent(sink)) {
    const at::Tensor given = checked(tangent_of(sink), info_of(kForward).name);
    const at::Tensor tangent = align_to_rows(given, weight.dim()).to(weight.scalar_type());
    const at::Tensor times_weight = tangent.mul(weight);
    y_tangent = plus(y_tangent, row_scale(D::minus_dy_dsink(y), times_weight.neg(), unscaled(rows), packed));
    weight_tangent = plus(weight_tangent, tangent.sub(times_weight));
  }
  if (y_tangent.defined()) {
    weight_tangent = weight_tangent.mul(weight);
    set_tangent(y, y_tangent.to(y.scalar_type()), /*is_in_place=*/false);
    set_tangent(weight, weight_tangent, /*is_in_place=*/false);
  }
  if (node != nullptr) {
    node->save(sink);
    node->save_output(y, /*is_in_place=*/false);
    node->save_output(weight, /*is_in_place=*/false);
  }
  return {y, weight};
}

// The type in which a logsumexp of `input` with results of type `result` is computed, and so its gradient.
at::ScalarType accumulation_type(const at::Tensor& input, const at::Tensor& result) {
  return c10::promoteTypes(accumulation_type(input), result.scalar_type());
}

// The probabilities whose products with the tangents are the derivative of a logsumexp. They are not computed as
// exp(x - logsumexp), where the rounding of the logsumexp would be an error of the exponent.
at::Tensor softmax_of(const at::Tensor& input, at::ScalarType acc_type, const RowArguments& rows,
                      const OptionalSymInt& packed) {
  return call<Operation::kSoftmax>(input, rows, std::nullopt, acc_type, /*validate=*/false, packed);
}

std::tuple<at::Tensor, at::Tensor> softmax_of(const at::Tensor& input, const at::Tensor& sink, at::ScalarType acc_type,
                                              const RowArguments& rows, const OptionalSymInt& packed) {
  return call_with_sink<Operation::kSoftmax>(input, sink, rows, std::nullopt, acc_type, /*validate=*/false, packed);
}

constexpr GradientFormula kLogSumExpFormula = {
    "MaskedLogSumExpExtBackward", 1,
    // saved: input
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>&) {
      const at::Tensor p = softmax_of(saved[0], accumulation_type(saved[0], grads[0]), c.rows(), c.packed);
      return variable_list{row_scale(p, grads[0], c.rows(), c.packed).to(c.input_dtype)};
    }};

constexpr const char* kLogSumExpWithSinkNode = "MaskedLogSumExpExtWithSinkBackward";

constexpr GradientFormula kLogSumExpWithSinkFormula = {
    kLogSumExpWithSinkNode, 2,
    // saved: input, sink
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>& is_needed) {
      const at::ScalarType acc_type = accumulation_type(saved[0], grads[0]);
      const auto [p, weight] = softmax_of(saved[0], saved[1], acc_type, c.rows(), c.packed);
      variable_list result(2);
      if (is_needed[0]) {
        result[0] = row_scale(p, grads[0], c.rows(), c.packed).to(c.input_dtype);
      }
      if (is_needed[1]) {
        const at::Tensor grad = checked(grads[0], kLogSumExpWithSinkNode);
        result[1] = sum_to_sink(grad.mul(weight), saved[1], kLogSumExpWithSinkNode);
      }
      return result;
    }};

at::Tensor logsumexp(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                     OptionalSymInt packed) {
  at::Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = call<Operation::kLogSumExp>(input, rows, dtype, validate, packed);
  }
  OperatorNode::Pointer owner;
  const CallView view = view_of(rows, packed, input.scalar_type());
  if (OperatorNode* node = OperatorNode::create(kLogSumExpFormula, view, {&input}, owner)) {
    node->save(input);
    torch::autograd::set_history(result, owner);
  }
  if (has_tangent(input)) {
    const at::Tensor p = softmax_of(primal_of(input), accumulation_type(input, result), rows, packed);
    set_tangent(result, row_dot(tangent_of(input), p, rows, packed).to(result.scalar_type()), /*is_in_place=*/false);
  }
  return result;
}

at::Tensor logsumexp_with_sink(const at::Tensor& input, const at::Tensor& sink, const RowArguments& rows,
                               OptionalType dtype, bool validate, OptionalSymInt packed) {
  at::Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = call_with_sink<Operation::kLogSumExp>(input, sink, rows, dtype, validate, packed);
  }
  OperatorNode::Pointer owner;
  const CallView view = view_of(rows, packed, input.scalar_type());
  if (OperatorNode* node = OperatorNode::create(kLogSumExpWithSinkFormula, view, {&input, &sink}, owner)) {
    node->save(input);
    node->save(sink);
    torch::autograd::set_history(result, owner);
  }
  if (has_tangent(input) || has_tangent(sink)) {
    const at::ScalarType acc_type = accumulation_type(input, result);
    const auto [p, weight] = softmax_of(primal_of(input), primal_of(sink), acc_type, rows, packed);
    at::Tensor tangent;
    if (has_tangent(input)) {
      tangent = row_dot(tangent_of(input), p, rows, packed);
    }
    if (has_tangent(sink)) {
      const at::Tensor given = checked(tangent_of(sink), info_of(Operation::kLogSumExp).name);
      tangent = plus(tangent, align_to_rows(given, weight.dim()).to(acc_type).mul(weight));
    }
    set_tangent(result, tangent.to(result.scalar_type()), /*is_in_place=*/false);
  }
  return result;
}

constexpr GradientFormula kRowDotFormula = {
    "MaskedRowDotExtBackward", 2,
    // saved: a, b
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>& is_needed) {
      variable_list result(2);
      for (size_t i = 0; i < result.size(); ++i) {
        if (is_needed[i]) {
          result[i] = row_scale(saved[1 - i], grads[0], c.rows(), c.packed).to(saved[i].scalar_type());
        }
      }
      return result;
    }};

constexpr GradientFormula kRowScaleFormula = {
    "MaskedRowScaleExtBackward", 2,
    // saved: a, factor
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>& is_needed) {
      variable_list result(2);
      if (is_needed[0]) {
        result[0] = row_scale(grads[0], saved[1], c.rows(), c.packed).to(saved[0].scalar_type());
      }
      if (is_needed[1]) {
        result[1] = sum_to_given(row_dot(grads[0], saved[0], c.rows(), c.packed), saved[1]);
      }
      return result;
    }};

template <Operation kOperation>
at::Tensor bilinear(const at::Tensor& a, const at::Tensor& b, const RowArguments& rows, OptionalSymInt packed) {
  constexpr const GradientFormula& kFormula = kOperation == Operation::kRowDot ? kRowDotFormula : kRowScaleFormula;
  at::Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = call<kOperation>(a, b, rows, packed);
  }
  OperatorNode::Pointer owner;
  if (OperatorNode* node = OperatorNode::create(kFormula, view_of(rows, packed, a.scalar_type()), {&a, &b}, owner)) {
    node->save(a);
    node->save(b);
    torch::autograd::set_history(result, owner);
  }
  at::Tensor tangent;
  if (has_tangent(a)) {
    tangent = call<kOperation>(tangent_of(a), primal_of(b), rows, packed);
  }
  if (has_tangent(b)) {
    tangent = plus(tangent, call<kOperation>(primal_of(a), tangent_of(b), rows, packed));
  }
  if (tangent.defined()) {
    set_tangent(result, tangent.to(result.scalar_type()), /*is_in_place=*/false);
  }
  return result;
}

at::Tensor new_sink_weight(const at::Tensor& input, const RowArguments& rows) {
  const CallArguments arguments{rows, SoftmaxInPlaceOperator::kName, std::nullopt, /*validate=*/false};
  return input.new_empty_symint(row_shape(input, arguments), input.options().dtype(accumulation_type(input)));
}

}  // namespace

void differentiate_sink_in_place(at::Tensor& input, const at::Tensor& sink, const OptionalTensor& sink_weight,
                                 const RowArguments& rows, bool validate) {
  const CallArguments arguments{rows, SoftmaxInPlaceOperator::kName, std::nullopt, validate};
  check_floating("input", input.scalar_type(), arguments);  // None has no autograd metadata
  torch::autograd::check_inplace(input, /*requires_grad=*/true);
  // A node that changes a view has one result, and tangents are those of a new tensor.
  const bool changes_view = input.is_view() || (sink_weight.has_value() && sink_weight->is_view());
  if (changes_view || has_tangent(input) || has_tangent(sink)) {
    if (!input.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
      check_no_internal_overlap("input", input, arguments.name);  // copy_() notices strides of 0 only
    }
    const auto [y, weight] = call_with_sink<Operation::kSoftmax>(input, sink, rows, std::nullopt, input.scalar_type(),
                                                                 validate, std::nullopt);
    if (sink_weight.has_value()) {
      check_sink_weight(*sink_weight, weight, input, arguments);
    }
    input.copy_(y);
    if (sink_weight.has_value()) {
      sink_weight->copy_(weight);
    }
    return;
  }
  const CallView view = view_of(rows, std::nullopt, input.scalar_type());
  OperatorNode::Pointer owner;
  OperatorNode* const node = OperatorNode::create(kSinkFormula<Operation::kSoftmax>, view, {&input, &sink}, owner);
  node->save(sink);  // can fail, so before the write
  const at::Tensor weight = sink_weight.has_value() ? *sink_weight : new_sink_weight(input, rows);
  {
    const at::AutoDispatchBelowAutograd below_autograd;  // in_place.cpp is next
    call_operator<SinkInPlaceOperator>(input, sink, weight, rows, validate);
  }
  torch::autograd::rebase_history(input, owner);
  torch::autograd::set_history(weight, owner);
  node->save_output(input, /*is_in_place=*/true);
  node->save_output(weight, /*is_in_place=*/false);
}

TORCH_LIBRARY_IMPL(masked_softmax_ext, Autograd, m) {
  for_each_operation([&](auto operation) {
    constexpr Operation kOperation = operation.value;
    constexpr OperationInfo kInfo = info_of(kOperation);
    if constexpr (kInfo.signature == Signature::kForward) {
      m.impl(kInfo.sink_name, ForwardWithSink::kernel<forward_with_sink<kOperation>>);
    } else if constexpr (kInfo.signature == Signature::kReduction) {
      m.impl(kInfo.name, Reduction::kernel<logsumexp>);
      m.impl(kInfo.sink_name, ReductionWithSink::kernel<logsumexp_with_sink>);
    } else if constexpr (kInfo.signature == Signature::kRowDot) {
      m.impl(kInfo.name, RowDot::kernel<bilinear<kOperation>>);
    } else if constexpr (kInfo.signature == Signature::kRowScale) {
      m.impl(kInfo.name, RowScale::kernel<bilinear<kOperation>>);
    }
  });
}

}  // namespace masked_softmax
