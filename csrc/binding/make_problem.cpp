#include "binding/make_problem.h"

#include <ATen/WrapDimUtils.h>

#include <cmath>
#include <limits>

#include "common/row_dimensions.h"

namespace masked_softmax {
namespace {

ElementType element_type(at::ScalarType type) {
  switch (type) {
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) \
  case at::ScalarType::Scalar: return ElementType::k##Name;
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
    default: TORCH_INTERNAL_ASSERT(false, "unchecked scalar type ", type);
  }
}

struct ColsAndStride {
  int64_t size;
  int64_t stride;
};

ColsAndStride columns(const at::Tensor& tensor, int64_t dim) {
  return tensor.dim() == 0 ? ColsAndStride{1, 1} : ColsAndStride{tensor.size(dim), tensor.stride(dim)};
}

// The caller passes an input's const data pointer: a mutable one would materialize a lazy clone (torch._lazy_clone).
Operand make_operand(const at::Tensor& tensor, int64_t dim, void* data) {
  Operand operand;
  operand.data = data;
  operand.type = element_type(tensor.scalar_type());
  operand.col_stride = columns(tensor, dim).stride;
  return operand;
}

RowIndex make_row_index(const std::optional<at::Tensor>& tensor, int64_t value_of_none) {
  RowIndex index;
  index.value = value_of_none;
  if (tensor.has_value()) {
    index.data = tensor->const_data_ptr();
    index.type = element_type(tensor->scalar_type());
  }
  return index;
}

int64_t broadcast_stride(const at::Tensor& rows, int64_t row_dim) {
  return row_dim >= rows.dim() || rows.size(row_dim) == 1 ? 0 : rows.stride(row_dim);
}

int64_t row_index_stride(const std::optional<at::Tensor>& index, int64_t row_dim) {
  return index.has_value() ? broadcast_stride(*index, row_dim) : 0;
}

int64_t row_input_stride(const at::Tensor* row_input, int64_t row_dim) {
  return row_input != nullptr ? broadcast_stride(*row_input, row_dim) : 0;
}

void add_row_dimension(Problem& problem, int64_t size, const RowStrides& strides, const char* name) {
  TORCH_CHECK_VALUE(add_row_dimension(problem, size, strides), name, "(): expected at most ", kMaxRowDims,
                    " dimensions that cannot be merged, but got more");
}

}  // namespace

const at::Tensor& scores_of(Operation operation, const at::Tensor& output,
                            std::initializer_list<const at::Tensor*> inputs) {
  return is_reduction(operation) ? **inputs.begin() : output;
}

Problem make_problem(Operation operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
                     const CallArguments& arguments) {
  const bool reduces_rows = is_reduction(operation);  // looked up once: a call of few elements takes a microsecond
  check_storage(output, arguments.name);
  for (const at::Tensor* input : inputs) {
    check_storage(*input, arguments.name);
  }
  for (const OptionalTensor* index : {&arguments.lengths, &arguments.starts}) {
    if (index->has_value()) {
      check_storage(**index, arguments.name);
    }
  }

  const at::Tensor& scores = reduces_rows ? **inputs.begin() : output;
  const int64_t ndim = scores.dim();
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, ndim);
  Problem problem;
  problem.operation = operation;
  problem.scale = arguments.scale.value_or(1.0);
  if (!std::isfinite(problem.scale)) {
    problem.scale = std::numeric_limits<double>::quiet_NaN();  // infinity * (max - max) is NaN, so the row's sum is
  }
  problem.rows = 1;
  problem.cols = columns(scores, dim).size;
  problem.padding = arguments.padding_value;
  const at::Tensor* const row_result = reduces_rows ? &output : arguments.row_result;
  if (row_result != nullptr) {
    problem.row_result = {row_result->mutable_data_ptr(), element_type(row_result->scalar_type())};
  }
  if (reduces_rows) {
    problem.output.data = problem.row_result.data;  // it has no elements
    problem.output.type = problem.row_result.type;
    problem.output.col_stride = 1;
  } else {
    problem.output = make_operand(output, dim, output.mutable_data_ptr());
  }
  if (arguments.row_input != nullptr) {
    problem.row_input.data = arguments.row_input->const_data_ptr();
    problem.row_input.type = element_type(arguments.row_input->scalar_type());
  }
  problem.input_count = 0;
  for (const at::Tensor* input : inputs) {
    problem.inputs[problem.input_count++] = make_operand(*input, dim, const_cast<void*>(input->const_data_ptr()));
  }
  problem.lengths = make_row_index(arguments.lengths, problem.cols);
  problem.starts = make_row_index(arguments.starts, 0);

  int64_t row_dim = 0;  // in lengths and starts
  if (arguments.packed.has_value()) {
    const int64_t bound = arguments.packed_bound();
    const int64_t longest = bound >= 0 ? bound : problem.cols;
    problem.packing = {true, longest < problem.cols ? longest : problem.cols, scores.numel(),
                       reduces_rows ? 0 : arguments.lengths->size(0)};
    RowStrides strides;
    strides.lengths = arguments.lengths->stride(0);
    strides.starts = arguments.starts->stride(0);
    strides.row_input = row_input_stride(arguments.row_input, 0);
    add_row_dimension(problem, arguments.lengths->size(0), strides, arguments.name);
    row_dim = 1;  // the others are broadcast
  }
  for (int64_t d = 0; d < ndim; ++d) {
    if (d == dim) {
      continue;
    }
    RowStrides strides;
    strides.output = reduces_rows ? 0 : output.stride(d);
    for (int k = 0; k < problem.input_count; ++k) {
      strides.inputs[k] = inputs.begin()[k]->stride(d);
    }
    strides.lengths = row_index_stride(arguments.lengths, row_dim);
    strides.starts = row_index_stride(arguments.starts, row_dim);
    strides.row_input = row_input_stride(arguments.row_input, row_dim);
    add_row_dimension(problem, scores.size(d), strides, arguments.name);
    ++row_dim;
  }
  return problem;
}

}  // namespace masked_softmax
