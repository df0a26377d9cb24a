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

// The derivatives of a forward operation. Formulas: common/formulas.h.
template <Operation kForward>
struct DerivativesOf;

template <>
struct DerivativesOf<Operation::kSoftmax> {
  static constexpr auto kBackward = Operation::kSoftmaxBackward;
  static constexpr auto kJvp = Operation::kSoftmaxBackward;  // the Jacobian is symmetric
  static constexpr auto kBackwardWrtY = Operation::kSoftmaxBackwardWrtY;
  static constexpr auto kBackwardJvpWrtY = Operation::kSoftmaxBackwardJvpWrtY;
  static constexpr const char* kNodeName = "MaskedSoftmaxExtBackward";
  static constexpr const char* kBackwardNodeName = "MaskedSoftmaxExtBackwardBackward";
};

template <>
struct DerivativesOf<Operation::kLogSoftmax> {
  static constexpr auto kBackward = Operation::kLogSoftmaxBackward;
  static constexpr auto kJvp = Operation::kLogSoftmaxJvp;
  static constexpr auto kBackwardWrtY = Operation::kLogSoftmaxBackwardWrtY;
  static constexpr auto kBackwardJvpWrtY = Operation::kLogSoftmaxBackwardWrtY;  // it is diagonal
  static constexpr const char* kNodeName = "MaskedLogSoftmaxExtBackward";
  static constexpr const char* kBackwardNodeName = "MaskedLogSoftmaxExtBackwardBackward";
};

// The jvp of `kOperation`'s family: the tangent of the output y from a tangent of the input. It has y's type.
template <Operation kJvp>
at::Tensor call_jvp(const SavedCall& c, const at::Tensor& tangent, const at::Tensor& y) {
  if constexpr (info_of(kJvp).signature == Signature::kBackward) {
    return call<kJvp>(tangent, y, c.rows(), y.scalar_type(), c.packed);
  } else {
    return call<kJvp>(tangent, y, c.rows(), c.packed);
  }
}

template <Operation kForward>
constexpr GradientFormula kForwardFormula = {
    DerivativesOf<kForward>::kNodeName, 1,
    // saved: output
    [](const SavedCall& c, const at::Tensor& grad, const variable_list& saved, const std::vector<bool>&) {
      return variable_list{call<DerivativesOf<kForward>::kBackward>(grad, saved[0], c.rows(), c.input_dtype, c.packed)};
    }};

template <Operation kForward>
constexpr GradientFormula kBackwardFormula = {
    DerivativesOf<kForward>::kBackwardNodeName, 2,
    // saved: grad_output, output
    [](const SavedCall& c, const at::Tensor& grad, const variable_list& saved, const std::vector<bool>& is_needed) {
      using D = DerivativesOf<kForward>;
      const at::Tensor& g = saved[0];
      const at::Tensor& y = saved[1];
      variable_list result(2);
      if (is_needed[0]) {
        // The transposed Jacobian of backward in g is that of the jvp.
        if constexpr (D::kJvp == D::kBackward) {
          result[0] = call<D::kBackward>(grad, y, c.rows(), g.scalar_type(), c.packed);
        } else {
          result[0] = call<D::kJvp>(grad, y, c.rows(), c.packed);
        }
      }
      if (is_needed[1]) {
        result[1] = call<D::kBackwardWrtY>(grad, g, y, c.rows(), c.packed);
      }
      return result;
    }};

constexpr GradientFormula kLogSoftmaxJvpFormula = {
    "MaskedLogSoftmaxExtJvpBackward", 2,
    // saved: tangent, output
    [](const SavedCall& c, const at::Tensor& grad, const variable_list& saved, const std::vector<bool>& is_needed) {
      const at::Tensor& tangent = saved[0];
      const at::Tensor& y = saved[1];
      variable_list result(2);
      if (is_needed[0]) {
        result[0] = call<Operation::kLogSoftmaxBackward>(grad, y, c.rows(), tangent.scalar_type(), c.packed);
      }
      if (is_needed[1]) {
        result[1] = call<Operation::kLogSoftmaxBackwardWrtY>(tangent, grad, y, c.rows(), c.packed);
      }
      return result;
    }};

// The history of the result of an operator that takes two tensors.
void set_history(const at::Tensor& result, const GradientFormula& formula, const SavedCall& call,
                 const at::Tensor& first, const at::Tensor& second) {
  OperatorNode::Pointer owner;
  if (OperatorNode* node = OperatorNode::create(formula, call, {&first, &second}, owner)) {
    node->save(first);
    node->save(second);
    torch::autograd::set_history(result, owner);
  }
}

at::Tensor tangent_of(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0); }

bool has_tangent(const at::Tensor& tensor) { return tangent_of(tensor).defined(); }

