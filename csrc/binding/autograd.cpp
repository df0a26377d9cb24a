// Derivatives of every order, in reverse and forward mode. Those of the two functions and of their first derivatives
// are operators with kernels. Those of a second derivative are combinations of these same operators, so they are
// differentiable too, and no order is the last.
//
// A forward node saves its output, lengths and starts, nothing else. Writes are counted one level below (in_place.cpp).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <c10/core/ScalarType.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "binding/autograd_node.h"
#include "binding/autograd_rows.h"
#include "binding/checks.h"

namespace masked_softmax {
namespace {

using torch::autograd::variable_list;

// The derivatives of an operation. Formulas: common/formulas.h.
//
// A first derivative d(a, y) takes a gradient or a tangent a and the saved output y. It is linear in a, so its jvp
// along a is d itself. Its other derivatives:
//   kTransposed(grad, y)         reverse mode, with respect to a
//   kBackwardWrtY(grad, a, y)    reverse mode, with respect to y; of a jvp: kBackwardWrtY(a, grad, y)
//   kJvpWrtY(tangent, a, y)      forward mode, along a tangent of y
//
// An operation that is not here has none: its derivative raises.
template <Operation kOperation>
struct DerivativesOf {
  static constexpr const char* kNodeName = nullptr;
};

template <>
struct DerivativesOf<Operation::kSoftmax> {
  static constexpr const char* kNodeName = "MaskedSoftmaxExtBackward";
  static constexpr auto kBackward = Operation::kSoftmaxBackward;
  static constexpr auto kJvp = Operation::kSoftmaxBackward;  // the Jacobian is symmetric
};
template <>
struct DerivativesOf<Operation::kLogSoftmax> {
  static constexpr const char* kNodeName = "MaskedLogSoftmaxExtBackward";
  static constexpr auto kBackward = Operation::kLogSoftmaxBackward;
  static constexpr auto kJvp = Operation::kLogSoftmaxJvp;
};
template <>
struct DerivativesOf<Operation::kSoftmaxBackward> {
  static constexpr const char* kNodeName = "MaskedSoftmaxExtBackwardBackward";
  static constexpr auto kTransposed = Operation::kSoftmaxBackward;
  static constexpr auto kBackwardWrtY = Operation::kSoftmaxBackwardWrtY;
  static constexpr auto kJvpWrtY = Operation::kSoftmaxBackwardJvpWrtY;
};
template <>
struct DerivativesOf<Operation::kLogSoftmaxBackward> {
  static constexpr const char* kNodeName = "MaskedLogSoftmaxExtBackwardBackward";
  static constexpr auto kTransposed = Operation::kLogSoftmaxJvp;
  static constexpr auto kBackwardWrtY = Operation::kLogSoftmaxBackwardWrtY;
  static constexpr auto kJvpWrtY = Operation::kLogSoftmaxBackwardWrtY;  // it is diagonal
};
template <>
struct DerivativesOf<Operation::kLogSoftmaxJvp> {
  static constexpr const char* kNodeName = "MaskedLogSoftmaxExtJvpBackward";
  static constexpr auto kTransposed = Operation::kLogSoftmaxBackward;
  static constexpr auto kBackwardWrtY = Operation::kLogSoftmaxBackwardWrtY;
  static constexpr auto kJvpWrtY = Operation::kLogSoftmaxJvpJvpWrtY;
};

// One call of a second derivative d(a, b, y), and operators on its rows.
struct SecondOrderCall {
  const at::Tensor& a;
  const at::Tensor& b;
  const at::Tensor& y;
  const RowArguments& rows;
  const OptionalSymInt& packed;

  template <Operation kSecondOrder>
  at::Tensor call(const at::Tensor& first, const at::Tensor& second) const {
    return masked_softmax::call<kSecondOrder>(first, second, y, rows, packed);
  }

  // u * v on the valid columns, in the accumulation type. 0 in the padding, whatever u and v hold there.
  at::Tensor product(const at::Tensor& u, const at::Tensor& v) const {
    const RowArguments unscaled{rows.lengths, rows.dim, rows.starts, std::nullopt};
    return masked_softmax::call<Operation::kSoftmaxBackwardWrtY>(u, v, zeros(), unscaled, packed);
  }

