// Which rows are plain, so that the kernels may find them with 32-bit numbers and access them in whole vectors.
#include <functional>
#include <limits>
#include <vector>

#include "check.h"
#include "cuda/kernel_problem.h"

namespace {

using namespace masked_softmax;
using namespace masked_softmax::cuda;

constexpr int kElems = 4;  // float32 in 16 bytes
constexpr int64_t kOuter = 3;
constexpr int64_t kInner = 5;
constexpr int64_t kCols = 8;
constexpr int64_t kMostRows = int64_t{1} << 30;  // the kernels add a grid's rows to a row's number
constexpr int64_t kTooFar = int64_t{1} << 31;    // beyond 32 bits, and a multiple of every vector's size

// What operands and lengths point to. None of it is accessed.
alignas(64) char memory[64];

// Plain rows in two dimensions: a derivative, which has two inputs, with a length for each row.
Problem plain_problem() {
  Problem problem;
  problem.operation = Operation::kSoftmaxBackward;
  problem.rows = kOuter * kInner;
  problem.cols = kCols;
  problem.row_ndim = 2;
  problem.row_sizes[0] = kOuter;
  problem.row_sizes[1] = kInner;
  problem.input_count = 2;
  for (Operand* operand : {&problem.output, &problem.inputs[0], &problem.inputs[1]}) {
    operand->data = memory;
    operand->col_stride = 1;
    operand->row_strides[0] = kInner * kCols;
    operand->row_strides[1] = kCols;
  }
  problem.lengths.data = memory;
  problem.lengths.row_strides[0] = kInner;
  problem.lengths.row_strides[1] = 1;
  problem.starts.row_strides[0] = problem.starts.row_strides[1] = 0;
  return problem;
}

struct Case {
  const char* what;
  std::function<void(Problem&)> change;
};

void check(bool expected, const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    Problem problem = plain_problem();
    c.change(problem);
    CHECK(are_plain(problem, kElems) == expected, c.what << (expected ? ": not plain" : ": plain"));
  }
}

}  // namespace

TEST("plan: rows are plain in two dimensions or fewer, with lengths of either type, one for all, or shared") {
  check(true, {{"two dimensions, int64 lengths", [](Problem&) {}},
               {"int32 lengths", [](Problem& p) { p.lengths.type = ElementType::kInt32; }},
               {"int32 lengths at 4 bytes",
                [](Problem& p) {
                  p.lengths.type = ElementType::kInt32;
                  p.lengths.data = memory + 4;
                }},
               {"one length for all", [](Problem& p) { p.lengths.data = nullptr; }},
               {"one length for all, invalid",
                [](Problem& p) {
                  p.lengths.data = nullptr;
                  p.lengths.value = std::numeric_limits<int64_t>::min();
                }},
               {"a length for each outer row", [](Problem& p) { p.lengths.row_strides[1] = 0; }},
               {"one dimension",
                [](Problem& p) {
                  p.row_ndim = 1;
                  p.rows = p.row_sizes[0];
                }},
               {"no dimension",
                [](Problem& p) {
                  p.row_ndim = 0;
                  p.rows = 1;
                }},
               {"one input", [](Problem& p) { p.input_count = 1; }},
               {"an absent input is not looked at",
                [](Problem& p) {
                  p.input_count = 1;
                  p.inputs[1].data = memory + 1;
                  p.inputs[1].col_stride = 2;
                }},
               {"gaps of whole vectors", [](Problem& p) { p.inputs[0].row_strides[1] = kCols + kElems; }},
               {"reversed rows", [](Problem& p) { p.inputs[0].row_strides[1] = -kCols; }},
               {"rows that share their memory", [](Problem& p) { p.inputs[0].row_strides[0] = 0; }},
               {"the largest stride", [](Problem& p) { p.output.row_strides[0] = kTooFar / 4 - kElems; }},
               {"the most rows",
                [](Problem& p) {
                  p.row_sizes[0] = p.rows = kMostRows;
                  p.row_sizes[1] = 1;
                }},
               {"the most columns", [](Problem& p) { p.cols = kTooFar - kElems; }},
               {"16 bits, an 8-byte boundary",
                [](Problem& p) {  // beside float32, a vector has four elements
                  p.output.type = ElementType::kBFloat16;
                  p.output.data = memory + 8;
                }}});
}

