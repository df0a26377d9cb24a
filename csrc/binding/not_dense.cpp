// The operators on tensors that are not dense: they say so, where torch would list its dispatch keys.
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

std::string describe(const at::Tensor& tensor) {
  if (tensor.is_quantized()) {
    return "a quantized one; its dequantize() gives a dense one";
  }
  if (tensor.is_nested()) {
    return "a nested one; torch.nested.to_padded_tensor() gives a dense one";
  }
  const char* const kind = tensor.layout() == at::kMkldnn ? "one of oneDNN's" : "a sparse one";
  return std::string(kind) + "; its to_dense() gives a dense one";
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const std::string name = op.schema().name();
  for (size_t i = 0; i < parameters.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, parameters.size());
    TORCH_CHECK_NOT_IMPLEMENTED(!value.isTensor() || is_dense(value.toTensor()), name.substr(name.rfind(':') + 1),
                                "(): expected ", parameters[i].name(), " to be a dense tensor, but got ",
                                describe(value.toTensor()));
  }
  TORCH_INTERNAL_ASSERT(false, name, " of dense tensors came here");
}

void register_all(torch::Library& library) {
  for (const char* name :
       {"masked_softmax", "masked_softmax.out", "masked_softmax_", "masked_log_softmax", "masked_log_softmax.out",
        "masked_softmax_backward", "masked_log_softmax_backward", "masked_log_softmax_jvp"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
  for (const char* name : kSecondOrderNames) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, SparseCPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, SparseCUDA, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, SparseMeta, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, SparseCsrCPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, SparseCsrCUDA, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, SparseCsrMeta, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, MkldnnCPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, QuantizedCPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, QuantizedCUDA, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, QuantizedMeta, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, NestedTensorCPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, NestedTensorCUDA, m) { register_all(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, NestedTensorMeta, m) { register_all(m); }

}  // namespace masked_softmax
