// A kernel's argument: the problem, and what the host computes once for all rows. Passed by value.
#pragma once

#include "common/exponential.h"
#include "common/problem.h"
#include "cuda/launch_plan.h"

namespace masked_softmax::cuda {

// Division by a divisor known before the launch, as a multiplication: n / divisor = (2n * multiplier) >> (bits + shift)
// for n < 2^(bits - 1), where U has `bits` bits (Granlund and Montgomery, "Division by invariant integers using
// multiplication", PLDI 1994, with one bit of n to spare). A 64-bit division costs a GPU over a hundred instructions.
template <class U>
struct Divisor {
  U divisor = 1;
  U multiplier = U{1} << (std::numeric_limits<U>::digits - 1);
  unsigned shift = 0;
};

template <class U>
Divisor<U> make_divisor(U divisor);  // divisor >= 1

// What follows from a pair of types.
template <class input_t, class output_t>
struct RowTypes {
  using acc_t = std::conditional_t<sizeof(input_t) == 8 || sizeof(output_t) == 8, double, float>;
  // Of a vector: 16 bytes of the widest operand.
  static constexpr int kElems =
      16 / static_cast<int>(sizeof(input_t) > sizeof(output_t) ? sizeof(input_t) : sizeof(output_t));
  // Whether exponentials take the GPU's approximate instruction: exp2.cuh.
  static constexpr bool kApproximate = sizeof(output_t) == 2 && std::is_same_v<acc_t, float>;
};

// What all rows have in common, in an accumulation type.
template <class acc_t>
struct RowConstants {
  // Kernels multiply a forward pass's x by `factor` as they load it (input_factor() in common/problem.h), and then use
  // `scale`, which is problem.scale / factor. Kernels never use problem.scale.
  acc_t factor = 1;
  acc_t scale = 1;
  // log_softmax computes scale * (x - max) as halved_scale * (halving * x - halving * max). Halving is 1/2 where
  // |scale| is below 1: there x - max may overflow although its product with scale does not.
  acc_t halving = 1;
  acc_t halved_scale = 1;         // scale / halving
  ScaledLog2e<acc_t> log2e{1.0};  // times `scale` in a forward pass
  acc_t padding = 0;
};

// kAll: one launch does all of a row's reductions. The others: a launch for each reduction of a split row, and one for
// the results: launch_held_rows() in held_rows.cuh.
enum class Pass : uint8_t { kAll, kMaxima, kSums, kResults };

// Plain rows, the common case, in 32-bit numbers: rows are found in two dimensions, each begins at a multiple of a
// vector's size, and no `starts` are given. See are_plain() for all conditions. Plain columns are the same for rows
// with unit row stride, wherever they begin: are_plain_columns().
struct PlainRows {
  struct Strides {
    int outer = 0;  // bytes
    int inner = 0;
    int col = 0;  // of plain columns
  };
  uint32_t rows = 0;
  Divisor<uint32_t> inner_rows;
  Strides output;
  Strides inputs[2];
  Strides lengths;
  int length_bytes = 0;  // of an integer; 0 if all rows have one length
};

// The sinks of plain rows: found in three dimensions, which are those of the rows with batch, heads and queries apart.
struct PlainSinks {
  Divisor<uint32_t> middle_rows;
  Divisor<uint32_t> inner_rows;
  int outer = 0;  // strides, in bytes
  int middle = 0;
  int inner = 0;
};

struct KernelProblem {
  Problem problem;
  Divisor<uint64_t> row_sizes[kMaxRowDims];
  PlainRows plain_rows;  // if the plan's rows or columns are plain
  bool output_is_16_bit = false;

  RowConstants<float> constants_float;
  RowConstants<double> constants_double;

  SumOrder order;
  unsigned cluster_shift = 0;  // a cluster has 2^cluster_shift blocks
  unsigned column_shift = 0;   // plain columns: 2^column_shift warps share 32 rows
  unsigned stages = 0;         // the plan's
  Pass pass = Pass::kAll;      // of a split row
  int64_t split_chunks = 1;    // the plan's
  void* workspace = nullptr;   // see groups.cuh

  PlainSinks plain_sinks;  // if plain rows have sinks
};

static_assert(sizeof(KernelProblem) <= 4096 - 64, "kernels take at most 4 KiB of arguments; 64 bytes to spare");

template <class acc_t>
MASKED_SOFTMAX_HOST_DEVICE const RowConstants<acc_t>& constants_of(const KernelProblem& kernel_problem) {
  if constexpr (std::is_same_v<acc_t, float>) {
    return kernel_problem.constants_float;
  } else {
    return kernel_problem.constants_double;
  }
}

// Whether rows are plain, for vectors of `elems_per_vector` elements.
bool are_plain(const Problem& problem, int elems_per_vector);
// Whether kernels of plain rows take these sinks: those of a softmax whose result has the scores' type; sinks of that
// type or float32, in at most three dimensions. The rows themselves are plain if those of without_sinks() are.
bool has_plain_sinks(const Problem& problem);
// The same rows in as few dimensions as they have without sinks.
Problem without_sinks(const Problem& problem);
// Whether rows with unit row stride are found like plain rows, and their columns in 32-bit strides.
bool are_plain_columns(const Problem& problem);
// The bytes that a plain row's inputs take in shared memory; 0 if some do not begin at multiples of 16 bytes, as bulk
// copies need.
int64_t stage_bytes(const Problem& problem);

KernelProblem make_kernel_problem(const Problem& problem, const LaunchPlan& plan, void* workspace);

}  // namespace masked_softmax::cuda
