// Checks of an operator's arguments, with every message that a caller can meet.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <vector>

#include "binding/operators.h"
#include "common/problem.h"

namespace masked_softmax {

struct CallArguments : RowArguments {
  const char* name;       // of the function that messages name
  OptionalSymInt packed;  // for packed rows, an upper bound of their lengths: see operators.h
  bool validate;          // CUDA: check bounds before the launch, which synchronizes
  OptionalDouble padding_value = std::nullopt;
  const at::Tensor* row_input = nullptr;   // the sink, or row_scale's factor
  const at::Tensor* row_result = nullptr;  // for the sink's weight

  // As the caller knows the scores.
  const char* input_name() const { return packed.has_value() ? "values" : "input"; }

  // Of a call with data, where sizes are not symbols.
  int64_t packed_bound() const { return packed->guard_int(__FILE__, __LINE__); }
};

// Returns the result's type, for an input of type `input` and the caller's dtype=.
at::ScalarType result_dtype(at::ScalarType input, OptionalType dtype, const CallArguments& arguments);

// Checks an argument that no dtype= converts.
void check_floating(const char* what, at::ScalarType type, const CallArguments& arguments);

// Checks dim, and the device, type and shape of lengths and starts, for scores like `input`. Sizes may be symbolic.
void check_row_arguments(const at::Tensor& input, const CallArguments& arguments);

// Checks an output that the caller passed: shape, type, device, no internal overlap, no memory shared with another
// tensor (except that it may be the input itself).
void check_output(const at::Tensor& output, const at::Tensor& input, at::ScalarType dtype,
                  const CallArguments& arguments);

// The shape of one number a row. For packed rows the batch of rows comes first.
std::vector<c10::SymInt> row_shape(const at::Tensor& input, const CallArguments& arguments);

// `numbers` broadcast to rows of `row_ndim` dimensions from their first dimension on; torch broadcasts from the last.
at::Tensor align_to_rows(const at::Tensor& numbers, int64_t row_ndim);

// Checks the type, device, shape and storage of arguments.row_input, for scores like `input`.
void check_row_input(const char* what, const at::Tensor& input, const CallArguments& arguments);

// Checks that the tensor's elements lie in its storage, which may be smaller: FSDP frees storages by resize_(). torch's
// own operators do not check it: one that reads such a tensor crashes. `name`: of the function that messages name.
void check_storage(const at::Tensor& tensor, const char* name);

// The tensor, checked, for torch's own operators.
inline at::Tensor checked(const at::Tensor& tensor, const char* name) {
  check_storage(tensor, name);
  return tensor;
}

// The argument that a function writes to.
const char* written_argument(const char* function);

// The check of torch's bump_version(), for before the write.
void check_not_inference(const at::Tensor& written, const char* name);

void check_no_internal_overlap(const char* what, const at::Tensor& output, const char* name);

// Checks sink_weight, to which the call will copy `weight`, and that it shares no memory with `input`, which the call
// overwrites.
void check_sink_weight(const at::Tensor& sink_weight, const at::Tensor& weight, const at::Tensor& input,
                       const CallArguments& arguments);

// Checks a tensor that a derivative takes beside the saved output: same shape, same device, floating point.
void check_like_output(const char* what, const at::Tensor& tensor, const at::Tensor& output,
                       const CallArguments& arguments);

// Raises ValueError for the first row of `scores` whose bounds are invalid. Reads the bounds, which must be in host
// memory. For packed rows, also sets problem.packing.longest to the longest row.
void check_bounds(Problem& problem, const at::Tensor& scores, const CallArguments& arguments);

}  // namespace masked_softmax
