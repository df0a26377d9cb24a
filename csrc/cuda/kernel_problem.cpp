#include "cuda/kernel_problem.h"

#include "common/row_dimensions.h"

namespace masked_softmax::cuda {
namespace {

// The kernels add the rows of a grid to a row's number.
constexpr int64_t kMaxPlainRows = int64_t{1} << 30;

bool fits_in_32_bits(int64_t value) { return value == static_cast<int32_t>(value); }

// Whether a row's stride in bytes fits in 32 bits, and rows begin at multiples of `alignment_bytes`.
bool is_plain(const Problem& problem, const void* data, int64_t elem_bytes, const int64_t* row_strides,
              int64_t alignment_bytes) {
  bool result = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(alignment_bytes) == 0;
  for (int dim = 0; dim < problem.row_ndim; ++dim) {
    const int64_t stride_bytes = row_strides[dim] * elem_bytes;
    result = result && fits_in_32_bits(row_strides[dim]) && fits_in_32_bits(stride_bytes) &&
             stride_bytes % alignment_bytes == 0;
  }
  return result;
}

// The strides of the last two row dimensions, in bytes.
PlainRows::Strides strides_of(const Problem& problem, const int64_t* row_strides, int64_t elem_bytes) {
  const int inner = problem.row_ndim - 1;
  PlainRows::Strides strides;
  strides.inner = inner >= 0 ? static_cast<int>(row_strides[inner] * elem_bytes) : 0;
  strides.outer = inner >= 1 ? static_cast<int>(row_strides[inner - 1] * elem_bytes) : 0;
  return strides;
}

PlainRows::Strides strides_of(const Problem& problem, const Operand& operand) {
  const int64_t elem_bytes = size_bytes(operand.type);
  PlainRows::Strides strides = strides_of(problem, operand.row_strides, elem_bytes);
  strides.col = static_cast<int>(operand.col_stride * elem_bytes);
  return strides;
}

// Whether rows are found in 32-bit numbers, and begin at column 0.
bool has_plain_bounds(const Problem& problem) {
  const RowIndex& lengths = problem.lengths;
  const bool has_plain_lengths =
      lengths.data == nullptr ||
      ((lengths.type == ElementType::kInt64 || lengths.type == ElementType::kInt32) &&
       is_plain(problem, lengths.data, size_bytes(lengths.type), lengths.row_strides, size_bytes(lengths.type)));
  const bool is_small = problem.row_ndim <= 2 && problem.rows <= kMaxPlainRows && fits_in_32_bits(problem.cols) &&
                        problem.input_count <= 2;
  const bool has_starts = problem.packing.is_packed || problem.starts.data != nullptr || problem.starts.value != 0;
  return has_plain_lengths && is_small && !has_starts;
}

// Whether is_operand_plain(operand) holds for the output and all inputs.
template <class Predicate>
bool holds_for_operands(const Problem& problem, const Predicate& is_operand_plain) {
  bool result = is_operand_plain(problem.output);
  for (int k = 0; k < problem.input_count; ++k) {
    result = result && is_operand_plain(problem.inputs[k]);
  }
  return result;
}

// Softmax's kernels of plain rows and columns take the results of absent elements, +0, for padding.
bool has_plain_padding(const Problem& problem) {
  const double padding = problem.padding_value();
  return problem.operation != Operation::kSoftmax || (padding == 0 && !std::signbit(padding));
}

template <class acc_t>
RowConstants<acc_t> constants_in(const Problem& problem) {
  const double factor = input_factor(problem);
  const double scale = problem.scale / factor;
  const double halving = std::fabs(scale) < 1 ? 0.5 : 1.0;
  return {static_cast<acc_t>(factor),
          static_cast<acc_t>(scale),
          static_cast<acc_t>(halving),
          static_cast<acc_t>(scale / halving),
          ScaledLog2e<acc_t>(is_forward(problem.operation) ? scale : 1.0),
          static_cast<acc_t>(problem.padding_value())};
}

}  // namespace

bool are_plain(const Problem& problem, int elems_per_vector) {
  return has_plain_bounds(problem) && has_plain_padding(problem) && problem.cols % elems_per_vector == 0 &&
         has_contiguous_columns(problem) && holds_for_operands(problem, [&](const Operand& operand) {
           const int64_t bytes = size_bytes(operand.type);
           return is_plain(problem, operand.data, bytes, operand.row_strides, elems_per_vector * bytes);
         });
}

bool has_plain_sinks(const Problem& problem) {
  const RowInput& sinks = problem.row_input;
  const RowResult& weights = problem.row_result;
  const int64_t bytes = size_bytes(sinks.type);
  return problem.operation == Operation::kSoftmax && problem.output.type == problem.inputs[0].type &&
         sinks.data != nullptr && problem.row_ndim <= 3 &&
         (sinks.type == ElementType::kFloat32 || sinks.type == problem.inputs[0].type) &&
         is_plain(problem, sinks.data, bytes, sinks.row_strides, bytes) &&
         (weights.data == nullptr || weights.type == ElementType::kFloat32);
}

Problem without_sinks(const Problem& problem) {
  Problem result = problem;
  result.row_input = {};
  result.row_result = {};
  return with_merged_row_dimensions(result);
}

bool are_plain_columns(const Problem& problem) {
  return has_plain_bounds(problem) && has_plain_padding(problem) &&
         holds_for_operands(problem, [&](const Operand& operand) {
           const int64_t bytes = size_bytes(operand.type);
           return is_plain(problem, operand.data, bytes, operand.row_strides, bytes) &&
                  fits_in_32_bits(operand.col_stride) && fits_in_32_bits(operand.col_stride * bytes);
         });
}

int64_t stage_bytes(const Problem& problem) {
  constexpr int64_t kCopyBytes = 16;
  int64_t result = 0;
  for (int k = 0; k < problem.input_count; ++k) {
    const Operand& input = problem.inputs[k];
    const int64_t elem_bytes = size_bytes(input.type);
    if (!is_plain(problem, input.data, elem_bytes, input.row_strides, kCopyBytes)) {
      return 0;
    }
    result += ceil_divide(problem.cols * elem_bytes, kCopyBytes) * kCopyBytes;
  }
  return result;
}

template <class U>
Divisor<U> make_divisor(U divisor) {
  constexpr unsigned kBits = std::numeric_limits<U>::digits;
  Divisor<U> result;
  result.divisor = divisor;
  while ((U{1} << result.shift) < divisor) {
    ++result.shift;
  }
  const unsigned __int128 power = static_cast<unsigned __int128>(1) << (kBits - 1 + result.shift);
  result.multiplier = static_cast<U>((power + divisor - 1) / divisor);
  return result;
}

template Divisor<uint32_t> make_divisor(uint32_t);
template Divisor<uint64_t> make_divisor(uint64_t);

namespace {

// The size of a row dimension, counted from the innermost; 1 beyond the outermost.
Divisor<uint32_t> size_from_last(const Problem& problem, int dim) {
  return make_divisor(
      static_cast<uint32_t>(dim < problem.row_ndim ? problem.row_sizes[problem.row_ndim - 1 - dim] : 1));
}

PlainRows plain_rows_of(const Problem& problem) {
  PlainRows plain;
  plain.rows = static_cast<uint32_t>(problem.rows);
  plain.inner_rows = size_from_last(problem, 0);
  plain.output = strides_of(problem, problem.output);
  for (int k = 0; k < problem.input_count; ++k) {
    plain.inputs[k] = strides_of(problem, problem.inputs[k]);
  }
  if (problem.lengths.data != nullptr) {
    plain.length_bytes = static_cast<int>(size_bytes(problem.lengths.type));
    plain.lengths = strides_of(problem, problem.lengths.row_strides, plain.length_bytes);
  }
  return plain;
}

PlainSinks plain_sinks_of(const Problem& problem) {
  const int64_t bytes = size_bytes(problem.row_input.type);
  const auto stride = [&](int dim) {
    return dim < problem.row_ndim ? static_cast<int>(problem.row_input.row_strides[problem.row_ndim - 1 - dim] * bytes)
                                  : 0;
  };
  return {size_from_last(problem, 1), size_from_last(problem, 0), stride(2), stride(1), stride(0)};
}

}  // namespace

KernelProblem make_kernel_problem(const Problem& problem, const LaunchPlan& plan, void* workspace) {
  KernelProblem result;
  result.problem = problem;
  // The strided kernels compute an offset for every input, present or not.
  for (int input = problem.input_count; input < kMaxInputs; ++input) {
    result.problem.inputs[input] = Operand{};
    for (int64_t& stride : result.problem.inputs[input].row_strides) {
      stride = 0;
    }
  }
  result.order = plan.order;
  while ((1u << result.cluster_shift) < plan.cluster_size) {
    ++result.cluster_shift;
  }
  while (plan.strategy == Strategy::kColumn && plan.is_plain &&
         (1 << result.column_shift) < column_warps(plan.order, problem.input_count)) {
    ++result.column_shift;
  }
  result.stages = plan.stages;
  result.split_chunks = plan.split_chunks;
  result.workspace = workspace;
  for (int dim = 0; dim < problem.row_ndim; ++dim) {
    result.row_sizes[dim] = make_divisor(static_cast<uint64_t>(problem.row_sizes[dim]));
  }
  if (plan.is_plain && problem.row_input.data != nullptr) {
    result.plain_rows = plain_rows_of(without_sinks(problem));
    result.plain_sinks = plain_sinks_of(problem);
  } else if (plan.is_plain) {
    result.plain_rows = plain_rows_of(problem);
  }
  result.output_is_16_bit = size_bytes(problem.output.type) == 2;
  result.constants_float = constants_in<float>(problem);
  result.constants_double = constants_in<double>(problem);
  return result;
}

}  // namespace masked_softmax::cuda
