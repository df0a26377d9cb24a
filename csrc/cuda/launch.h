// Computes a problem on the GPU. The folder, from the call to the arithmetic:
//
//   launch.cu                   the choice of kernels by types and strategy
//   strategies.inc              the table of strategies
//   launch_plan.h               strategy, grid and block from a row's size, and the order of its sums
//   device_properties.h         what the plan must know of the device
//   kernel_problem.h            a kernel's argument
//   held_*.cu                   the kernels of held rows, by type pair
//   held_rows.cuh               held rows, which threads hold in registers: lanes, block, cluster, split; their launch
//   staged_rows.cuh             held rows that come through shared memory: staged
//   plain_columns.cuh           rows with unit row stride, which lanes hold in registers: column
//   strided_*.cu                the kernels of any rows for one accumulation type
//   strided_rows.cuh            rows of any types and layout: column, strided
//   packed_gaps.cuh             NaN in the elements that no packed row covers
//   groups.cuh, row.cuh         threads that share a row; where a row lies
//   sink.cuh                    one more term of a row's sum
//   exp2.cuh                    exponentials
//   vector_access.cuh           16-byte accesses
//   device.cuh                  the GPU's own instructions
//   runtime.h                   the CUDA runtime, for code without kernels
#pragma once

#include "common/problem.h"
#include "cuda/launch_plan.h"
#include "cuda/runtime.h"

namespace masked_softmax::cuda {

// Returns the plan for launch_problem(). It is not valid if the forced strategy cannot compute the problem.
LaunchPlan plan_problem(const Problem& problem, const DeviceProperties& device, Strategy forced);

// Enqueues the kernels and returns. Preconditions: the plan is valid; problem.rows and problem.cols are at least 1;
// `workspace` is device memory of plan.workspace_bytes, aligned to 16 bytes; the output of packed rows is contiguous.
Status launch_problem(const Problem& problem, const LaunchPlan& plan, void* workspace, Stream stream);

}  // namespace masked_softmax::cuda
