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

// A softmax of (batch, head, query) rows with a sink for each head.
constexpr int64_t kBatches = 2;
constexpr int64_t kHeads = 5;
constexpr int64_t kQueries = 4;

Problem problem_with_sinks() {
  Problem problem = plain_problem();
  problem.operation = Operation::kSoftmax;
  problem.input_count = 1;
  problem.row_ndim = 3;
  problem.rows = kBatches * kHeads * kQueries;
  const int64_t sizes[] = {kBatches, kHeads, kQueries};
  const int64_t sink_strides[] = {0, 1, 0};
  int64_t stride = 1;
  for (int dim = 2; dim >= 0; --dim) {
    problem.row_sizes[dim] = sizes[dim];
    problem.output.row_strides[dim] = problem.inputs[0].row_strides[dim] = stride * kCols;
    problem.lengths.row_strides[dim] = stride;
    problem.starts.row_strides[dim] = 0;
    problem.row_input.row_strides[dim] = sink_strides[dim];
    stride *= sizes[dim];
  }
  problem.row_input.data = memory;
  problem.row_result = {memory, ElementType::kFloat32};
  return problem;
}

void set_score_types(Problem& problem, ElementType type) { problem.output.type = problem.inputs[0].type = type; }

struct Case {
  const char* what;
  std::function<void(Problem&)> change;
};

// Whether the condition is as expected for the problem with each of the changes.
template <class Condition>
void check(const Problem& unchanged, const Condition& is_plain, bool expected, const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    Problem problem = unchanged;
    c.change(problem);
    CHECK(is_plain(problem) == expected, c.what << (expected ? ": not plain" : ": plain"));
  }
}

void check(bool expected, const std::vector<Case>& cases) {
  check(plain_problem(), [](const Problem& problem) { return are_plain(problem, kElems); }, expected, cases);
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
  check(plain_problem(), are_plain_columns, true, plain);
  check(plain_problem(), are_plain_columns, false, others);
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

TEST("plan: plain rows take sinks of float32 and of the scores' type, in three dimensions or fewer, with any strides") {
  const std::vector<Case> plain{
      {"a sink for each head", [](Problem&) {}},
      {"16 bits, float32 sinks", [](Problem& p) { set_score_types(p, ElementType::kBFloat16); }},
      {"16 bits, sinks of 16 bits between float32's boundaries",
       [](Problem& p) {
         set_score_types(p, ElementType::kFloat16);
         p.row_input.type = ElementType::kFloat16;
         p.row_input.data = memory + 2;
       }},
      {"one sink for all", [](Problem& p) { p.row_input.row_strides[1] = 0; }},
      {"reversed sinks", [](Problem& p) { p.row_input.row_strides[1] = -3; }},
      {"the largest stride", [](Problem& p) { p.row_input.row_strides[0] = kTooFar / 4 - 1; }},
      {"one dimension", [](Problem& p) { p.row_ndim = 1; }},
      {"no place for the weights", [](Problem& p) { p.row_result = {}; }}};
  const std::vector<Case> others{
      {"no sinks", [](Problem& p) { p.row_input.data = nullptr; }},
      {"log_softmax", [](Problem& p) { p.operation = Operation::kLogSoftmax; }},
      {"a result of another type", [](Problem& p) { p.output.type = ElementType::kBFloat16; }},
      {"float64 sinks", [](Problem& p) { p.row_input.type = ElementType::kFloat64; }},
      {"16-bit sinks of float32 scores", [](Problem& p) { p.row_input.type = ElementType::kBFloat16; }},
      {"sinks of the other 16-bit type",
       [](Problem& p) {
         set_score_types(p, ElementType::kBFloat16);
         p.row_input.type = ElementType::kFloat16;
       }},
      {"float64 weights", [](Problem& p) { p.row_result.type = ElementType::kFloat64; }},
      {"four dimensions",
       [](Problem& p) {
         p.row_ndim = 4;
         p.row_input.row_strides[3] = 0;
       }},
      {"sinks at an odd address", [](Problem& p) { p.row_input.data = memory + 2; }},
      {"a stride whose bytes are beyond 32 bits", [](Problem& p) { p.row_input.row_strides[2] = kTooFar / 4; }}};
  check(problem_with_sinks(), has_plain_sinks, true, plain);
  check(problem_with_sinks(), has_plain_sinks, false, others);
}

TEST("plan: without their sinks, rows have as few dimensions as their own strides allow, and can be plain") {
  const Problem contiguous = without_sinks(problem_with_sinks());
  CHECK(contiguous.row_input.data == nullptr && contiguous.row_result.data == nullptr, "the sinks are left");
  CHECK(contiguous.row_ndim == 1 && contiguous.row_sizes[0] == contiguous.rows, contiguous.row_ndim << " dimensions");
  CHECK(contiguous.rows == problem_with_sinks().rows, contiguous.rows << " rows");
  CHECK(contiguous.inputs[0].row_strides[0] == kCols && contiguous.lengths.row_strides[0] == 1, "other strides");
  CHECK(are_plain(contiguous, kElems), "not plain");

  Problem problem = problem_with_sinks();
  problem.inputs[0].row_strides[0] += kCols;  // a gap between batches
  const Problem batches = without_sinks(problem);
  CHECK(batches.row_ndim == 2 && batches.row_sizes[0] == kBatches && batches.row_sizes[1] == kHeads * kQueries,
        batches.row_ndim << " dimensions");
  CHECK(batches.inputs[0].row_strides[0] == problem.inputs[0].row_strides[0], batches.inputs[0].row_strides[0]);
  CHECK(are_plain(batches, kElems), "not plain");

  problem.lengths.row_strides[1] = 0;  // a length for each batch and query
  CHECK(without_sinks(problem).row_ndim == 3 && !are_plain(without_sinks(problem), kElems), "three are plain");
}