  // -scale * (u * <v, w> + v * <u, w>), where <,> is the sum of the products over a row.
  at::Tensor exchanged_products(const at::Tensor& u, const at::Tensor& v, const at::Tensor& w) const {
    return at::add(times_sum(u, product(v, w)), times_sum(v, product(u, w))).to(y.scalar_type());
  }

 private:
  // -scale * u * <v, 1>
  at::Tensor times_sum(const at::Tensor& u, const at::Tensor& v) const {
    return masked_softmax::call<Operation::kLogSoftmaxBackwardWrtY>(u, v, zeros(), rows, packed);
  }

  // Like y, without memory for each element.
  at::Tensor zeros() const {
    const at::ScalarType acc_type = c10::promoteTypes(y.scalar_type(), at::kFloat);
    return y.new_zeros({}, y.options().dtype(acc_type)).expand_symint(y.sym_sizes());
  }
};

// A second derivative d(a, b, y) is linear in a and in b, so its jvp along either is d itself. Its other derivatives:
//   wrt_a(call, grad), wrt_b, wrt_y    reverse mode
//   along_y(call, tangent)             forward mode, along a tangent of y
template <>
struct DerivativesOf<Operation::kSoftmaxBackwardWrtY> {
  static constexpr const char* kNodeName = "MaskedSoftmaxExtBackwardWrtOutputBackward";
  using Call = SecondOrderCall;
  static at::Tensor wrt_a(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kSoftmaxBackwardJvpWrtY>(grad, c.b);
  }
  static at::Tensor wrt_b(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kSoftmaxBackwardJvpWrtY>(grad, c.a);
  }
  static at::Tensor wrt_y(const Call& c, const at::Tensor& grad) { return c.exchanged_products(c.a, c.b, grad); }
  static at::Tensor along_y(const Call& c, const at::Tensor& tangent) {
    return c.exchanged_products(c.a, c.b, tangent);
  }
};
template <>
struct DerivativesOf<Operation::kSoftmaxBackwardJvpWrtY> {
  static constexpr const char* kNodeName = "MaskedSoftmaxExtBackwardJvpWrtOutputBackward";
  using Call = SecondOrderCall;
  static at::Tensor wrt_a(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kSoftmaxBackwardWrtY>(grad, c.b);
  }
  static at::Tensor wrt_b(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kSoftmaxBackwardJvpWrtY>(c.a, grad);
  }
  static at::Tensor wrt_y(const Call& c, const at::Tensor& grad) { return c.exchanged_products(c.b, grad, c.a); }
  static at::Tensor along_y(const Call& c, const at::Tensor& tangent) {
    return c.exchanged_products(c.a, tangent, c.b);
  }
};
template <>
struct DerivativesOf<Operation::kLogSoftmaxBackwardWrtY> {
  static constexpr const char* kNodeName = "MaskedLogSoftmaxExtBackwardWrtOutputBackward";
  using Call = SecondOrderCall;
  static at::Tensor wrt_a(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kLogSoftmaxBackwardWrtY>(grad, c.b);
  }
  static at::Tensor wrt_b(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kLogSoftmaxJvpJvpWrtY>(c.a, grad);
  }
  static at::Tensor wrt_y(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kLogSoftmaxBackwardWrtY>(c.product(c.a, grad), c.b);
  }
  static at::Tensor along_y(const Call& c, const at::Tensor& tangent) { return wrt_y(c, tangent); }
};
template <>
struct DerivativesOf<Operation::kLogSoftmaxJvpJvpWrtY> {
  static constexpr const char* kNodeName = "MaskedLogSoftmaxExtJvpJvpWrtOutputBackward";
  using Call = SecondOrderCall;
  static at::Tensor wrt_a(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kLogSoftmaxBackwardWrtY>(c.b, grad);
  }
  static at::Tensor wrt_b(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kLogSoftmaxBackwardWrtY>(c.a, grad);
  }
  static at::Tensor wrt_y(const Call& c, const at::Tensor& grad) {
    return c.call<Operation::kLogSoftmaxBackwardWrtY>(c.product(c.a, c.b), grad);
  }
  static at::Tensor along_y(const Call& c, const at::Tensor& tangent) {
    return c.call<Operation::kLogSoftmaxJvpJvpWrtY>(c.product(c.a, c.b), tangent);
  }
};

// d(a, y), of type dtype; but a jvp always has y's type.
template <Operation kOperation>
at::Tensor call_derivative(const at::Tensor& a, const at::Tensor& y, const RowArguments& rows, at::ScalarType dtype,
                           OptionalSymInt packed) {
  if constexpr (info_of(kOperation).signature == Signature::kBackward) {
    return call<kOperation>(a, y, rows, dtype, packed);
  } else {
    return call<kOperation>(a, y, rows, packed);
  }
}

template <Operation kForward>
constexpr GradientFormula kForwardFormula = {
    DerivativesOf<kForward>::kNodeName, 1,
    // saved: output
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>&) {
      return variable_list{
          call<DerivativesOf<kForward>::kBackward>(grads[0], saved[0], c.rows(), c.input_dtype, c.packed)};
    }};

template <Operation kDerivative>
constexpr GradientFormula kDerivativeFormula = {
    DerivativesOf<kDerivative>::kNodeName, 2,
    // saved: a, output
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>& is_needed) {
      using D = DerivativesOf<kDerivative>;
      constexpr bool kIsBackward = info_of(kDerivative).signature == Signature::kBackward;
      const at::Tensor& grad = grads[0];
      const at::Tensor& a = saved[0];
      const at::Tensor& y = saved[1];
      variable_list result(2);
      if (is_needed[0]) {
        result[0] = call_derivative<D::kTransposed>(grad, y, c.rows(), a.scalar_type(), c.packed);
      }
      if (is_needed[1]) {
        result[1] = call<D::kBackwardWrtY>(kIsBackward ? grad : a, kIsBackward ? a : grad, y, c.rows(), c.packed);
      }
      return result;
    }};

