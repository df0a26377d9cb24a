#include "binding/checks.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/WrapDimUtils.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "binding/overlap.h"
#include "common/bounds.h"
#include "common/row_walker.h"

namespace masked_softmax {
namespace {

bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

bool is_integer(at::ScalarType type) {
  return type == at::kChar || type == at::kByte || type == at::kShort || type == at::kInt || type == at::kLong;
}

ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return ElementType::kFloat32;
    case at::kDouble: return ElementType::kFloat64;
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kHalf: return ElementType::kFloat16;
    case at::kChar: return ElementType::kInt8;
    case at::kByte: return ElementType::kUInt8;
    case at::kShort: return ElementType::kInt16;
    case at::kInt: return ElementType::kInt32;
    case at::kLong: return ElementType::kInt64;
    case at::kBool: return ElementType::kBool;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked scalar type ", type);
  }
}

std::vector<c10::SymInt> row_shape(const at::Tensor& input, int64_t dim) {
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  if (!shape.empty()) {
    shape.erase(shape.begin() + dim);
  }
  return shape;
}

bool broadcasts(c10::IntArrayRef index, c10::IntArrayRef input, int64_t dim) {
  const auto row_ndim = static_cast<int64_t>(input.size()) - (input.empty() ? 0 : 1);
  if (static_cast<int64_t>(index.size()) > row_ndim) {
    return false;
  }
  for (size_t k = 0; k < index.size(); ++k) {
    const int64_t size = input[k + (static_cast<int64_t>(k) >= dim ? 1 : 0)];
    if (index[k] != 1 && index[k] != size) {
      return false;
    }
  }
  return true;
}

// The same where sizes are symbolic: each comparison becomes a guard of the compiled program.
bool broadcasts_symbolically(const at::Tensor& index, const std::vector<c10::SymInt>& rows) {
  const auto sizes = index.sym_sizes();
  if (sizes.size() > rows.size()) {
    return false;
  }
  for (size_t k = 0; k < sizes.size(); ++k) {
    if (!(sizes[k] == 1) && !(sizes[k] == rows[k])) {
      return false;
    }
  }
  return true;
}

void check_row_index(const char* what, const at::Tensor& index, const at::Tensor& input, int64_t dim,
                     const char* name) {
  TORCH_CHECK_TYPE(
      is_integer(index.scalar_type()), name, "(): expected ", what,
      " to be an int or a tensor of an integer type (int64, int32, int16, int8 or uint8), but got a tensor of ",
      index.scalar_type());
  TORCH_CHECK_VALUE(index.device() == input.device(), name, "(): expected ", what, " on the device of input, ",
                    input.device(), ", but got ", what, " on ", index.device());
  const bool symbolic = input.unsafeGetTensorImpl()->has_symbolic_sizes_strides() ||
                        index.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  if (symbolic ? broadcasts_symbolically(index, row_shape(input, dim))
               : broadcasts(index.sizes(), input.sizes(), dim)) {
    return;
  }
  TORCH_CHECK_VALUE(false, name, "(): expected ", what, " to broadcast, from its first dimension on, to the shape of ",
                    "input without dimension ", dim, ", ", c10::SymIntArrayRef(row_shape(input, dim)), ", but got ",
                    what, " of shape ", index.sym_sizes(), " for input of shape ", input.sym_sizes());
}

struct ColsAndStride {
  int64_t size;
  int64_t stride;
};

ColsAndStride columns(const at::Tensor& tensor, int64_t dim) {
  return tensor.dim() == 0 ? ColsAndStride{1, 1} : ColsAndStride{tensor.size(dim), tensor.stride(dim)};
}

// A storage may be smaller than what its tensors look at: resize_() frees it under them, as FSDP does.
void check_memory(const at::Tensor& tensor, const char* name) {
  const size_t needed = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                                         tensor.storage_offset());
  const size_t held = tensor.storage().nbytes();
  TORCH_CHECK(needed <= held || tensor.numel() == 0, name, "(): expected tensors whose storage holds their elements, ",
              "but got one of shape ", tensor.sizes(), " that needs ", needed, " bytes, in a storage of ", held);
}

