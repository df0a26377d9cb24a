#include "binding/checks.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/SymInt.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "binding/overlap.h"
#include "common/bounds.h"
#include "common/row_walker.h"

namespace masked_softmax {
namespace {

bool is_of_kind(ElementKind kind, at::ScalarType type) {
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind_) \
  if (type == at::ScalarType::Scalar) {                                \
    return kind == ElementKind::kind_;                                 \
  }
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
  return false;
}

bool is_floating(at::ScalarType type) { return is_of_kind(ElementKind::kFloating, type); }
bool is_integer(at::ScalarType type) { return is_of_kind(ElementKind::kInteger, type); }

// The names of all types of a kind: "float32, float64, bfloat16 or float16".
std::string names_of(ElementKind kind) {
  std::vector<const char*> names;
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind_) \
  if (kind == ElementKind::kind_) {                                    \
    names.push_back(#name);                                            \
  }
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    text += i == 0 ? "" : i + 1 == names.size() ? " or " : ", ";
    text += names[i];
  }
  return text;
}

// As Python prints it: "torch.float32". The dispatcher passes None as an undefined tensor, which has no type, and a
// type as an integer, which it doesn't check.
std::string dtype_name(at::ScalarType type) {
  const int number = static_cast<int>(type);
  if (number < 0 || number >= static_cast<int>(at::ScalarType::NumOptions)) {
    return "the integer " + std::to_string(number) + ", which stands for no dtype";
  }
  return type == at::ScalarType::Undefined ? "None" : "torch." + std::string(c10::getDtypeNames(type).first);
}

std::string tensor_of(at::ScalarType type) {
  return type == at::ScalarType::Undefined ? "None" : "a tensor of " + dtype_name(type);
}

// PyTorch's names of in-place functions end in an underscore.
bool is_in_place(const char* function) { return std::string_view(function).back() == '_'; }

std::vector<c10::SymInt> row_shape(const at::Tensor& input, int64_t dim) {
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  if (!shape.empty()) {
    shape.erase(shape.begin() + dim);
  }
  return shape;
}

std::vector<c10::SymInt> packed_row_shape(const at::Tensor& values, int64_t dim, const at::Tensor& lengths) {
  std::vector<c10::SymInt> shape = row_shape(values, dim);
  shape.insert(shape.begin(), lengths.sym_size(0));
  return shape;
}

bool is_one(int64_t size) { return size == 1; }
bool is_one(const c10::SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(1)); }

// Comparing symbolic sizes adds a guard to the compiled program. Sizes that only the data know (unbacked symbols) are
// taken as equal, as in torch's own operators, and the compiled program checks them when it runs.
bool is_same_size(int64_t a, int64_t b) { return a == b; }
bool is_same_size(const c10::SymInt& a, const c10::SymInt& b) { return a.sym_eq(b).expect_true(__FILE__, __LINE__); }

bool is_same_shape(const at::Tensor& a, const at::Tensor& b) {
  const c10::SymIntArrayRef a_sizes = a.sym_sizes();
  const c10::SymIntArrayRef b_sizes = b.sym_sizes();
  return a_sizes.size() == b_sizes.size() &&
         std::equal(a_sizes.begin(), a_sizes.end(), b_sizes.begin(),
                    [](const c10::SymInt& x, const c10::SymInt& y) { return is_same_size(x, y); });
}

// Whether `index` is aligned with the leading dimensions of the rows, or broadcast to them. row_size(k): the size of
// the rows' dimension k.
template <class Size, class RowSize>
bool broadcasts_to_rows(c10::ArrayRef<Size> index, size_t row_ndim, const RowSize& row_size) {
  if (index.size() > row_ndim) {
    return false;
  }
  for (size_t k = 0; k < index.size(); ++k) {
    if (!is_one(index[k]) && !is_same_size(index[k], row_size(k))) {
      return false;
    }
  }
  return true;
}

// The same for the rows of `input`, which are its dimensions without `dim`.
template <class Size>
bool broadcasts(c10::ArrayRef<Size> index, c10::ArrayRef<Size> input, int64_t dim) {
  return broadcasts_to_rows(index, input.empty() ? 0 : input.size() - 1, [&](size_t k) -> const Size& {
    return input[k + (static_cast<int64_t>(k) >= dim ? 1 : 0)];
  });
}