template <Operation kSecondOrder>
constexpr GradientFormula kSecondOrderFormula = {
    DerivativesOf<kSecondOrder>::kNodeName, 3,
    // saved: a, b, output
    [](const CallView& c, const variable_list& grads, const variable_list& saved, const std::vector<bool>& is_needed) {
      using D = DerivativesOf<kSecondOrder>;
      const RowArguments rows = c.rows();
      const SecondOrderCall second{saved[0], saved[1], saved[2], rows, c.packed};
      constexpr decltype(&D::wrt_a) kGradients[] = {D::wrt_a, D::wrt_b, D::wrt_y};
      variable_list result(3);
      for (size_t i = 0; i < result.size(); ++i) {
        if (is_needed[i]) {
          result[i] = kGradients[i](second, grads[0]);
        }
      }
      return result;
    }};

template <Operation kForward>
at::Tensor forward(const at::Tensor& input, const RowArguments& rows, OptionalDouble padding_value, OptionalType dtype,
                   bool validate, OptionalSymInt packed) {
  at::Tensor output;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = call<kForward>(input, rows, padding_value, dtype, validate, packed);
  }
  const CallView view = view_of(rows, packed, input.scalar_type());
  OperatorNode::Pointer owner;
  OperatorNode* const node = OperatorNode::create(kForwardFormula<kForward>, view, {&input}, owner);
  if (node != nullptr) {
    torch::autograd::set_history(output, owner);
  }
  if (has_tangent(input)) {
    const at::Tensor tangent =
        call_derivative<DerivativesOf<kForward>::kJvp>(tangent_of(input), output, rows, output.scalar_type(), packed);
    set_tangent(output, tangent, /*is_in_place=*/false);
  }
  if (node != nullptr) {
    node->save_output(output, /*is_in_place=*/false);
  }
  return output;
}