// An input's memory is asked for as const: a lazy clone (torch._lazy_clone) would else become a real one.
Operand make_operand(const at::Tensor& tensor, int64_t dim, void* data) {
  Operand operand;
  operand.data = data;
  operand.type = element_type(tensor.scalar_type());
  operand.col_stride = columns(tensor, dim).stride;
  return operand;
}

RowIndex make_row_index(const std::optional<at::Tensor>& tensor) {
  RowIndex index;
  if (tensor.has_value()) {
    index.data = tensor->const_data_ptr();
    index.type = element_type(tensor->scalar_type());
  }
  return index;
}

int64_t row_index_stride(const std::optional<at::Tensor>& index, int64_t row_dim) {
  if (!index.has_value() || row_dim >= index->dim() || index->size(row_dim) == 1) {
    return 0;
  }
  return index->stride(row_dim);
}

// What check_row_index() is for padded rows.
void check_packed_arguments(const at::Tensor& values, const RowArguments& arguments) {
  TORCH_CHECK_VALUE(values.dim() > 0, arguments.name, "(): expected values of at least one dimension, but got a 0-dim ",
                    "tensor");
  TORCH_CHECK_VALUE(arguments.starts.has_value(), arguments.name, "(): expected starts beside lengths, but got None");
  for (const at::Tensor* index : {&arguments.lengths, &*arguments.starts}) {
    TORCH_CHECK_TYPE(is_integer(index->scalar_type()), arguments.name,
                     "(): expected offsets of an integer type (int64, int32, int16, int8 or uint8), but got ",
                     index->scalar_type());
    TORCH_CHECK_VALUE(index->device() == values.device(), arguments.name,
                      "(): expected offsets on the device of values, ", values.device(), ", but got offsets on ",
                      index->device());
    TORCH_CHECK_VALUE(index->dim() == 1, arguments.name, "(): expected offsets of one dimension, but got one row's ",
                      "bounds in a tensor of shape ", index->sym_sizes());
  }
  TORCH_CHECK_VALUE(arguments.lengths.sym_size(0) == arguments.starts->sym_size(0), arguments.name,
                    "(): expected as many starts as lengths, ", arguments.lengths.sym_size(0), ", but got ",
                    arguments.starts->sym_size(0));
}

// Puts the row dimension (size, strides) behind those that the problem has, or, where every operand walks on from the
// last one without a jump, makes that one longer.
class RowDimensions {
 public:
  RowDimensions(Problem& problem, const char* name) : problem_(problem), name_(name) {}

  template <class Strides>
  void push(int64_t size, const Strides& strides_of) {
    problem_.rows *= size;
    if (size == 1) {
      return;
    }
    const int last = problem_.row_ndim - 1;
    bool continues = last >= 0;
    for_each([&](auto& operand, int which) {
      continues = continues && operand.row_strides[last] == strides_of(which) * size;
    });
    if (!continues) {
      TORCH_CHECK_VALUE(problem_.row_ndim < kMaxRowDims, name_, "(): expected at most ", kMaxRowDims,
                        " dimensions that cannot be merged, but got more");
      problem_.row_sizes[problem_.row_ndim++] = 1;
    }
    const int dim = problem_.row_ndim - 1;
    problem_.row_sizes[dim] *= size;
    for_each([&](auto& operand, int which) { operand.row_strides[dim] = strides_of(which); });
  }

  static constexpr int kOutput = -1;
  static constexpr int kLengths = -2;
  static constexpr int kStarts = -3;

 private:
  template <class Visit>
  void for_each(const Visit& visit) {
    visit(problem_.output, kOutput);
    for (int i = 0; i < problem_.input_count; ++i) {
      visit(problem_.inputs[i], i);
    }
    visit(problem_.lengths, kLengths);
    visit(problem_.starts, kStarts);
  }

  Problem& problem_;
  const char* name_;
};

// Whether every element of one lies where the other's does. The stride of a dimension of size 1 leads nowhere.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type()) {
    return false;
  }
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

