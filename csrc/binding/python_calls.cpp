// The operators' Python functions for plain arguments: tensors and parameters of no subclass, None, and Python's own
// numbers and bools. For any other arguments they return NotImplemented: functional.py then converts them.
//
// They call the operators directly and parse their arguments themselves: Python's operator objects would double the
// time of a small call, and pybind11 would add a fifth.
#include "binding/python_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <new>

#include "binding/checks.h"
#include "binding/operators.h"

namespace masked_softmax {
namespace {

// Each parse() returns whether the object is plain, and sets `value` then.
bool parse(PyObject* object, at::Tensor& value) {
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  value = THPVariable_Unpack(object);
  return true;
}

bool parse(PyObject* object, int64_t& value) {
  int overflow = 0;
  value = PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
  return PyLong_CheckExact(object) && overflow == 0;
}

bool parse(PyObject* object, bool& value) {
  value = object == Py_True;
  return PyBool_Check(object);
}

bool parse(PyObject* object, double& value) {
  if (PyLong_CheckExact(object)) {
    value = PyLong_AsDouble(object);
    if (PyErr_Occurred() == nullptr) {
      return true;
    }
    PyErr_Clear();  // beyond the largest double
    return false;
  }
  value = PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object) : 0;
  return PyFloat_CheckExact(object);
}

bool parse(PyObject* object, at::ScalarType& value) {
  if (!THPDtype_Check(object)) {
    return false;
  }
  value = reinterpret_cast<THPDtype*>(object)->scalar_type;
  return true;
}

bool parse(PyObject* object, std::nullopt_t /*value*/) { return object == Py_None; }

template <class T>
bool parse(PyObject* object, std::optional<T>& value) {
  return object == Py_None || parse(object, value.emplace());
}

// The arguments that every function takes first.
struct Call {
  at::Tensor input;
  OptionalTensor lengths;
  int64_t dim = 0;
  OptionalTensor starts;
  OptionalScale scale;

  RowArguments rows() const { return {lengths, dim, starts, scale}; }
};

template <class... Values>
bool parse_each(PyObject* const* objects, Py_ssize_t count, Values&&... values) {
  TORCH_CHECK_TYPE(count == sizeof...(values), "expected ", sizeof...(values), " arguments, but got ", count);
  return (parse(*objects++, values) && ...);
}

// Parses a call, a sink, which must be None, and the options. Returns whether all are plain. A TorchFunctionMode must
// see the call; torch.jit.trace follows sizes as tensors, which functional.py moves to the scores' device.
template <class... Options>
bool parse_arguments(PyObject* const* objects, Py_ssize_t count, Call& call, Options&... options) {
  return !at::impl::torch_function_mode_enabled() && !torch::jit::tracer::isTracing() &&
         parse_each(objects, count, call.input, call.lengths, call.dim, call.starts, call.scale, std::nullopt,
                    options...);
}

class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ~ReleaseGil() { PyEval_RestoreThread(state_); }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* const state_;
};

// Runs `body` and turns an exception into a Python error, also where the memory for its message is missing.
template <class Body>
PyObject* with_python_errors(const Body& body) noexcept {
  try {
    try {
      return body();
    } catch (const std::exception&) {
      torch::translate_exception_to_python(std::current_exception());
      return nullptr;
    }
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

template <Operation kOperation>
PyObject* forward(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors([&]() -> PyObject* {
    Call given;
    OptionalDouble padding_value;
    OptionalType dtype;
    bool validate = false;
    OptionalTensor out;
    if (!parse_arguments(arguments, count, given, padding_value, dtype, validate, out)) {
      Py_RETURN_NOTIMPLEMENTED;
    }
    at::Tensor result;
    {
      const ReleaseGil release_gil;
      if (out.has_value()) {
        result = *out;
        call_operator<OutOperator<kOperation>>(given.input, given.rows(), std::nullopt, padding_value, dtype, validate,
                                               result);
      } else {
        result = call<kOperation>(given.input, given.rows(), padding_value, dtype, validate, std::nullopt);
      }
    }
    return THPVariable_Wrap(std::move(result));
  });
}

PyObject* softmax_in_place(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors([&]() -> PyObject* {
    Call given;
    bool validate = false;
    if (!parse_arguments(arguments, count, given, validate)) {
      Py_RETURN_NOTIMPLEMENTED;
    }
    {
      const ReleaseGil release_gil;
      call_operator<SoftmaxInPlaceOperator>(given.input, given.rows(), validate);
    }
    return THPVariable_Wrap(std::move(given.input));
  });
}

// check_storage(tensor, name), for functions in Python that call torch's own operators.
PyObject* check_storage_of(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors([&]() -> PyObject* {
    TORCH_CHECK_TYPE(count == 2 && THPVariable_Check(arguments[0]) && PyUnicode_Check(arguments[1]),
                     "expected a tensor and a name");
    const char* const name = PyUnicode_AsUTF8(arguments[1]);
    if (name == nullptr) {
      return nullptr;
    }
    check_storage(THPVariable_Unpack(arguments[0]), name);
    Py_RETURN_NONE;
  });
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef method(const char* name) {
  // Through void (*)(), for which compilers do not warn.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

int add_python_calls(PyObject* module) {
  static PyMethodDef methods[] = {
      method<forward<Operation::kSoftmax>>("masked_softmax"),
      method<forward<Operation::kLogSoftmax>>("masked_log_softmax"),
      method<softmax_in_place>("masked_softmax_"),
      method<check_storage_of>("check_storage"),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods);
}

}  // namespace masked_softmax
