#include "cuda/kernel_problem.h"

namespace masked_softmax::cuda {
namespace {

constexpr int64_t kAlignmentBytes = 16;

bool output_rows_are_aligned(const Problem& problem) {
  const Operand& output = problem.output;
  const int64_t elem_bytes = size_bytes(output.type);
  if (problem.starts.data != nullptr || problem.starts.value * elem_bytes % kAlignmentBytes != 0 ||
      reinterpret_cast<uintptr_t>(output.data) % kAlignmentBytes != 0) {
    return false;
  }
  for (int dim = 0; dim < problem.row_ndim; ++dim) {
    if (output.row_strides[dim] * elem_bytes % kAlignmentBytes != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

Divisor make_divisor(int64_t divisor) {
  Divisor result;
  result.divisor = static_cast<uint64_t>(divisor);
  if (divisor > 1) {
    unsigned bits = 0;  // 2^bits is the smallest power of two that is at least the divisor
    while ((uint64_t{1} << bits) < result.divisor) {
      ++bits;
    }
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (63 + bits);
    result.multiplier = static_cast<uint64_t>((power + result.divisor - 1) / result.divisor);
    result.shift = bits - 1;
  }
  return result;
}

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
  result.split_chunks = plan.split_chunks;
  result.workspace = workspace;
  for (int dim = 0; dim < problem.row_ndim; ++dim) {
    result.row_sizes[dim] = make_divisor(problem.row_sizes[dim]);
  }
  result.output_rows_are_aligned = output_rows_are_aligned(problem);
  result.output_is_16_bit = size_bytes(problem.output.type) == 2;
  result.input_factor = input_factor(problem);
  result.kernel_scale = problem.scale / result.input_factor;
  const double exponent_scale = is_forward(problem.operation) ? result.kernel_scale : 1.0;
  result.log2e_float = ScaledLog2e<float>(exponent_scale);
  result.log2e_double = ScaledLog2e<double>(exponent_scale);
  return result;
}

}  // namespace masked_softmax::cuda