std::string row_name(const at::Tensor& input, int64_t dim, int64_t row) {
  std::vector<int64_t> position;
  for (int64_t d = input.dim() - 1; d >= 0; --d) {
    if (d != dim) {
      position.insert(position.begin(), row % input.size(d));
      row /= input.size(d);
    }
  }
  std::ostringstream text;
  if (position.size() <= 1) {
    text << "row " << (position.empty() ? 0 : position[0]);
  } else {
    text << "row (";
    for (size_t i = 0; i < position.size(); ++i) {
      text << (i == 0 ? "" : ", ") << position[i];
    }
    text << ")";
  }
  return text.str();
}

}  // namespace

at::ScalarType result_dtype(const char* name, at::ScalarType input, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(is_floating(input) || is_integer(input) || input == at::kBool, name,
                   "(): expected input of float32, float64, bfloat16, float16, or of an integer type, but got ", input);
  TORCH_CHECK_TYPE(is_floating(input) || dtype.has_value(), name,
                   "(): expected input of a floating point type, or dtype= to name the result's, but got input of ",
                   input);
  TORCH_CHECK_TYPE(!dtype.has_value() || is_floating(*dtype), name,
                   "(): expected dtype to be float32, float64, bfloat16 or float16, but got ", *dtype);
  return dtype.value_or(input);
}

void check_row_arguments(const at::Tensor& input, const RowArguments& arguments) {
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, input.dim());
  TORCH_CHECK_VALUE(input.layout() == at::kStrided, arguments.name,
                    "(): expected a dense (strided) input, but got layout ", input.layout());
  if (arguments.packed.has_value()) {
    return check_packed_arguments(input, arguments);
  }
  check_row_index("lengths", arguments.lengths, input, dim, arguments.name);
  if (arguments.starts.has_value()) {
    check_row_index("starts", *arguments.starts, input, dim, arguments.name);
  }
}

void check_own_elements(const at::Tensor& output, const char* name) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(output) == at::MemOverlap::No || !shares_own_elements(output), name,
                    "(): expected an output whose elements each have memory of their own, but got one of shape ",
                    output.sizes(), " with strides ", output.strides());
}

void check_output(const at::Tensor& output, const at::Tensor& input, at::ScalarType dtype,
                  const RowArguments& arguments) {
  TORCH_CHECK_TYPE(output.scalar_type() == dtype, arguments.name, "(): expected out of ", dtype, ", but got ",
                   output.scalar_type());
  TORCH_CHECK_VALUE(output.device() == input.device(), arguments.name, "(): expected out on the device of input, ",
                    input.device(), ", but got out on ", output.device());
  TORCH_CHECK_VALUE(output.sym_sizes() == input.sym_sizes(), arguments.name, "(): expected out of input's shape, ",
                    input.sym_sizes(), ", but got out of shape ", output.sym_sizes());
  if (output.is_meta() || output.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return;  // no memory to overlap
  }
  output.mutable_data_ptr();  // a lazy clone gets memory of its own now, and shares none from here on
  check_own_elements(output, arguments.name);
  const auto check_apart = [&](const char* what, const at::Tensor& other, bool may_be_same) {
    TORCH_CHECK_VALUE((may_be_same && same_layout(output, other)) || !shares_elements(output, other), arguments.name,
                      "(): expected the output's memory apart from that of ", what,
                      may_be_same ? ", or exactly the same" : "", ", but got memory that overlaps it");
  };
  check_apart("input", input, true);
  check_apart("lengths", arguments.lengths, false);
  if (arguments.starts.has_value()) {
    check_apart("starts", *arguments.starts, false);
  }
}

void check_like_output(const char* what, const at::Tensor& tensor, const at::Tensor& output,
                       const RowArguments& arguments) {
  TORCH_CHECK_TYPE(is_floating(tensor.scalar_type()), arguments.name, "(): expected ", what,
                   " of a floating point type, but got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == output.device(), arguments.name, "(): expected ", what, " on ", output.device(),
                    ", but got it on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.sym_sizes() == output.sym_sizes(), arguments.name, "(): expected ", what, " of shape ",
                    output.sym_sizes(), ", but got ", tensor.sym_sizes());
}