template <Operation kDerivative>
at::Tensor derivative(const at::Tensor& a, const at::Tensor& y, const RowArguments& rows, at::ScalarType dtype,
                      OptionalSymInt packed) {
  at::Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = call_derivative<kDerivative>(a, y, rows, dtype, packed);
  }
  OperatorNode::Pointer owner;
  const CallView view = view_of(rows, packed, result.scalar_type());
  if (OperatorNode* node = OperatorNode::create(kDerivativeFormula<kDerivative>, view, {&a, &y}, owner)) {
    node->save(a);
    node->save(y);
    torch::autograd::set_history(result, owner);
  }
  at::Tensor tangent;
  if (has_tangent(a)) {
    tangent = call_derivative<kDerivative>(tangent_of(a), primal_of(y), rows, dtype, packed);
  }
  if (has_tangent(y)) {
    const at::Tensor along_y =
        call<DerivativesOf<kDerivative>::kJvpWrtY>(tangent_of(y), primal_of(a), primal_of(y), rows, packed);
    tangent = tangent.defined() ? tangent.add(along_y) : along_y;
  }
  if (tangent.defined()) {
    set_tangent(result, tangent.to(result.scalar_type()), /*is_in_place=*/false);
  }
  return result;
}

template <Operation kJvp>
at::Tensor jvp(const at::Tensor& tangent, const at::Tensor& output, const RowArguments& rows, OptionalSymInt packed) {
  return derivative<kJvp>(tangent, output, rows, output.scalar_type(), packed);
}

template <Operation kSecondOrder>
at::Tensor second_order(const at::Tensor& a, const at::Tensor& b, const at::Tensor& y, const RowArguments& rows,
                        OptionalSymInt packed) {
  at::Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = call<kSecondOrder>(a, b, y, rows, packed);
  }
  OperatorNode::Pointer owner;
  const CallView view = view_of(rows, packed, result.scalar_type());
  if (OperatorNode* node = OperatorNode::create(kSecondOrderFormula<kSecondOrder>, view, {&a, &b, &y}, owner)) {
    node->save(a);
    node->save(b);
    node->save(y);
    torch::autograd::set_history(result, owner);
  }
  at::Tensor tangent;
  const auto add = [&](const at::Tensor& term) { tangent = tangent.defined() ? tangent.add(term) : term; };
  const at::Tensor primal_a = primal_of(a);
  const at::Tensor primal_b = primal_of(b);
  const at::Tensor primal_y = primal_of(y);
  const SecondOrderCall primal{primal_a, primal_b, primal_y, rows, packed};
  if (has_tangent(a)) {
    add(primal.call<kSecondOrder>(tangent_of(a), primal_b));
  }
  if (has_tangent(b)) {
    add(primal.call<kSecondOrder>(primal_a, tangent_of(b)));
  }
  if (has_tangent(y)) {
    add(DerivativesOf<kSecondOrder>::along_y(primal, tangent_of(y)));
  }
  if (tangent.defined()) {
    set_tangent(result, tangent.to(result.scalar_type()), /*is_in_place=*/false);
  }
  return result;
}

template <Operation kForward>
void forward_out(const at::Tensor& input, const RowArguments& rows, const OptionalTensor& sink,
                 OptionalDouble padding_value, OptionalType dtype, bool validate, at::Tensor& out) {
  constexpr const char* kName = info_of(kForward).name;
  TORCH_CHECK(!torch::autograd::compute_requires_grad(input, out, sink), kName,
              "(): functions with out=... arguments don't support automatic differentiation, but one of the arguments "
              "requires grad.");
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(input) && !has_tangent(out) && !(sink.has_value() && has_tangent(*sink)),
                              kName,
                              "(): functions with out=... arguments don't support forward-mode differentiation, but "
                              "one of the arguments has a tangent.");
  const at::AutoDispatchBelowAutograd below_autograd;  // in_place.cpp is next
  call_operator<OutOperator<kForward>>(input, rows, sink, padding_value, dtype, validate, out);
}

