// Lengths and starts on a GPU, where the kernel is the first to read them.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "emulate.h"

namespace {

using namespace masked_softmax;
using cuda::Strategy;

constexpr int64_t kRows = 40;
constexpr int64_t kCols = 37;

struct Memory {
  std::vector<float> input = std::vector<float>(kRows * kCols);
  std::vector<float> output = std::vector<float>(kRows * kCols, 7.0f);

  Memory() {
    for (size_t i = 0; i < input.size(); ++i) {
      input[i] = static_cast<float>(i * 7919 % 101) / 10;
    }
  }
};

// Contiguous rows, or rows of unit row stride.
Problem make_problem(Memory& memory, bool unit_row_stride) {
  Problem problem;
  problem.rows = kRows;
  problem.cols = kCols;
  problem.row_ndim = 1;
  problem.row_sizes[0] = kRows;
  for (Operand* operand : {&problem.output, &problem.inputs[0]}) {
    operand->type = ElementType::kFloat32;
    operand->col_stride = unit_row_stride ? kRows : 1;
    operand->row_strides[0] = unit_row_stride ? 1 : kCols;
  }
  problem.output.data = memory.output.data();
  problem.inputs[0].data = memory.input.data();
  problem.lengths.row_strides[0] = 1;
  problem.starts.row_strides[0] = 1;
  return problem;
}

float result(const Memory& memory, bool unit_row_stride, int64_t row, int64_t col) {
  return memory.output[static_cast<size_t>(unit_row_stride ? col * kRows + row : row * kCols + col)];
}

void check_row(const Memory& memory, bool unit_row_stride, int64_t row, int64_t start, int64_t length) {
  double sum = 0;
  for (int64_t col = 0; col < kCols; ++col) {
    const float value = result(memory, unit_row_stride, row, col);
    const bool is_valid = start <= col && col < start + length;
    CHECK(is_valid ? value > 0 && value <= 1 : value == 0 && !std::signbit(value),
          "row " << row << ", column " << col << ": " << value);
    sum += static_cast<double>(value);
  }
  CHECK(std::fabs(sum - (length > 0 ? 1 : 0)) < 1e-6, "row " << row << " sums to " << sum);
}

constexpr Strategy kAll[] = {
#define MASKED_SOFTMAX_STRATEGY(Name, name, Rows) Strategy::k##Name,
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
};

void emulate(const Problem& problem, Strategy strategy) {
  static unsigned seed = 0;
  const emulator::Emulation done = emulator::emulate(problem, strategy, emulator::kWithClusters, ++seed);
  CHECK(done.error.empty(), cuda::strategy_name(strategy) << ": " << done.error);
  CHECK(done.strategy == strategy, cuda::strategy_name(strategy) << ", but got " << strategy_name(done.strategy));
}

template <class T>
void check_index_type(ElementType type) {
  std::vector<T> lengths(kRows * 2);
  std::vector<T> starts(kRows * 2);
  for (int64_t row = 0; row < kRows; ++row) {
    lengths[static_cast<size_t>(row * 2)] = static_cast<T>(row % 7 * 5);
    starts[static_cast<size_t>(row * 2)] = static_cast<T>(row % 5);
  }
  for (Strategy strategy : kAll) {
    if (emulator::takes_plain_rows_only(strategy)) {
      continue;
    }
    const bool unit_row_stride = strategy == Strategy::kColumn;
    Memory memory;
    Problem problem = make_problem(memory, unit_row_stride);
    problem.lengths.data = lengths.data();
    problem.starts.data = starts.data();
    problem.lengths.type = problem.starts.type = type;
    problem.lengths.row_strides[0] = problem.starts.row_strides[0] = 2;
    emulate(problem, strategy);
    for (int64_t row = 0; row < kRows; ++row) {
      check_row(memory, unit_row_stride, row, row % 5, row % 7 * 5);
    }
  }
}

}  // namespace

TEST("lengths: every strategy reads lengths and starts of every integer type, by their strides") {
  const auto check = [](ElementType type) {
    visit_element_type_of<ElementKind::kInteger>(type,
                                                 [&](auto element) { check_index_type<decltype(element)>(type); });
  };
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) \
  if (ElementKind::kind == ElementKind::kInteger) {                   \
    check(ElementType::k##Name);                                      \
  }
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
}

TEST("lengths: an invalid one makes its row NaN, and changes nothing else") {
  constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  // Pairs of start and length.
  const std::vector<std::pair<int64_t, int64_t>> invalid{
      {0, kCols + 1}, {1, kCols},           {0, -1},      {-1, 3},       {kCols + 1, 0}, {kCols, 1},
      {0, kLowest},   {kLargest, kLargest}, {kLowest, 1}, {1, kLargest}, {3, kCols - 2}};
  std::vector<int64_t> lengths(kRows);
  std::vector<int64_t> starts(kRows);
  for (size_t row = 0; row < kRows; ++row) {
    const bool is_invalid = row % 3 == 1;
    starts[row] = is_invalid ? invalid[row / 3 % invalid.size()].first : static_cast<int64_t>(row % 4);
    lengths[row] = is_invalid ? invalid[row / 3 % invalid.size()].second : static_cast<int64_t>(row % 33);
  }
  for (Strategy strategy : kAll) {
    if (emulator::takes_plain_rows_only(strategy)) {
      continue;
    }
    for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
      const bool unit_row_stride = strategy == Strategy::kColumn;
      Memory memory;
      Problem problem = make_problem(memory, unit_row_stride);
      problem.operation = operation;
      problem.lengths.data = lengths.data();
      problem.starts.data = starts.data();
      emulate(problem, strategy);
      for (int64_t row = 0; row < kRows; ++row) {
        if (row % 3 == 1) {
          for (int64_t col = 0; col < kCols; ++col) {
            CHECK(std::isnan(result(memory, unit_row_stride, row, col)), "row " << row << ", column " << col);
          }
        } else if (operation == Operation::kSoftmax) {
          check_row(memory, unit_row_stride, row, starts[static_cast<size_t>(row)], lengths[static_cast<size_t>(row)]);
        }
      }
    }
  }
}