Problem make_problem(Operation operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
                     const RowArguments& arguments) {
  check_memory(output, arguments.name);
  for (const at::Tensor* input : inputs) {
    check_memory(*input, arguments.name);
  }
  check_memory(arguments.lengths, arguments.name);
  if (arguments.starts.has_value()) {
    check_memory(*arguments.starts, arguments.name);
  }

  const int64_t ndim = output.dim();
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, ndim);
  Problem problem;
  problem.operation = operation;
  problem.scale = arguments.scale.value_or(1.0);
  problem.rows = 1;
  problem.cols = columns(output, dim).size;
  problem.output = make_operand(output, dim, output.mutable_data_ptr());
  problem.input_count = 0;
  for (const at::Tensor* input : inputs) {
    problem.inputs[problem.input_count++] = make_operand(*input, dim, const_cast<void*>(input->const_data_ptr()));
  }
  problem.lengths = make_row_index(arguments.lengths);
  problem.starts = make_row_index(arguments.starts);

  const bool is_packed = arguments.packed.has_value();
  RowDimensions dimensions(problem, arguments.name);
  if (is_packed) {
    const int64_t longest = *arguments.packed >= 0 ? *arguments.packed : problem.cols;
    problem.packing = {true, longest < problem.cols ? longest : problem.cols, output.numel()};
    dimensions.push(arguments.lengths.size(0), [&](int which) {
      switch (which) {
        case RowDimensions::kLengths: return arguments.lengths.stride(0);
        case RowDimensions::kStarts: return arguments.starts->stride(0);
        default: return int64_t{0};
      }
    });
  }
  int64_t row_dim = is_packed ? arguments.lengths.dim() : 0;  // lengths and starts go no further
  for (int64_t d = 0; d < ndim; ++d) {
    if (d == dim) {
      continue;
    }
    dimensions.push(output.size(d), [&](int which) {
      switch (which) {
        case RowDimensions::kOutput: return output.stride(d);
        case RowDimensions::kLengths: return row_index_stride(arguments.lengths, row_dim);
        case RowDimensions::kStarts: return row_index_stride(arguments.starts, row_dim);
        default: return inputs.begin()[which]->stride(d);
      }
    });
    ++row_dim;
  }
  return problem;
}

namespace {

// That packed rows follow one another from the first column to the last, and the longest of them.
void check_packing(Problem& problem, const at::Tensor& values, const RowArguments& arguments) {
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, values.dim());
  const int64_t count = arguments.lengths.size(0);
  int64_t end = 0;
  int64_t longest = 0;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t start = load_index(problem.starts, row * arguments.starts->stride(0));
    const int64_t length = load_index(problem.lengths, row * arguments.lengths.stride(0));
    TORCH_CHECK_VALUE(start == end && length >= 0 && length <= problem.cols - start, arguments.name,
                      "(): expected offsets that ascend from 0 to ", problem.cols, " (values' size in dimension ", dim,
                      "), but row ", row, " begins at ", start, " and has length ", length);
    end = start + length;
    longest = std::max(longest, length);
  }
  TORCH_CHECK_VALUE(end == problem.cols, arguments.name, "(): expected offsets that ascend from 0 to ", problem.cols,
                    " (values' size in dimension ", dim, "), but they end at ", end);
  TORCH_CHECK_VALUE(*arguments.packed < 0 || longest <= *arguments.packed, arguments.name,
                    "(): expected no row longer than max_length, ", *arguments.packed, ", but one has length ",
                    longest);
  problem.packing.longest = longest;
}

}  // namespace

void check_bounds(Problem& problem, const at::Tensor& input, const RowArguments& arguments) {
  if (arguments.packed.has_value()) {
    return check_packing(problem, input, arguments);
  }
  const int64_t row = first_invalid_row(problem);
  if (row < 0) {
    return;
  }
  RowRun run;
  RowWalker(problem, row, row + 1).next(run);
  const int64_t start = run.raw_start(0);
  const int64_t length = run.raw_length(0);
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, input.dim());
  if (!arguments.starts.has_value()) {
    TORCH_CHECK_VALUE(false, arguments.name, "(): expected 0 <= length <= ", problem.cols,
                      " (input's size in dimension ", dim, "), but ", row_name(input, dim, row), " has length ",
                      length);
  }
  TORCH_CHECK_VALUE(false, arguments.name, "(): expected 0 <= start, 0 <= length and start + length <= ", problem.cols,
                    " (input's size in dimension ", dim, "), but ", row_name(input, dim, row), " has start ", start,
                    " and length ", length);
}

}  // namespace masked_softmax
