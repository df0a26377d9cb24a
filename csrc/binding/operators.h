// The operators' C++ signatures and schemas, and typed calls of them through torch's dispatcher.
//
// A map of csrc/binding, in the order in which a call passes through it:
//
//   module, python_calls                  the Python module; its functions that call the operators
//   operators.h, schema.cpp               signatures and schemas of the operators
//   tracer, autocast, autograd, in_place, negative, not_dense   one file for each dispatch key that wraps the operators
//   autograd_rows                         autograd's part for operators that return or take a number a row
//   autograd_node, compiled_autograd      the node of the autograd graph
//   device_ops.h                          every operator on a device: check, allocate, compute
//   cpu_ops, cuda_ops, meta_ops, without_cuda           the devices
//   writes.h                              what in_place and negative share
//   checks, overlap                       checks of the arguments
//   make_problem                          tensors to the Problem that the kernels take
//   threads                               torch's threads
//
// Every operator takes its score-shaped tensors first, then the row arguments, then its options. `output` is the saved
// result of the forward pass. `packed` is None for padded rows. For packed rows, which lie end to end in dimension
// `dim`, it is an upper bound of their lengths, or negative if the bound is unknown; lengths and starts are then
// one-dimensional, one element a row. Operators that write to an argument return nothing: torch cannot functionalize a
// custom operator that returns the argument it writes to.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "common/operation.h"

namespace masked_softmax {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalScale = std::optional<double>;
using OptionalDouble = std::optional<double>;
using OptionalType = std::optional<at::ScalarType>;
using OptionalSymInt = std::optional<c10::SymInt>;

// An argument that every operator takes is added here, in OperatorSignature and in the schemas below; in
// autograd_node.h, which keeps it for the backward pass; and in compiled_autograd.cpp, whose cache key it belongs to.
struct RowArguments {
  const OptionalTensor& lengths;  // nullopt: every row has every column
  int64_t dim;
  const OptionalTensor& starts;
  OptionalScale scale;
};

template <class... Tensors>
struct Scores {};

// Converts between the flat argument list of the dispatcher and functions of (scores..., rows, options...).
template <class Result, class ScoreTypes, class... Options>
struct OperatorSignature;

template <class Result, class... Tensors, class... Options>
struct OperatorSignature<Result, Scores<Tensors...>, Options...> {
  using Function = Result(Tensors..., const OptionalTensor& lengths, int64_t dim, const OptionalTensor& starts,
                          OptionalScale scale, Options...);
  using Handle = c10::TypedOperatorHandle<Function>;

  static Result call(const Handle& handle, Tensors... scores, const RowArguments& rows, Options... options) {
    return handle.call(scores..., rows.lengths, rows.dim, rows.starts, rows.scale, options...);
  }