at::Tensor primal_of(const at::Tensor& tensor) { return has_tangent(tensor) ? tensor._fw_primal(/*level=*/0) : tensor; }

void set_tangent(const at::Tensor& tensor, const at::Tensor& tangent, bool is_in_place) {
  tensor._set_fw_grad(tangent, /*level=*/0, is_in_place);
}

// The tangent of the result of an operator that takes two tensors: the sum of along_first(tangent of first, second) and
// along_second(tangent of second, first), for those that have one.
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

SavedCall saved_call(const RowArguments& rows, OptionalInt packed, at::ScalarType input_dtype) {
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
  const SavedCall saved = saved_call(rows, packed, input.scalar_type());
  OperatorNode::Pointer owner;
  OperatorNode* const node = OperatorNode::create(kForwardFormula<kForward>, saved, {&input}, owner);
  if (node != nullptr) {
    torch::autograd::set_history(output, owner);
  }
  if (has_tangent(input)) {
    set_tangent(output, call_jvp<DerivativesOf<kForward>::kJvp>(saved, tangent_of(input), output),
                /*is_in_place=*/false);
  }
  if (node != nullptr) {
    node->save_output(output, /*is_in_place=*/false);
  }
  return output;
}

template <Operation kForward>
at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, const RowArguments& rows,
                    at::ScalarType input_dtype, OptionalInt packed) {
  using D = DerivativesOf<kForward>;
  const auto compute = [&](const at::Tensor& g, const at::Tensor& y) {
    return call<D::kBackward>(g, y, rows, input_dtype, packed);
  };
  at::Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = compute(grad_output, output);
  }
  set_history(result, kBackwardFormula<kForward>, saved_call(rows, packed, result.scalar_type()), grad_output, output);
  set_tangent_of(result, grad_output, output, compute, [&](const at::Tensor& tangent, const at::Tensor& g) {
    return call<D::kBackwardJvpWrtY>(tangent, g, primal_of(output), rows, packed);
  });
  return result;
}

at::Tensor log_softmax_jvp(const at::Tensor& tangent, const at::Tensor& output, const RowArguments& rows,
                           OptionalInt packed) {
  const auto compute = [&](const at::Tensor& v, const at::Tensor& y) {
    return call<Operation::kLogSoftmaxJvp>(v, y, rows, packed);
  };
  at::Tensor result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = compute(tangent, output);
  }
  set_history(result, kLogSoftmaxJvpFormula, saved_call(rows, packed, result.scalar_type()), tangent, output);
  set_tangent_of(result, tangent, output, compute, [&](const at::Tensor& along, const at::Tensor& u) {
    return call<Operation::kLogSoftmaxJvpJvpWrtY>(along, u, primal_of(output), rows, packed);
  });
  return result;
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
  const at::AutoDispatchBelowAutograd below_autograd;
  call_operator<OutOperator<kForward>>(input, rows, dtype, validate, out);
}

void softmax_in_place(at::Tensor& input, const RowArguments& rows, bool validate) {
  torch::autograd::check_inplace(input, torch::autograd::compute_requires_grad(input));
  const SavedCall saved = saved_call(rows, std::nullopt, input.scalar_type());
  OperatorNode::Pointer owner;
  // Whatever can fail comes before the write: saving lengths, and allocating memory for the tangent.
  OperatorNode* const node = OperatorNode::create(kForwardFormula<Operation::kSoftmax>, saved, {&input}, owner);
  at::Tensor tangent;
  if (has_tangent(input)) {
    const at::Tensor primal = primal_of(input);
    const at::Tensor y = call<Operation::kSoftmax>(primal, rows, primal.scalar_type(), validate, std::nullopt);
    tangent = call_jvp<Operation::kSoftmaxBackward>(saved, tangent_of(input), y);
  }
  {
    const at::AutoDispatchBelowAutograd below_autograd;
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

template <Operation kForward>
void register_family(torch::Library& library) {
  library.impl(info_of(kForward).name, Forward::kernel<forward<kForward>>);
  library.impl(full_name(OutOperator<kForward>()).c_str(), ForwardOut::kernel<forward_out<kForward>>);
  library.impl(info_of(DerivativesOf<kForward>::kBackward).name, Backward::kernel<backward<kForward>>);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Autograd, m) {
  register_family<Operation::kSoftmax>(m);
  register_family<Operation::kLogSoftmax>(m);
  m.impl(SoftmaxInPlaceOperator::kName, InPlace::kernel<softmax_in_place>);
  m.impl(info_of(Operation::kLogSoftmaxJvp).name, Jvp::kernel<log_softmax_jvp>);
  for (Operation operation : kOperations) {
    if (info_of(operation).signature == Signature::kSecondOrder) {
      m.impl(info_of(operation).name, torch::autograd::autogradNotImplementedFallback());
    }
  }
}

}  // namespace masked_softmax
