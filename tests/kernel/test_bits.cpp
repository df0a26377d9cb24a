// A row's bits depend on its valid values, its types, the scale and the instruction set, and on nothing else.
#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

std::string bits_of(const Matrix& matrix, int64_t row, int64_t start, int64_t length) {
  std::string bits;
  for (int64_t i = 0; i < length; ++i) {
    bits += matrix.bits(row, start + i);
  }
  return bits;
}

// Where one row lies among others.
struct Surroundings {
  int64_t cols_behind = 0;
  int64_t start = 0;
  int64_t rows_before = 0;
  int64_t rows_behind = 0;
  bool one_by_one = false;
};

std::string run_among(Operation operation, ElementType type, const CpuCapability& capability, int64_t length,
                      const Surroundings& around) {
  const int64_t rows = around.rows_before + 1 + around.rows_behind;
  const int64_t row = around.rows_before;
  const int64_t cols = around.start + length + around.cols_behind;
  Bounds alone{{0}, {length}};
  std::vector<Matrix> values;
  std::vector<Matrix> inputs;
  for (int k = 0; k < input_count(operation); ++k) {
    values.emplace_back(type, 1, length);
    inputs.emplace_back(type, rows, cols);
  }
  fill_inputs(operation, values, alone, 3);

  Bounds bounds;
  for (int64_t r = 0; r < rows; ++r) {
    bounds.starts.push_back(r == row ? around.start : r % 3);
    bounds.lengths.push_back(r == row ? length : (cols - r % 3) * (r % 5) / 4);
  }
  fill_inputs(operation, inputs, bounds, 5);
  for (size_t k = 0; k < inputs.size(); ++k) {
    for (int64_t i = 0; i < length; ++i) {
      inputs[k].set(row, around.start + i, values[k].get(0, i));
    }
  }

  Matrix output(type, rows, cols);
  const Problem problem = make_problem(operation, output, inputs, bounds, 0.7);
  if (around.one_by_one) {
    for (int64_t r = 0; r < rows; ++r) {
      capability.run_rows(problem, r, r + 1);
    }
  } else {
    capability.run_rows(problem, 0, rows);
  }
  return bits_of(output, row, around.start, length);
}

constexpr int64_t kLengths[] = {1, 5, 16, 31, 64, 100, 257, 2049, 8193};

void check_same_bits(const char* what, const Surroundings& around, ElementType type) {
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : kOperations) {
      for (int64_t length : kLengths) {
        const std::string expected = run_among(operation, type, capability, length, {});
        const std::string got = run_among(operation, type, capability, length, around);
        CHECK(got == expected, what << ": " << capability.name << ' ' << name_of(operation) << ' ' << name_of(type)
                                    << ", row of " << length);
      }
    }
  });
}

}  // namespace

TEST("bits: the same whatever lies around the row") {
  for (ElementType type : kFloatingTypes) {
    check_same_bits("padding behind", {33}, type);
    check_same_bits("padding before", {0, 7}, type);
    check_same_bits("other rows", {9, 2, 37, 5}, type);
  }
}

TEST("bits: the same however the rows are split between threads") {
  Surroundings around{4, 1, 11, 6};
  around.one_by_one = true;
  for (ElementType type : kFloatingTypes) {
    check_same_bits("one by one", around, type);
  }
}

TEST("bits: the same without starts as with starts of 0, padding included") {
  constexpr int64_t kRows = 300;  // more than any kernel takes at once
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : kOperations) {
      for (ElementType type : kFloatingTypes) {
        for (int64_t cols : {5, 16, 33, 63, 64, 65}) {
          Bounds bounds;
          for (int64_t row = 0; row < kRows; ++row) {
            bounds.starts.push_back(0);
            bounds.lengths.push_back(row % 4 == 0 ? cols : row % (cols + 1));
          }
          std::vector<Matrix> inputs;
          for (int k = 0; k < input_count(operation); ++k) {
            inputs.emplace_back(type, kRows, cols);
          }
          fill_inputs(operation, inputs, bounds, 5);
          Matrix with_starts(type, kRows, cols);
          Matrix without_starts(type, kRows, cols);
          capability.run_rows(make_problem(operation, with_starts, inputs, bounds, 0.7), 0, kRows);
          Problem problem = make_problem(operation, without_starts, inputs, bounds, 0.7);
          problem.starts = RowIndex{};
          capability.run_rows(problem, 0, kRows);
          for (int64_t row = 0; row < kRows; ++row) {
            CHECK(bits_of(with_starts, row, 0, cols) == bits_of(without_starts, row, 0, cols),
                  capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << ", row " << row << " of "
                                  << cols << " columns");
          }
        }
      }
    }
  });
}

TEST("bits: the same with non-temporal stores") {
  for (const Surroundings& around : {Surroundings{9, 2, 37, 5}, Surroundings{0, 0, 40, 3}}) {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          for (int64_t length : kLengths) {
            std::vector<std::string> bits;
            for_each_store_hint([&] { bits.push_back(run_among(operation, type, capability, length, around)); });
            CHECK(bits.front() == bits.back(),
                  capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << ", row of " << length);
          }
        }
      }
    });
  }
}

TEST("bits: in place, over the input") {
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
      for (ElementType type : kFloatingTypes) {
        for (int64_t col_stride : {1, 3}) {
          for (int64_t length : kLengths) {
            const Bounds bounds{{2, 0}, {length, length}};
            std::vector<Matrix> inputs{Matrix(type, 2, length + 2, col_stride)};
            fill_inputs(operation, inputs, bounds, 3);
            Matrix apart(type, 2, length + 2, col_stride);
            capability.run_rows(make_problem(operation, apart, inputs, bounds), 0, 2);
            capability.run_rows(make_problem(operation, inputs[0], inputs, bounds), 0, 2);
            for (int64_t row : {0, 1}) {
              CHECK(bits_of(inputs[0], row, 0, length + 2) == bits_of(apart, row, 0, length + 2),
                    capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << ", row of " << length);
            }
          }
        }
      }
    }
  });
}

}  // namespace kernel_tests
