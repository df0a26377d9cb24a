// The emulator for Python: see emulator.py, whose structures these are.
#include <cstring>

#include "emulate.h"
#include "simt.h"

namespace {

using namespace masked_softmax;

constexpr int kDims = 8;

struct CallOperand {
  void* data;
  int32_t type;
  int64_t col_stride;
  int64_t row_strides[kDims];
};

struct CallIndex {
  const void* data;  // null: `value` for every row
  int32_t type;
  int64_t value;
  int64_t row_strides[kDims];
};

struct Call {
  int32_t operation;
  int32_t strategy;
  int32_t has_clusters;
  uint32_t seed;
  double scale;
  int64_t cols;
  int32_t row_ndim;
  int64_t row_sizes[kDims];
  int32_t input_count;
  CallOperand output;
  CallOperand inputs[kMaxInputs];
  CallIndex lengths;
  CallIndex starts;
  int64_t packed_longest;  // negative: rows are padded
};

Operand operand_of(const CallOperand& from) {
  Operand to;
  to.data = from.data;
  to.type = static_cast<ElementType>(from.type);
  to.col_stride = from.col_stride;
  std::memcpy(to.row_strides, from.row_strides, sizeof(from.row_strides));
  return to;
}

RowIndex index_of(const CallIndex& from) {
  RowIndex to;
  to.data = from.data;
  to.type = static_cast<ElementType>(from.type);
  to.value = from.value;
  std::memcpy(to.row_strides, from.row_strides, sizeof(from.row_strides));
  return to;
}

}  // namespace

// Returns the number of the strategy that ran, and the error in `message`.
extern "C" int masked_softmax_emulate(const Call* call, char* message, size_t message_bytes) {
  Problem problem;
  problem.operation = static_cast<Operation>(call->operation);
  problem.scale = call->scale;
  problem.cols = call->cols;
  problem.rows = 1;
  problem.row_ndim = call->row_ndim;
  for (int dim = 0; dim < call->row_ndim; ++dim) {
    problem.row_sizes[dim] = call->row_sizes[dim];
    problem.rows *= call->row_sizes[dim];
  }
  problem.input_count = call->input_count;
  problem.output = operand_of(call->output);
  for (int k = 0; k < call->input_count; ++k) {
    problem.inputs[k] = operand_of(call->inputs[k]);
  }
  problem.lengths = index_of(call->lengths);
  problem.starts = index_of(call->starts);
  problem.packing.is_packed = call->packed_longest >= 0;
  problem.packing.longest = call->packed_longest;
  const emulator::Emulation done =
      emulator::emulate(problem, static_cast<cuda::Strategy>(call->strategy),
                        call->has_clusters != 0 ? emulator::kWithClusters : emulator::kWithoutClusters, call->seed);
  std::strncpy(message, done.error.c_str(), message_bytes - 1);
  return static_cast<int>(done.strategy);
}