  // The kernel to register: `function` with the dispatcher's argument list.
  template <Result (*function)(Tensors..., const RowArguments&, Options...)>
  static Result kernel(Tensors... scores, const OptionalTensor& lengths, int64_t dim, const OptionalTensor& starts,
                       OptionalScale scale, Options... options) {
    return function(scores..., RowArguments{lengths, dim, starts, scale}, options...);
  }
};

#define MASKED_SOFTMAX_FORWARD_ROWS "Tensor? lengths=None, int dim=-1, Tensor? starts=None, *, float? scale=None"
#define MASKED_SOFTMAX_DERIVATIVE_ROWS "Tensor? lengths, int dim, Tensor? starts, float? scale"
using InputTensor = const at::Tensor&;

struct Forward
    : OperatorSignature<at::Tensor, Scores<InputTensor>, OptionalDouble, OptionalType, bool, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor input, " MASKED_SOFTMAX_FORWARD_ROWS
      ", float? padding_value=None, ScalarType? dtype=None, bool validate=False, SymInt? packed=None) -> Tensor";
};
// sink_weight: exp(sink - L) of each row, where L is its logsumexp, sink included.
struct ForwardWithSink : OperatorSignature<std::tuple<at::Tensor, at::Tensor>, Scores<InputTensor, InputTensor>,
                                           OptionalDouble, OptionalType, bool, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor input, Tensor sink, " MASKED_SOFTMAX_FORWARD_ROWS
      ", float? padding_value=None, ScalarType? dtype=None, bool validate=False, SymInt? packed=None)"
      " -> (Tensor output, Tensor sink_weight)";
};
struct ForwardOut : OperatorSignature<void, Scores<InputTensor>, const OptionalTensor&, OptionalDouble, OptionalType,
                                      bool, at::Tensor&> {
  static constexpr const char* kSchema =
      "(Tensor input, " MASKED_SOFTMAX_FORWARD_ROWS
      ", Tensor? sink=None, float? padding_value=None, ScalarType? dtype=None, bool validate=False, Tensor(a!) out)"
      " -> ()";
};
struct InPlace : OperatorSignature<void, Scores<at::Tensor&>, bool> {
  static constexpr const char* kSchema =
      "(Tensor(a!) input, " MASKED_SOFTMAX_FORWARD_ROWS ", bool validate=False) -> ()";
};
// Also writes the weights of the sinks, where it gets a tensor for them. They are no option, because torch.vmap does
// not batch those.
struct InPlaceWithSink : OperatorSignature<void, Scores<at::Tensor&, InputTensor, const OptionalTensor&>, bool> {
  static constexpr const char* kSchema =
      "(Tensor(a!) input, Tensor sink, Tensor(b!)? sink_weight, " MASKED_SOFTMAX_FORWARD_ROWS
      ", bool validate=False) -> ()";
};
struct Reduction : OperatorSignature<at::Tensor, Scores<InputTensor>, OptionalType, bool, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor input, " MASKED_SOFTMAX_FORWARD_ROWS
      ", ScalarType? dtype=None, bool validate=False, SymInt? packed=None) -> Tensor";
};
struct ReductionWithSink
    : OperatorSignature<at::Tensor, Scores<InputTensor, InputTensor>, OptionalType, bool, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor input, Tensor sink, " MASKED_SOFTMAX_FORWARD_ROWS
      ", ScalarType? dtype=None, bool validate=False, SymInt? packed=None) -> Tensor";
};
struct RowDot : OperatorSignature<at::Tensor, Scores<InputTensor, InputTensor>, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor a, Tensor b, " MASKED_SOFTMAX_DERIVATIVE_ROWS ", SymInt? packed=None) -> Tensor";
};
struct RowScale : OperatorSignature<at::Tensor, Scores<InputTensor, InputTensor>, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor a, Tensor factor, " MASKED_SOFTMAX_DERIVATIVE_ROWS ", SymInt? packed=None) -> Tensor";
};
struct Backward : OperatorSignature<at::Tensor, Scores<InputTensor, InputTensor>, at::ScalarType, OptionalSymInt> {
  static constexpr const char* kSchema = "(Tensor grad_output, Tensor output, " MASKED_SOFTMAX_DERIVATIVE_ROWS
                                         ", ScalarType input_dtype, SymInt? packed=None) -> Tensor";
};
struct Jvp : OperatorSignature<at::Tensor, Scores<InputTensor, InputTensor>, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor tangent, Tensor output, " MASKED_SOFTMAX_DERIVATIVE_ROWS ", SymInt? packed=None) -> Tensor";
};
struct SecondOrder : OperatorSignature<at::Tensor, Scores<InputTensor, InputTensor, InputTensor>, OptionalSymInt> {
  static constexpr const char* kSchema =
      "(Tensor tangent, Tensor grad_output, Tensor output, " MASKED_SOFTMAX_DERIVATIVE_ROWS
      ", SymInt? packed=None) -> Tensor";
};
#undef MASKED_SOFTMAX_FORWARD_ROWS
#undef MASKED_SOFTMAX_DERIVATIVE_ROWS

