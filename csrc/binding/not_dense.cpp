// Rejects tensors that are not dense, with an error that names the kind. torch's own error would list dispatch keys.
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <string>
#include <string_view>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

bool is_dense(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested();
}

// The function that a caller knows: operators with a sink have names of their own.
std::string function_name(const std::string& operator_name) {
  std::string name = operator_name.substr(operator_name.rfind(':') + 1);
  constexpr std::string_view kWithSink = "_with_sink";
  const size_t position = name.find(kWithSink);
  return position == std::string::npos ? name : name.erase(position, kWithSink.size());
}

// "expected ..., but got ...", in the words of check_dense() and check_jagged() in _arguments.py.
std::string message(const std::string& function, const std::string& argument, const at::Tensor& tensor) {
  std::string expected = "a dense tensor";
  std::string kind = tensor.layout() == at::kMkldnn ? "a oneDNN tensor" : "a sparse tensor";
  std::string remedy = argument + ".to_dense() is dense";
  if (tensor.is_quantized()) {
    kind = "a quantized tensor";
    remedy = argument + ".dequantize() is dense";
  } else if (tensor.is_nested()) {
    kind = "a nested tensor";
    remedy = "torch.nested.to_padded_tensor(" + argument + ", 0) is dense";
    if (argument == "input") {
      remedy = "torch.nested.as_nested_tensor(input.unbind(), layout=torch.jagged) is jagged";
      if (function.back() == '_') {  // in place, which takes no jagged tensor
        remedy += ", which masked_softmax_ext." + function.substr(0, function.size() - 1) + "() takes";
      } else {
        expected = "a dense or a jagged tensor";
        kind += " of layout torch.strided";
      }
    }
  }
  if (argument == "out") {
    remedy = "without out= the result is a new dense tensor";
  }
  return c10::str("expected ", argument, " to be ", expected, ", but got ", kind, "; ", remedy);
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const std::string function = function_name(op.schema().name());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, parameters.size());
    TORCH_CHECK_NOT_IMPLEMENTED(!value.isTensor() || is_dense(value.toTensor()), function,
                                "(): ", message(function, parameters[i].name(), value.toTensor()));
  }
  TORCH_INTERNAL_ASSERT(false, function, " of dense tensors came here");
}

void register_all(torch::Library& library) {
  const auto register_one = [&](auto op) {
    library.impl(full_name(op).c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
  };
  for_each_functional_operator(register_one);
  for_each_writing_operator(register_one);
}

}  // namespace

#define MASKED_SOFTMAX_REFUSE(Key) \
  TORCH_LIBRARY_IMPL(masked_softmax_ext, Key, m) { register_all(m); }
MASKED_SOFTMAX_REFUSE(SparseCPU)
MASKED_SOFTMAX_REFUSE(SparseCUDA)
MASKED_SOFTMAX_REFUSE(SparseMeta)
MASKED_SOFTMAX_REFUSE(SparseCsrCPU)
MASKED_SOFTMAX_REFUSE(SparseCsrCUDA)
MASKED_SOFTMAX_REFUSE(SparseCsrMeta)
MASKED_SOFTMAX_REFUSE(MkldnnCPU)
MASKED_SOFTMAX_REFUSE(QuantizedCPU)
MASKED_SOFTMAX_REFUSE(QuantizedCUDA)
MASKED_SOFTMAX_REFUSE(QuantizedMeta)
MASKED_SOFTMAX_REFUSE(NestedTensorCPU)
MASKED_SOFTMAX_REFUSE(NestedTensorCUDA)
MASKED_SOFTMAX_REFUSE(NestedTensorMeta)
#undef MASKED_SOFTMAX_REFUSE

}  // namespace masked_softmax