// sink: null if there is none; then nothing is differentiated with respect to it.
void compute_in_place(at::Tensor& input, const RowArguments& rows, const at::Tensor* sink,
                      const OptionalTensor& sink_weight, bool validate) {
  torch::autograd::check_inplace(input, torch::autograd::compute_requires_grad(input));
  constexpr const char* kName = SoftmaxInPlaceOperator::kName;
  const CallView view = view_of(rows, std::nullopt, input.scalar_type());
  OperatorNode::Pointer owner;
  // Whatever can fail comes before the write: saving lengths, and allocating memory for the tangent.
  OperatorNode* const node = OperatorNode::create(kForwardFormula<Operation::kSoftmax>, view, {&input}, owner);
  at::Tensor tangent;
  if (has_tangent(input)) {
    // Of copies: an outer level of differentiation may save them or their tangents, which are overwritten below.
    const at::Tensor primal = checked(primal_of(input), kName).clone();
    const at::Tensor y =
        call<Operation::kSoftmax>(primal, rows, std::nullopt, primal.scalar_type(), validate, std::nullopt);
    tangent = call<Operation::kSoftmaxBackward>(checked(tangent_of(input), kName).clone(), y, rows, y.scalar_type(),
                                                std::nullopt);
  }
  {
    const at::AutoDispatchBelowAutograd below_autograd;  // in_place.cpp is next
    if (sink != nullptr) {
      call_operator<SinkInPlaceOperator>(input, *sink, sink_weight, rows, validate);
    } else {
      call_operator<SoftmaxInPlaceOperator>(input, rows, validate);
    }
  }
  if (node != nullptr) {
    torch::autograd::rebase_history(input, owner);
  }
  if (tangent.defined()) {
    // Into the tangent's own memory, which a view of input, or the base of input, may share.
    set_tangent(input, tangent_of(input).copy_(tangent), /*is_in_place=*/true);
  }
  if (node != nullptr) {
    node->save_output(input, /*is_in_place=*/true);
  }
}

void softmax_in_place(at::Tensor& input, const RowArguments& rows, bool validate) {
  compute_in_place(input, rows, nullptr, std::nullopt, validate);
}

void softmax_with_sink_in_place(at::Tensor& input, const at::Tensor& sink, const OptionalTensor& sink_weight,
                                const RowArguments& rows, bool validate) {
  if (sink_weight.has_value()) {
    torch::autograd::check_inplace(*sink_weight, /*requires_grad=*/true);
  }
  const bool is_weight_differentiated = sink_weight.has_value() && torch::autograd::compute_requires_grad(input);
  if (!torch::autograd::compute_requires_grad(sink) && !is_weight_differentiated && !has_tangent(sink) &&
      !has_tangent(input)) {
    return compute_in_place(input, rows, &sink, sink_weight, validate);
  }
  differentiate_sink_in_place(input, sink, sink_weight, rows, validate);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Autograd, m) {
  for_each_operation([&](auto operation) {
    constexpr Operation kOperation = operation.value;
    constexpr OperationInfo kInfo = info_of(kOperation);
    if constexpr (kInfo.signature == Signature::kForward) {
      m.impl(full_name(OutOperator<kOperation>()).c_str(), ForwardOut::kernel<forward_out<kOperation>>);
    }
    if constexpr (returns_or_takes_row_numbers(kInfo.signature)) {
      // autograd_rows.cpp
    } else if constexpr (DerivativesOf<kOperation>::kNodeName == nullptr) {
      m.impl(kInfo.name, torch::autograd::autogradNotImplementedFallback());
    } else if constexpr (kInfo.signature == Signature::kForward) {
      m.impl(kInfo.name, Forward::kernel<forward<kOperation>>);
    } else if constexpr (kInfo.signature == Signature::kBackward) {
      m.impl(kInfo.name, Backward::kernel<derivative<kOperation>>);
    } else if constexpr (kInfo.signature == Signature::kJvp) {
      m.impl(kInfo.name, Jvp::kernel<jvp<kOperation>>);
    } else if constexpr (kInfo.signature == Signature::kSecondOrder) {
      m.impl(kInfo.name, SecondOrder::kernel<second_order<kOperation>>);
    }
  });
  m.impl(SoftmaxInPlaceOperator::kName, InPlace::kernel<softmax_in_place>);
  m.impl(SinkInPlaceOperator::kName, InPlaceWithSink::kernel<softmax_with_sink_in_place>);
}

}  // namespace masked_softmax
