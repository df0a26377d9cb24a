// The Python module. Importing it registers the operators (torch.ops.masked_softmax_ext).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/version.h>

#if defined(MASKED_SOFTMAX_EXT_WITH_CUDA)
#include <cuda_runtime_api.h>

#include "binding/cuda_ops.h"
#endif
#include "binding/operators.h"
#include "binding/python_calls.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace masked_softmax {
namespace {

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
    constexpr bool kIsReduced = is_reduction(operation.value);
    if constexpr (takes_sink(operation.value)) {
      result.emplace_back(kInfo.sink_name, 1, true, !kIsReduced, true);
    }
    if constexpr (returns_or_takes_row_numbers(kInfo.signature)) {
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
  if (add_python_calls(m.ptr()) != 0) {
    throw py::error_already_set();
  }
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