// What to pass instead of an index that would broadcast with more or fewer leading dimensions of size 1. The helpers
// that make causal bounds, or bounds from a mask, add those dimensions for scores of `ndim` dimensions.
std::string to_aligned_remedy(const char* what, c10::SymIntArrayRef index, c10::SymIntArrayRef input, int64_t dim) {
  const size_t ndim = input.size();
  if (ndim < 2) {
    return "";
  }
  std::vector<c10::SymInt> shape = index.vec();
  while (shape.size() > ndim - 1 && is_one(shape.front())) {
    shape.erase(shape.begin());
  }
  if (shape.size() < ndim - 1) {
    shape.insert(shape.begin(), ndim - 1 - shape.size(), c10::SymInt(1));
  }
  if (!broadcasts(c10::SymIntArrayRef(shape), input, dim)) {
    return "";
  }
  return c10::str("; ", what, " of shape ", c10::SymIntArrayRef(shape),
                  " would, which causal_lengths(), window() and lengths_from_mask() return with ndim=", ndim);
}

// What to pass instead of a sink that would broadcast with more leading, or fewer trailing dimensions of size 1.
std::string to_sink_remedy(const char* what, c10::SymIntArrayRef sink, const std::vector<c10::SymInt>& rows) {
  std::vector<c10::SymInt> shape = sink.vec();
  while (!shape.empty() && is_one(shape.back())) {
    shape.pop_back();
  }
  for (; shape.size() <= rows.size(); shape.insert(shape.begin(), c10::SymInt(1))) {
    if (broadcasts_to_rows(c10::SymIntArrayRef(shape), rows.size(), [&](size_t k) { return rows[k]; })) {
      return c10::str("; ", what, " of shape ", c10::SymIntArrayRef(shape), " would");
    }
  }
  return "";
}

// How lengths or starts are made from a tensor of this type.
std::string to_integer_remedy(const char* what, at::ScalarType type) {
  if (type == at::kBool) {
    return "; masked_softmax_ext.lengths_from_mask() makes lengths and starts from a mask";
  }
  return at::isComplexType(type) ? "" : c10::str("; ", what, ".long() converts it");
}

void check_row_index(const char* what, const OptionalTensor& optional_index, const at::Tensor& input, int64_t dim,
                     const char* name) {
  if (!optional_index.has_value()) {
    return;
  }
  const at::Tensor& index = *optional_index;
  TORCH_CHECK_TYPE(is_integer(index.scalar_type()), name, "(): expected ", what,
                   " to be an int or a tensor of an integer type (", names_of(ElementKind::kInteger),
                   "), but got a tensor of ", dtype_name(index.scalar_type()),
                   to_integer_remedy(what, index.scalar_type()));
  TORCH_CHECK_VALUE(index.device() == input.device(), name, "(): expected ", what, " on the device of input, ",
                    input.device(), ", but got ", what, " on ", index.device());
  const bool symbolic = input.unsafeGetTensorImpl()->has_symbolic_sizes_strides() ||
                        index.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  if (symbolic ? broadcasts(index.sym_sizes(), input.sym_sizes(), dim)
               : broadcasts(index.sizes(), input.sizes(), dim)) {
    return;
  }
  TORCH_CHECK_VALUE(false, name, "(): expected ", what, " to broadcast, from the first dimension on, to the shape of ",
                    "input without dimension ", dim, ", ", c10::SymIntArrayRef(row_shape(input, dim)), ", but got ",
                    what, " of shape ", index.sym_sizes(), " for input of shape ", input.sym_sizes(),
                    to_aligned_remedy(what, index.sym_sizes(), input.sym_sizes(), dim));
}

// For packed rows, in place of check_row_index().
void check_packed_arguments(const at::Tensor& values, const CallArguments& arguments) {
  TORCH_CHECK_VALUE(values.dim() > 0, arguments.name, "(): expected values of at least one dimension, but got a 0-dim ",
                    "tensor");
  TORCH_CHECK_VALUE(arguments.lengths.has_value() && arguments.starts.has_value(), arguments.name,
                    "(): expected lengths and starts for packed rows, but got None");
  for (const at::Tensor* index : {&*arguments.lengths, &*arguments.starts}) {
    TORCH_CHECK_TYPE(is_integer(index->scalar_type()), arguments.name, "(): expected offsets of an integer type (",
                     names_of(ElementKind::kInteger), "), but got ", dtype_name(index->scalar_type()));
    TORCH_CHECK_VALUE(index->device() == values.device(), arguments.name,
                      "(): expected offsets on the device of values, ", values.device(), ", but got offsets on ",
                      index->device());
    TORCH_CHECK_VALUE(index->dim() == 1, arguments.name,
                      "(): expected lengths and starts of one dimension for packed rows, but got one of shape ",
                      index->sym_sizes());
  }
  TORCH_CHECK_VALUE(is_same_size(arguments.lengths->sym_size(0), arguments.starts->sym_size(0)), arguments.name,
                    "(): expected as many starts as lengths, ", arguments.lengths->sym_size(0), ", but got ",
                    arguments.starts->sym_size(0));
}

