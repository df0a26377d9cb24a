// Derivatives in reverse and forward mode: of the two functions, and of their first derivatives. So all second
// derivatives exist in every mode; third derivatives do not.
//
// A forward node saves its output, lengths and starts, nothing else. Writes are counted one level below (in_place.cpp).
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "binding/autograd_node.h"

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

// d(a, y), of type dtype; but a jvp always has y's type.
template <Operation kOperation>
at::Tensor call_derivative(const at::Tensor& a, const at::Tensor& y, const RowArguments& rows, at::ScalarType dtype,
                           OptionalInt packed) {
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
    [](const CallView& c, const at::Tensor& grad, const variable_list& saved, const std::vector<bool>&) {
      return variable_list{call<DerivativesOf<kForward>::kBackward>(grad, saved[0], c.rows(), c.input_dtype, c.packed)};
    }};

template <Operation kDerivative>
constexpr GradientFormula kDerivativeFormula = {
    DerivativesOf<kDerivative>::kNodeName, 2,
    // saved: a, output
    [](const CallView& c, const at::Tensor& grad, const variable_list& saved, const std::vector<bool>& is_needed) {
      using D = DerivativesOf<kDerivative>;
      constexpr bool kIsBackward = info_of(kDerivative).signature == Signature::kBackward;
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

at::Tensor tangent_of(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0); }

bool has_tangent(const at::Tensor& tensor) { return tangent_of(tensor).defined(); }

at::Tensor primal_of(const at::Tensor& tensor) { return has_tangent(tensor) ? tensor._fw_primal(/*level=*/0) : tensor; }

void set_tangent(const at::Tensor& tensor, const at::Tensor& tangent, bool is_in_place) {
  tensor._set_fw_grad(tangent, /*level=*/0, is_in_place);
}

CallView view_of(const RowArguments& rows, OptionalInt packed, at::ScalarType input_dtype) {
  return {{rows.dim, rows.scale, packed, input_dtype}, rows.lengths, rows.starts};
}

template <Operation kForward>
at::Tensor forward(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                   OptionalInt packed) {
  at::Tensor output;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = call<kForward>(input, rows, dtype, validate, packed);
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
                      OptionalInt packed) {
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
at::Tensor jvp(const at::Tensor& tangent, const at::Tensor& output, const RowArguments& rows, OptionalInt packed) {
  return derivative<kJvp>(tangent, output, rows, output.scalar_type(), packed);
}

template <Operation kForward>
void forward_out(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                 at::Tensor& out) {
  constexpr const char* kName = info_of(kForward).name;
  TORCH_CHECK(!torch::autograd::compute_requires_grad(input, out), kName,
              "(): functions with out=... arguments don't support automatic differentiation, but one of the arguments "
              "requires grad.");
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(input) && !has_tangent(out), kName,
                              "(): functions with out=... arguments don't support forward-mode differentiation, but "
                              "one of the arguments has a tangent.");
  const at::AutoDispatchBelowAutograd below_autograd;  // in_place.cpp is next
  call_operator<OutOperator<kForward>>(input, rows, dtype, validate, out);
}

void softmax_in_place(at::Tensor& input, const RowArguments& rows, bool validate) {
  torch::autograd::check_inplace(input, torch::autograd::compute_requires_grad(input));
  const CallView view = view_of(rows, std::nullopt, input.scalar_type());
  OperatorNode::Pointer owner;
  // Whatever can fail comes before the write: saving lengths, and allocating memory for the tangent.
  OperatorNode* const node = OperatorNode::create(kForwardFormula<Operation::kSoftmax>, view, {&input}, owner);
  at::Tensor tangent;
  if (has_tangent(input)) {
    const at::Tensor primal = primal_of(input);
    const at::Tensor y = call<Operation::kSoftmax>(primal, rows, primal.scalar_type(), validate, std::nullopt);
    tangent = call<Operation::kSoftmaxBackward>(tangent_of(input), y, rows, y.scalar_type(), std::nullopt);
  }
  {
    const at::AutoDispatchBelowAutograd below_autograd;  // in_place.cpp is next
    call_operator<SoftmaxInPlaceOperator>(input, rows, validate);
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

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Autograd, m) {
  for_each_operation([&](auto operation) {
    constexpr Operation kOperation = operation.value;
    constexpr OperationInfo kInfo = info_of(kOperation);
    if constexpr (kInfo.signature == Signature::kForward) {
      m.impl(full_name(OutOperator<kOperation>()).c_str(), ForwardOut::kernel<forward_out<kOperation>>);
    }
    if constexpr (DerivativesOf<kOperation>::kNodeName == nullptr) {
      m.impl(kInfo.name, torch::autograd::autogradNotImplementedFallback());
    } else if constexpr (kInfo.signature == Signature::kForward) {
      m.impl(kInfo.name, Forward::kernel<forward<kOperation>>);
    } else if constexpr (kInfo.signature == Signature::kBackward) {
      m.impl(kInfo.name, Backward::kernel<derivative<kOperation>>);
    } else {
      static_assert(kInfo.signature == Signature::kJvp, "second derivatives have no derivatives of their own");
      m.impl(kInfo.name, Jvp::kernel<jvp<kOperation>>);
    }
  });
  m.impl(SoftmaxInPlaceOperator::kName, InPlace::kernel<softmax_in_place>);
}

}  // namespace masked_softmax
