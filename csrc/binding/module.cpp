// The Python module. Importing it registers the operators (torch.ops.masked_softmax_ext). Its functions call them
// directly: Python's operator objects would double the cost of a small call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#if defined(MASKED_SOFTMAX_EXT_WITH_CUDA)
#include <cuda_runtime_api.h>

#include "binding/cuda_ops.h"
#endif
#include "binding/operators.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace masked_softmax {
namespace {

using PythonSoftmax = OperatorSignature<at::Tensor, Scores<const at::Tensor&>, OptionalType, bool, OptionalTensor>;
using PythonLogSoftmax =
    OperatorSignature<at::Tensor, Scores<const at::Tensor&>, OptionalDouble, OptionalType, bool, OptionalTensor>;
using PythonInPlace = OperatorSignature<at::Tensor, Scores<at::Tensor>, bool>;

// torch.jit.trace follows sizes as 0-dim tensors, which are on the CPU wherever the scores are.
OptionalTensor traced_to_device(const OptionalTensor& bounds, const at::Tensor& input) {
  return bounds.has_value() && bounds->dim() == 0 ? bounds->to(input.device()) : bounds;
}

template <Operation kOperation>
at::Tensor forward(const at::Tensor& input, const RowArguments& rows, OptionalDouble padding_value, OptionalType dtype,
                   bool validate, OptionalTensor out) {
  if (out.has_value()) {
    call_operator<OutOperator<kOperation>>(input, rows, std::nullopt, padding_value, dtype, validate, *out);
    return *out;
  }
  if (C10_UNLIKELY(torch::jit::tracer::isTracing())) {
    const OptionalTensor lengths = traced_to_device(rows.lengths, input);
    const OptionalTensor starts = traced_to_device(rows.starts, input);
    return call<kOperation>(input, RowArguments{lengths, rows.dim, starts, rows.scale}, padding_value, dtype, validate,
                            std::nullopt);
  }
  return call<kOperation>(input, rows, padding_value, dtype, validate, std::nullopt);
}

at::Tensor softmax(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                   OptionalTensor out) {
  return forward<Operation::kSoftmax>(input, rows, std::nullopt, dtype, validate, std::move(out));
}

at::Tensor softmax_in_place(at::Tensor input, const RowArguments& rows, bool validate) {
  call_operator<SoftmaxInPlaceOperator>(input, rows, validate);
  return input;
}

// (name, number of score-shaped tensors that it takes first) of every operator that returns a new tensor of their
// shape, and takes no number a row.
std::vector<std::pair<std::string, int>> operations() {
  std::vector<std::pair<std::string, int>> result;
  for (Operation operation : kOperations) {
    result.emplace_back(info_of(operation).name, input_count(operation));
  }
  return result;
}

// Of every other operator that returns new tensors: (name, number of score-shaped tensors that it takes first, whether
// a tensor of one number a row follows, whether it returns one of the scores' shape, whether one of the rows').
std::vector<std::tuple<std::string, int, bool, bool, bool>> row_operations() {
  std::vector<std::tuple<std::string, int, bool, bool, bool>> result;
  for_each_operation([&](auto operation) {
    constexpr OperationInfo kInfo = info_of(operation.value);
    if constexpr (has_variants(operation.value)) {
      result.emplace_back(kInfo.sink_name, 1, true, true, true);
    } else if constexpr (returns_or_takes_row_numbers(kInfo.signature)) {
      constexpr bool kIsReduced = is_reduction(operation.value);
      result.emplace_back(kInfo.name, input_count(operation.value), !kIsReduced, !kIsReduced, kIsReduced);
    }
  });
  return result;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(MASKED_SOFTMAX_EXT_WITH_CUDA)
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_architectures"] = MASKED_SOFTMAX_EXT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = __cplusplus / 100 % 100;
  py::list capabilities;
  for (const CpuCapability& capability : compiled_cpu_capabilities()) {
    capabilities.append(capability.name);
  }
  info["cpu_capabilities"] = capabilities;
  return info;
}

std::vector<std::string> supported_capability_names() {
  std::vector<std::string> names;
  for (const CpuCapability& capability : supported_cpu_capabilities()) {
    names.emplace_back(capability.name);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of masked_softmax_ext; see masked_softmax_ext.functional for its functions.";
  // torch's translator belongs to torch's copy of pybind11, and another version of pybind11 does not see it. A
  // python_error is a Python exception that passes through torch, raised by a saved-tensor hook or a dispatch mode.
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(error);
    } catch (const python_error&) {
      torch::translate_exception_to_python(error);
    }
  });
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("masked_softmax", PythonSoftmax::kernel<softmax>, no_gil);
  m.def("masked_log_softmax", PythonLogSoftmax::kernel<forward<Operation::kLogSoftmax>>, no_gil);
  m.def("masked_softmax_", PythonInPlace::kernel<softmax_in_place>, no_gil);
  m.def("operations", operations);
  m.def("row_operations", row_operations);
  m.def("build_info", build_info);
  m.def("cpu_capability", [] { return cpu_capability().name; });
  m.def("cpu_capabilities", supported_capability_names);
  m.def("set_cpu_capability", set_cpu_capability);
#if defined(MASKED_SOFTMAX_EXT_WITH_CUDA)
  m.def("set_cuda_strategy", set_cuda_strategy);
  m.def("last_cuda_strategy", last_cuda_strategy);
#endif
}

}  // namespace masked_softmax