// Whether both have the same elements at the same addresses. Strides of dimensions of size 1 do not matter.
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

// Whether its elements are those of another tensor, as in torch.func, so that its address says nothing.
bool is_wrapper(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kWrappers({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return !tensor.has_storage() || tensor.key_set().has_any(kWrappers);
}

std::string row_name(const at::Tensor& input, int64_t dim, int64_t row) {
  std::vector<int64_t> position;
  for (int64_t d = input.dim() - 1; d >= 0; --d) {
    if (d != dim) {
      position.insert(position.begin(), row % input.size(d));
      row /= input.size(d);
    }
  }
  if (position.size() <= 1) {
    return c10::str("row ", position.empty() ? 0 : position[0]);
  }
  return c10::str("row (", c10::Join(", ", position), ")");
}

// How to make offsets, for a caller who passed lengths instead.
constexpr const char* kOffsetsRemedy =
    "; offsets of rows with these lengths: torch.nn.functional.pad(lengths.cumsum(0), (1, 0))";

// Checks that packed rows follow one another from the first column to the last.
void check_packing(Problem& problem, const at::Tensor& values, const CallArguments& arguments) {
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, values.dim());
  const int64_t count = arguments.lengths->size(0);
  int64_t end = 0;
  int64_t longest = 0;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t start = load_index(problem.starts, row * arguments.starts->stride(0));
    const int64_t length = load_index(problem.lengths, row * arguments.lengths->stride(0));
    TORCH_CHECK_VALUE(start == end && length >= 0 && length <= problem.cols - start, arguments.name,
                      "(): expected offsets that ascend from 0 to ", problem.cols, " (values' size in dimension ", dim,
                      "), but row ", row, " begins at ", start, " and has length ", length, kOffsetsRemedy);
    end = start + length;
    longest = std::max(longest, length);
  }
  TORCH_CHECK_VALUE(end == problem.cols, arguments.name, "(): expected offsets that ascend from 0 to ", problem.cols,
                    " (values' size in dimension ", dim, "), but they end at ", end, kOffsetsRemedy);
  const int64_t bound = arguments.packed_bound();
  TORCH_CHECK_VALUE(bound < 0 || longest <= bound, arguments.name, "(): expected no row longer than max_length, ",
                    bound, ", but one has length ", longest);
  problem.packing.longest = longest;
}

}  // namespace

const char* written_argument(const char* function) { return is_in_place(function) ? "input" : "out"; }

at::ScalarType result_dtype(at::ScalarType input, OptionalType dtype, const CallArguments& arguments) {
  const char* const what = arguments.input_name();
  TORCH_CHECK_TYPE(is_floating(input) || is_integer(input) || input == at::kBool, arguments.name, "(): expected ", what,
                   " of ", names_of(ElementKind::kFloating), ", or of an integer type (",
                   names_of(ElementKind::kInteger), "), but got ", dtype_name(input));
  TORCH_CHECK_TYPE(is_floating(input) || dtype.has_value(), arguments.name, "(): expected ", what,
                   " of a floating point type, or dtype= to name the type of the result, but got ", what, " of ",
                   dtype_name(input));
  TORCH_CHECK_TYPE(!dtype.has_value() || is_floating(*dtype), arguments.name, "(): expected dtype to be ",
                   names_of(ElementKind::kFloating), ", but got ", dtype_name(*dtype));
  return dtype.value_or(input);
}

void check_floating(const char* what, at::ScalarType type, const CallArguments& arguments) {
  TORCH_CHECK_TYPE(is_floating(type), arguments.name, "(): expected ", what, " of a floating point type (",
                   names_of(ElementKind::kFloating), "), but got ", dtype_name(type));
}

