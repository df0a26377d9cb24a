#pragma once

#include <Python.h>

namespace masked_softmax {

// Adds the functions of python_calls.cpp to the module. On failure sets a Python error and returns -1.
int add_python_calls(PyObject* module);

}  // namespace masked_softmax