template <Operation kOperation>
struct SignatureOf;
#define MASKED_SOFTMAX_OPERATION(Name, name, Signature, Kernels) \
  template <>                                                    \
  struct SignatureOf<Operation::k##Name> {                       \
    using Type = Signature;                                      \
  };
#include "common/operations.inc"
#include "common/row_operations.inc"
#undef MASKED_SOFTMAX_OPERATION

// The operator of an operation.
template <Operation kOperation>
struct FunctionalOperator {
  static constexpr const char* kName = info_of(kOperation).name;
  static constexpr const char* kOverload = "";
  using Signature = typename SignatureOf<kOperation>::Type;
};

// Whether it is softmax, log_softmax or logsumexp, which have operators with a sink.
constexpr bool takes_sink(Operation operation) { return is_forward(operation); }

// Whether it is softmax or log_softmax, which have overloads with out=.
constexpr bool has_out_overload(Operation operation) { return info_of(operation).signature == Signature::kForward; }

template <Operation kOperation>
struct SinkOperator {
  static constexpr const char* kName = info_of(kOperation).sink_name;
  static constexpr const char* kOverload = "";
  using Signature = std::conditional_t<is_reduction(kOperation), ReductionWithSink, ForwardWithSink>;
};

template <Operation kOperation>
struct OutOperator {
  static constexpr const char* kName = FunctionalOperator<kOperation>::kName;
  static constexpr const char* kOverload = "out";
  using Signature = ForwardOut;
};

struct SoftmaxInPlaceOperator {
  static constexpr const char* kName = "masked_softmax_";
  static constexpr const char* kOverload = "";
  using Signature = InPlace;
};

struct SinkInPlaceOperator {
  static constexpr const char* kName = "masked_softmax_with_sink_";
  static constexpr const char* kOverload = "";
  using Signature = InPlaceWithSink;
};

// Calls visit(op) with an object of every type of operator that returns a new tensor.
template <class Visitor>
void for_each_functional_operator(const Visitor& visit) {
  for_each_operation([&](auto operation) {
    visit(FunctionalOperator<operation.value>());
    if constexpr (takes_sink(operation.value)) {
      visit(SinkOperator<operation.value>());
    }
  });
}

// The same for every operator that writes to an argument.
template <class Visitor>
void for_each_writing_operator(const Visitor& visit) {
  for_each_operation([&](auto operation) {
    if constexpr (has_out_overload(operation.value)) {
      visit(OutOperator<operation.value>());
    }
  });
  visit(SoftmaxInPlaceOperator());
  visit(SinkInPlaceOperator());
}

// As torch::Library names it: masked_softmax, masked_softmax.out.
template <class Operator>
std::string full_name(Operator /*op*/) {
  return *Operator::kOverload == '\0' ? Operator::kName : std::string(Operator::kName) + "." + Operator::kOverload;
}

// The operator's handle, looked up once.
template <class Operator>
const typename Operator::Signature::Handle& handle_of() {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow((std::string("masked_softmax_ext::") + Operator::kName).c_str(), Operator::kOverload)
          .template typed<typename Operator::Signature::Function>();
  return handle;
}

// Calls an operator with (scores..., rows, options...), through the dispatcher.
template <class Operator, class... Arguments>
auto call_operator(Arguments&&... arguments) {
  return Operator::Signature::call(handle_of<Operator>(), std::forward<Arguments>(arguments)...);
}
template <Operation kOperation, class... Arguments>
at::Tensor call(Arguments&&... arguments) {
  return call_operator<FunctionalOperator<kOperation>>(std::forward<Arguments>(arguments)...);
}
template <Operation kOperation, class... Arguments>
auto call_with_sink(Arguments&&... arguments) {
  return call_operator<SinkOperator<kOperation>>(std::forward<Arguments>(arguments)...);
}

}  // namespace masked_softmax