void check_row_arguments(const at::Tensor& input, const CallArguments& arguments) {
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, input.dim());
  TORCH_CHECK_VALUE(input.layout() == at::kStrided, arguments.name, "(): expected ", arguments.input_name(),
                    " to be a dense tensor, but got layout ", input.layout());
  if (arguments.packed.has_value()) {
    return check_packed_arguments(input, arguments);
  }
  check_row_index("lengths", arguments.lengths, input, dim, arguments.name);
  check_row_index("starts", arguments.starts, input, dim, arguments.name);
}

std::vector<c10::SymInt> row_shape(const at::Tensor& input, const CallArguments& arguments) {
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, input.dim());
  return arguments.packed.has_value() ? packed_row_shape(input, dim, *arguments.lengths) : row_shape(input, dim);
}

at::Tensor align_to_rows(const at::Tensor& numbers, int64_t row_ndim) {
  std::vector<c10::SymInt> sizes = numbers.sym_sizes().vec();
  sizes.resize(static_cast<size_t>(row_ndim), 1);
  return numbers.view_symint(sizes);
}

void check_row_input(const char* what, const at::Tensor& input, const CallArguments& arguments) {
  const at::Tensor& given = *arguments.row_input;
  TORCH_CHECK_TYPE(is_floating(given.scalar_type()), arguments.name, "(): expected ", what,
                   " to be a number or a tensor of a floating point type (", names_of(ElementKind::kFloating),
                   "), but got ", tensor_of(given.scalar_type()));
  TORCH_CHECK_VALUE(given.device() == input.device(), arguments.name, "(): expected ", what, " on the device of ",
                    arguments.input_name(), ", ", input.device(), ", but got ", what, " on ", given.device());
  const std::vector<c10::SymInt> rows = row_shape(input, arguments);
  const c10::SymIntArrayRef sizes = given.sym_sizes();
  const bool fits = broadcasts_to_rows(sizes, rows.size(), [&](size_t k) -> const c10::SymInt& { return rows[k]; });
  TORCH_CHECK_VALUE(fits, arguments.name, "(): expected ", what, " to broadcast, from the first dimension on, to the ",
                    "shape of the rows, ", c10::SymIntArrayRef(rows), ", but got ", what, " of shape ", sizes, " for ",
                    arguments.input_name(), " of shape ", input.sym_sizes(), to_sink_remedy(what, sizes, rows));
  check_storage(given, arguments.name);
}

void check_storage(const at::Tensor& tensor, const char* name) {
  if (const auto* const batched = at::functorch::maybeGetBatchedImpl(tensor)) {
    return check_storage(batched->value(), name);
  }
  if (!tensor.has_storage() || tensor.is_nested() || tensor.is_meta() ||
      tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return;  // no memory to access, or a wrapper's, which is another tensor's
  }
  const std::optional<int64_t> held = tensor.storage().sym_nbytes().maybe_as_int();
  const size_t needed = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                                         tensor.storage_offset());
  TORCH_CHECK(!held.has_value() || needed <= static_cast<size_t>(*held) || tensor.numel() == 0, name,
              "(): expected tensors whose storage holds their elements, but got one of shape ", tensor.sizes(),
              ", which needs ", needed, " bytes, in a storage of ", *held);
}

void check_not_inference(const at::Tensor& written, const char* name) {
  TORCH_CHECK(
      !written.is_inference() || c10::InferenceMode::is_enabled(), name,
      "(): Inplace update to inference tensor outside InferenceMode is not allowed. You can make a clone to get "
      "a normal tensor before doing inplace update.");
}

void check_no_internal_overlap(const char* what, const at::Tensor& output, const char* name) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(output) == at::MemOverlap::No || !shares_own_elements(output), name,
                    "(): expected ", what, ", which is overwritten, to have memory of its own for each element, but ",
                    "got ", what, " of shape ", output.sizes(), " with strides ", output.strides(),
                    std::string_view(what) != written_argument(name) ? ""
                    : is_in_place(name)                              ? "; masked_softmax() returns a new tensor instead"
                                                                     : "; without out= the result is a new tensor");
}