TEST("plan: columns are plain at any address and of any number, but for the conditions of plain rows' bounds") {
  const std::vector<Case> plain{{"contiguous rows", [](Problem&) {}},
                                {"columns that are not whole vectors", [](Problem& p) { p.cols = kCols - 1; }},
                                {"strided columns", [](Problem& p) { p.inputs[1].col_stride = -kInner; }},
                                {"an element's boundary", [](Problem& p) { p.output.data = memory + 4; }},
                                {"the largest stride", [](Problem& p) { p.output.col_stride = kTooFar / 4 - 1; }}};
  const std::vector<Case> others{
      {"starts", [](Problem& p) { p.starts.data = memory; }},
      {"uint8 lengths", [](Problem& p) { p.lengths.type = ElementType::kUInt8; }},
      {"three inputs", [](Problem& p) { p.input_count = 3; }},
      {"softmax, another padding", [](Problem& p) { p.operation = Operation::kSoftmax, p.padding = 7; }},
      {"a stride of columns beyond 32 bits", [](Problem& p) { p.inputs[0].col_stride = kTooFar / 4; }},
      {"a stride of rows beyond 32 bits", [](Problem& p) { p.output.row_strides[0] = kTooFar / 4; }}};
  for (bool expected : {true, false}) {
    for (const Case& c : expected ? plain : others) {
      Problem problem = plain_problem();
      c.change(problem);
      CHECK(are_plain_columns(problem) == expected, c.what);
    }
  }
}

TEST("plan: rows are not plain where one of the conditions fails") {
  check(false,
        {{"starts", [](Problem& p) { p.starts.data = memory; }},
         {"softmax, another padding", [](Problem& p) { p.operation = Operation::kSoftmax, p.padding = 7; }},
         {"softmax, padding of -0", [](Problem& p) { p.operation = Operation::kSoftmax, p.padding = -0.0; }},
         {"one start for all", [](Problem& p) { p.starts.value = 4; }},
         {"packed rows",
          [](Problem& p) {
            p.packing.is_packed = true;
            p.packing.longest = kCols / 2;
          }},
         {"three dimensions",
          [](Problem& p) {
            p.row_ndim = 3;
            p.row_sizes[2] = 2;
            p.rows *= 2;
            for (Operand* operand : {&p.output, &p.inputs[0], &p.inputs[1]}) {
              operand->row_strides[2] = 0;
            }
            p.lengths.row_strides[2] = 0;
          }},
         {"three inputs",
          [](Problem& p) {
            p.input_count = 3;
            p.inputs[2] = p.inputs[1];
          }},
         {"more rows than 32 bits count",
          [](Problem& p) {
            p.row_sizes[0] = p.rows = kMostRows + 1;
            p.row_sizes[1] = 1;
          }},
         {"more columns than 32 bits count", [](Problem& p) { p.cols = kTooFar; }},
         {"columns that are not whole vectors", [](Problem& p) { p.cols = kCols - 1; }},
         {"the output's columns are not contiguous", [](Problem& p) { p.output.col_stride = 2; }},
         {"an input's columns are not contiguous", [](Problem& p) { p.inputs[1].col_stride = -1; }},
         {"the output begins between vectors", [](Problem& p) { p.output.data = memory + 4; }},
         {"the first input begins between vectors", [](Problem& p) { p.inputs[0].data = memory + 8; }},
         {"the last input begins between vectors", [](Problem& p) { p.inputs[1].data = memory + 12; }},
         {"16 bits, a 4-byte boundary",
          [](Problem& p) {
            p.output.type = ElementType::kBFloat16;
            p.output.data = memory + 4;
          }},
         {"the output's rows begin between vectors", [](Problem& p) { p.output.row_strides[0] += 1; }},
         {"an input's rows begin between vectors", [](Problem& p) { p.inputs[0].row_strides[1] = kCols + 2; }},
         {"a stride beyond 32 bits", [](Problem& p) { p.inputs[0].row_strides[0] = kTooFar; }},
         {"a stride whose bytes are beyond 32 bits", [](Problem& p) { p.inputs[0].row_strides[0] = kTooFar / 4; }},
         {"the output's stride is beyond 32 bits", [](Problem& p) { p.output.row_strides[0] = -kTooFar; }},
         {"the lengths' stride is beyond 32 bits", [](Problem& p) { p.lengths.row_strides[0] = kTooFar / 8; }},
         {"lengths at an odd address", [](Problem& p) { p.lengths.data = memory + 4; }},
         {"uint8 lengths", [](Problem& p) { p.lengths.type = ElementType::kUInt8; }},
         {"int16 lengths", [](Problem& p) { p.lengths.type = ElementType::kInt16; }}});
}
