// A Problem as kernels take it: with what finding a row's memory needs beside, and all of it by value.
#pragma once

#include "common/exponential.h"
#include "common/problem.h"
#include "cuda/launch_plan.h"

namespace masked_softmax {
namespace cuda {

// Division by a number that is known before the launch, as a multiplication: n / divisor = (n * multiplier) >> (64 +
// shift) for 0 <= n < 2^63 (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994,
// with one bit of n to spare). A 64-bit division costs a GPU over a hundred instructions.
struct Divisor {
  uint64_t divisor = 1;
  uint64_t multiplier = 0;
  unsigned shift = 0;
};

Divisor make_divisor(int64_t divisor);  // divisor >= 1

struct KernelProblem {
  Problem problem;
  Divisor row_sizes[kMaxRowDims];
  // Whether every row of the output begins, with its valid columns, at a multiple of 16 bytes.
  bool output_rows_are_aligned = false;
  double factor = 1.0;  // forward passes: see input_factor()

  // RowScale and log2(e), in both computing types.
  ScaledLog2e<float> exponent_float{1.0};
  ScaledLog2e<double> exponent_double{1.0};
  double scale = 1.0;

  SumOrder order;
  // What the pieces of split rows leave for each other; see split_rows.cuh.
  int64_t pieces = 1;
  void* workspace = nullptr;
};

// Kernels take at most 4 KiB of arguments.
static_assert(sizeof(KernelProblem) <= 4096 - 64, "a kernel's arguments are limited");

KernelProblem make_kernel_problem(const Problem& problem, const LaunchPlan& plan, void* workspace);

}  // namespace cuda
}  // namespace masked_softmax