void check_output(const at::Tensor& output, const at::Tensor& input, at::ScalarType dtype,
                  const CallArguments& arguments) {
  TORCH_CHECK_TYPE(output.scalar_type() == dtype, arguments.name, "(): expected out of ", dtype_name(dtype),
                   ", but got ", dtype_name(output.scalar_type()),
                   is_floating(output.scalar_type()) ? "; dtype=out.dtype makes that the result's type" : "");
  TORCH_CHECK_VALUE(output.device() == input.device(), arguments.name, "(): expected out on the device of input, ",
                    input.device(), ", but got out on ", output.device());
  TORCH_CHECK_VALUE(is_same_shape(output, input), arguments.name, "(): expected out of input's shape, ",
                    input.sym_sizes(), ", but got out of shape ", output.sym_sizes());
  if (output.is_meta() || output.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return;  // no memory to overlap
  }
  output.mutable_data_ptr();  // a lazy clone is materialized now, before its memory is compared
  check_no_internal_overlap(written_argument(arguments.name), output, arguments.name);
  const auto check_apart = [&](const char* what, const OptionalTensor& other, bool may_be_same) {
    TORCH_CHECK_VALUE(
        !other.has_value() || (may_be_same && same_layout(output, *other)) || !shares_elements(output, *other),
        arguments.name, "(): expected ", written_argument(arguments.name), " to share no memory with ", what,
        may_be_same ? ", or to be the same view of it" : "", ", but got memory that overlaps it; ", what,
        ".clone() shares none");
  };
  check_apart("input", input, true);
  check_apart("lengths", arguments.lengths, false);
  check_apart("starts", arguments.starts, false);
  if (arguments.row_input != nullptr) {
    check_apart("sink", *arguments.row_input, false);
  }
}

void check_like_output(const char* what, const at::Tensor& tensor, const at::Tensor& output,
                       const CallArguments& arguments) {
  check_floating(what, tensor.scalar_type(), arguments);
  TORCH_CHECK_VALUE(tensor.device() == output.device(), arguments.name, "(): expected ", what, " on ", output.device(),
                    ", but got ", what, " on ", tensor.device());
  TORCH_CHECK_VALUE(is_same_shape(tensor, output), arguments.name, "(): expected ", what, " of shape ",
                    output.sym_sizes(), ", but got ", what, " of shape ", tensor.sym_sizes());
}

void check_sink_weight(const at::Tensor& sink_weight, const at::Tensor& weight, const at::Tensor& input,
                       const CallArguments& arguments) {
  constexpr const char* kWhat = "sink_weight";
  check_like_output(kWhat, sink_weight, weight, arguments);
  check_not_inference(sink_weight, arguments.name);
  check_storage(sink_weight, arguments.name);
  if (sink_weight.is_meta() || sink_weight.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return;  // no memory to overlap
  }
  check_no_internal_overlap(kWhat, sink_weight, arguments.name);
  TORCH_CHECK_VALUE(is_wrapper(sink_weight) || is_wrapper(input) || !shares_elements(sink_weight, input),
                    arguments.name, "(): expected ", kWhat,
                    " to share no memory with input, but got memory that overlaps it; ", kWhat, ".clone() shares none");
}

void check_bounds(Problem& problem, const at::Tensor& scores, const CallArguments& arguments) {
  if (arguments.packed.has_value()) {
    return check_packing(problem, scores, arguments);
  }
  const int64_t row = first_invalid_row(problem);
  if (row < 0) {
    return;
  }
  RowRun run;
  RowWalker(problem, row, row + 1).next(run);
  const int64_t start = run.raw_start(0);
  const int64_t length = run.raw_length(0);
  const int64_t dim = at::maybe_wrap_dim(arguments.dim, scores.dim());
  if (!arguments.starts.has_value()) {
    TORCH_CHECK_VALUE(false, arguments.name, "(): expected 0 <= length <= ", problem.cols,
                      " (input's size in dimension ", dim, "), but ", row_name(scores, dim, row), " has length ",
                      length);
  }
  TORCH_CHECK_VALUE(arguments.lengths.has_value(), arguments.name,
                    "(): expected starts of 0 without lengths, where every column is valid, but ",
                    row_name(scores, dim, row), " has start ", start, "; with lengths=input.size(", dim,
                    ") - starts, rows end at the last column");
  TORCH_CHECK_VALUE(false, arguments.name, "(): expected 0 <= start, 0 <= length and start + length <= ", problem.cols,
                    " (input's size in dimension ", dim, "), but ", row_name(scores, dim, row), " has start ", start,
                    " and length ", length);
}

}  // namespace masked_softmax
