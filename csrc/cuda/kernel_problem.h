// A kernel's argument: the problem, and what the host computes once for all rows. Passed by value.
#pragma once

#include "common/exponential.h"
#include "common/problem.h"
#include "cuda/launch_plan.h"

namespace masked_softmax::cuda {

// Division by a divisor known before the launch, as a multiplication: n / divisor = (n * multiplier) >> (64 + shift)
// for 0 <= n < 2^63 (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994, with
// one bit of n to spare). A 64-bit division costs a GPU over a hundred instructions.
struct Divisor {
  uint64_t divisor = 1;
  uint64_t multiplier = 0;
  unsigned shift = 0;
};

Divisor make_divisor(int64_t divisor);  // divisor >= 1

// What follows from a pair of types.
template <class input_t, class output_t>
struct RowTypes {
  using acc_t = std::conditional_t<sizeof(input_t) == 8 || sizeof(output_t) == 8, double, float>;
  // Of a vector: 16 bytes of the narrowest operand.
  static constexpr int kElems =
      16 / static_cast<int>(sizeof(input_t) < sizeof(output_t) ? sizeof(input_t) : sizeof(output_t));
  static constexpr int kBlockVectors = block_vectors(kElems);
  // Whether exponentials take the GPU's approximate instruction: exp2.cuh.
  static constexpr bool kApproximate = sizeof(output_t) == 2 && std::is_same_v<acc_t, float>;
};

struct KernelProblem {
  Problem problem;
  Divisor row_sizes[kMaxRowDims];
  bool output_rows_are_aligned = false;  // every row's valid columns begin at a multiple of 16 bytes
  bool output_is_16_bit = false;

  // Kernels multiply a forward pass's x by `input_factor` as they load it (input_factor() in common/problem.h), and
  // then use `kernel_scale`, which is problem.scale / input_factor. Kernels never use problem.scale.
  double input_factor = 1.0;
  double kernel_scale = 1.0;
  // log2(e), times kernel_scale in a forward pass, in both accumulation types.
  ScaledLog2e<float> log2e_float{1.0};
  ScaledLog2e<double> log2e_double{1.0};

  SumOrder order;
  int64_t split_chunks = 1;   // the plan's
  void* workspace = nullptr;  // see split_rows.cuh
};

static_assert(sizeof(KernelProblem) <= 4096 - 64, "kernels take at most 4 KiB of arguments; 64 bytes to spare");

KernelProblem make_kernel_problem(const Problem& problem, const LaunchPlan& plan, void* workspace);

}  // namespace masked_softmax::cuda
