// Operators that write to an argument, while torch.jit.trace records them: as the operator that returns its result, and
// a copy of that. The ONNX exporter of TorchScript silently drops an operator that returns nothing.
#include <ATen/TracerMode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <string>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

using torch::jit::Stack;

// The operator that returns what `op` writes.
c10::OperatorHandle functional_operator(const c10::OperatorHandle& op, const Stack& arguments) {
  std::string name = op.schema().name();
  if (name.back() == '_') {
    name.pop_back();
  }
  const auto sink = op.schema().argumentIndexWithName("sink");
  const std::string with_sink = "_with_sink";
  const bool is_named = name.size() > with_sink.size() && name.rfind(with_sink) == name.size() - with_sink.size();
  if (sink.has_value() && !arguments[*sink].isNone() && !is_named) {
    name += with_sink;  // out= takes an optional sink
  }
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

at::Tensor call_functional(const c10::OperatorHandle& op, const Stack& arguments) {
  const c10::FunctionSchema& schema = op.schema();
  const c10::OperatorHandle functional = functional_operator(op, arguments);
  Stack stack;
  for (const c10::Argument& parameter : functional.schema().arguments()) {
    const auto index = schema.argumentIndexWithName(parameter.name());
    stack.push_back(index.has_value() ? arguments[*index] : *parameter.default_value());
    if (parameter.name() == "dtype" && stack.back().isNone() && stack.front().toTensor().is_floating_point()) {
      stack.back() = stack.front().toTensor().scalar_type();  // autocast does not apply to operators that write
    }
  }
  functional.callBoxed(&stack);
  return stack.front().toTensor();
}

void record(const c10::OperatorHandle& op, Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const Stack arguments(stack->end() - static_cast<int64_t>(parameters.size()), stack->end());
  const at::Tensor result = call_functional(op, arguments);
  {
    const at::tracer::impl::NoTracerDispatchMode no_tracer;  // checks the argument that it writes to
    op.callBoxed(stack);
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].name() == "sink_weight") {
      continue;  // the callers that pass it are not recorded
    }
    if (parameters[i].is_out() || (parameters[i].alias_info() != nullptr && parameters[i].alias_info()->isWrite())) {
      arguments[i].toTensor().copy_(result);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Tracer, m) {
  for_each_writing_operator(
      [&](auto op) { m.impl(full_name(op).c_str(), torch::CppFunction::makeFromBoxedFunction<&record>()); });
}

}  // namespace masked_softmax
