// From tensors to a Problem, and every message that a caller can meet on the way.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "common/problem.h"

namespace masked_softmax {

// What every operator takes beside its tensors of scores, and what its messages call it.
struct RowArguments {
  const char* name;  // of the function that the user called
  const at::Tensor& lengths;
  int64_t dim;
  const std::optional<at::Tensor>& starts;
  std::optional<double> scale;
  std::optional<int64_t> packed = std::nullopt;  // see operators.h
  bool validate = false;  // whether a device that does not look at bounds before it computes is to do so
};

// The operator that the user called, for messages.
constexpr const char* function_name(Operation operation, bool is_packed = false) {
  switch (operation) {
    case Operation::kSoftmax: return is_packed ? "packed_softmax" : "masked_softmax";
    case Operation::kLogSoftmax: return is_packed ? "packed_log_softmax" : "masked_log_softmax";
    case Operation::kSoftmaxBackward: return "masked_softmax_backward";
    case Operation::kLogSoftmaxBackward: return "masked_log_softmax_backward";
    case Operation::kLogSoftmaxJvp: return "masked_log_softmax_jvp";
    case Operation::kSoftmaxBackwardWrtY: return "masked_softmax_backward_wrt_output";
    case Operation::kLogSoftmaxBackwardWrtY: return "masked_log_softmax_backward_wrt_output";
    case Operation::kSoftmaxBackwardJvpWrtY: return "masked_softmax_backward_jvp_wrt_output";
    case Operation::kLogSoftmaxJvpJvpWrtY: return "masked_log_softmax_jvp_jvp_wrt_output";
  }
  return "";
}

// The result's type, for an input of this type and the `dtype` that was asked for.
at::ScalarType result_dtype(const char* name, at::ScalarType input, std::optional<at::ScalarType> dtype);

// Device, type and shape of lengths and starts, and the dimension, for scores like `input`; sizes may be symbolic.
void check_row_arguments(const at::Tensor& input, const RowArguments& arguments);

// An output that the caller brought: right shape, type and device, no element twice, no other tensor's memory (except
// exactly the input's).
void check_output(const at::Tensor& output, const at::Tensor& input, at::ScalarType dtype,
                  const RowArguments& arguments);

// Of these checks, that no element of the output lies where another does.
void check_own_elements(const at::Tensor& output, const char* name);

// A tensor that a derivative takes beside the saved output: the same shape, a floating type, the same device.
void check_like_output(const char* what, const at::Tensor& tensor, const at::Tensor& output,
                       const RowArguments& arguments);

// The problem's memory; arguments are checked before.
Problem make_problem(Operation operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
                     const RowArguments& arguments);

// Raises ValueError for the first row whose bounds are invalid. Reads the bounds: host memory only. Of packed rows it
// finds the longest.
void check_bounds(Problem& problem, const at::Tensor& input, const RowArguments& arguments);

}  // namespace masked_softmax
