// Rejects tensors that are not dense, with an error that names the kind. torch's own error would list dispatch keys.
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <string>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

bool is_dense(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested();
}

// As check_dense() in _arguments.py.
std::string describe(const at::Tensor& tensor, const std::string& argument) {
  std::string kind = tensor.layout() == at::kMkldnn ? "a oneDNN tensor" : "a sparse tensor";
  std::string remedy = argument + ".to_dense() is dense";
  if (tensor.is_quantized()) {
    kind = "a quantized tensor";
    remedy = argument + ".dequantize() is dense";
  } else if (tensor.is_nested()) {
    kind = "a nested tensor";
    remedy = argument == "input"
                 ? "torch.nested.as_nested_tensor(input.unbind(), layout=torch.jagged) is jagged, which "
                   "masked_softmax() takes"
                 : "torch.nested.to_padded_tensor(" + argument + ", 0) is dense";
  }
  return kind + "; " + (argument == "out" ? "without out= the result is a new dense tensor" : remedy);
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const std::string name = op.schema().name();
  for (size_t i = 0; i < parameters.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, parameters.size());
    TORCH_CHECK_NOT_IMPLEMENTED(!value.isTensor() || is_dense(value.toTensor()), name.substr(name.rfind(':') + 1),
                                "(): expected ", parameters[i].name(), " to be a dense tensor, but got ",
                                describe(value.toTensor(), parameters[i].name()));
  }
  TORCH_INTERNAL_ASSERT(false, name, " of dense tensors came here");
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
