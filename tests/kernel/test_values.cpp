// Every instruction set, operation, type and length: right values, exact padding, and nothing written beside the rows.
#include "check.h"
#include "reference.h"

namespace kernel_tests {
namespace {

struct Case {
  Operation operation;
  ElementType input_type;
  ElementType output_type;
  double scale = 1.0;
  int64_t col_stride = 1;
  int64_t shift = 0;
  double spread = 3.0;
};

void check_row(const Case& c, const char* capability, const std::vector<Matrix>& inputs, const Matrix& output,
               const Bounds& bounds, int64_t row) {
  const int64_t start = bounds.starts[static_cast<size_t>(row)];
  const int64_t length = bounds.lengths[static_cast<size_t>(row)];
  const std::vector<Expected> expected = expected_row(c.operation, inputs, row, bounds, c.scale, output.type());
  const double padding = c.operation == Operation::kLogSoftmax ? -std::numeric_limits<double>::infinity() : 0.0;
  for (int64_t col = 0; col < output.cols(); ++col) {
    const double got = output.get(row, col);
    const auto where = [&] {
      std::ostringstream text;
      text << capability << ' ' << name_of(c.operation) << ' ' << name_of(c.input_type) << " to "
           << name_of(output.type()) << ", scale " << c.scale << ", stride " << c.col_stride << ", row of " << length
           << " from " << start << ", column " << col << ": got " << got;
      return text.str();
    };
    if (col < start || col >= start + length) {
      CHECK(got == padding && std::signbit(got) == std::signbit(padding), where() << ", padding is " << padding);
    } else {
      const Expected& want = expected[static_cast<size_t>(col - start)];
      CHECK(std::fabs(got - want.value) <= want.tolerance, where()
                                                               << ", expected " << static_cast<double>(want.value)
                                                               << " within " << static_cast<double>(want.tolerance));
    }
  }
}

void check_case(const Case& c, const Bounds& bounds, int64_t cols) {
  const auto rows = static_cast<int64_t>(bounds.lengths.size());
  std::vector<Matrix> inputs;
  for (int k = 0; k < input_count(c.operation); ++k) {
    inputs.emplace_back(c.input_type, rows, cols, c.col_stride, c.shift, 3);
  }
  fill_inputs(c.operation, inputs, bounds, 7, c.spread);
  for_each_capability([&](const CpuCapability& capability) {
    Matrix output(c.output_type, rows, cols, c.col_stride, c.shift, 5);
    const Problem problem = make_problem(c.operation, output, inputs, bounds, c.scale);
    capability.run_rows(problem, 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      check_row(c, capability.name, inputs, output, bounds, row);
    }
    CHECK(output.surroundings_are_untouched(), capability.name << ' ' << name_of(c.operation));
  });
}

// A row for every length up to cols, from changing starts.
Bounds every_length(int64_t cols) {
  Bounds bounds;
  for (int64_t length = 0; length <= cols; ++length) {
    bounds.lengths.push_back(length);
    bounds.starts.push_back((length * 5) % (cols - length + 1));
  }
  return bounds;
}

// Rows around the sizes at which the strategy changes: a flush, a block, a tile, the scratch buffer.
Bounds threshold_lengths(int64_t* cols) {
  Bounds bounds;
  for (int64_t threshold : {64, 128, 256, 512, 1024, 2048, 4096, 8192}) {
    for (int64_t length : {threshold - 1, threshold, threshold + 1}) {
      bounds.lengths.push_back(length);
      bounds.starts.push_back(length % 7);
    }
  }
  *cols = 8192 + 17;
  return bounds;
}

}  // namespace

TEST("values: every operation, type and length around the vector widths") {
  const Bounds bounds = every_length(70);
  for (Operation operation : kOperations) {
    for (ElementType input_type : kFloatingTypes) {
      for (ElementType output_type : kFloatingTypes) {
        check_case({operation, input_type, output_type}, bounds, 70);
      }
    }
  }
}

TEST("values: rows at the sizes where the strategy changes") {
  int64_t cols = 0;
  const Bounds bounds = threshold_lengths(&cols);
  for (Operation operation : kOperations) {
    for (ElementType type : kFloatingTypes) {
      check_case({operation, type, type}, bounds, cols);
    }
  }
}

TEST("values: any scale") {
  const Bounds bounds = every_length(40);
  for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax, Operation::kSoftmaxBackward}) {
    for (ElementType type : kFloatingTypes) {
      for (double scale : {-1.0, 0.125, -3.7, 1e-30, 0.0}) {
        check_case({operation, type, type, scale}, bounds, 40);
      }
    }
  }
}

TEST("values: any stride and alignment, without a copy") {
  const Bounds bounds = every_length(40);
  for (Operation operation : kOperations) {
    for (ElementType type : kFloatingTypes) {
      check_case({operation, type, type, 1.0, 3}, bounds, 40);
      for (int64_t shift = 1; shift < 4; ++shift) {
        check_case({operation, type, type, 1.0, 1, shift}, bounds, 40);
      }
    }
  }
}

TEST("values: scores far apart, whose exponentials underflow") {
  const Bounds bounds = every_length(40);
  for (ElementType type : {ElementType::kFloat64, ElementType::kFloat32}) {
    for (double spread : {40.0, 400.0}) {
      Case c{Operation::kSoftmax, type, type};
      c.spread = spread;
      check_case(c, bounds, 40);
      c.operation = Operation::kLogSoftmax;
      check_case(c, bounds, 40);
    }
  }
}

TEST("values: infinities and NaN among the valid elements stay in their row") {
  const double infinity = std::numeric_limits<double>::infinity();
  const Bounds bounds{{0, 0, 0, 0, 0, 0}, {20, 20, 20, 20, 3, 20}};
  for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
    for (ElementType type : kFloatingTypes) {
      std::vector<Matrix> inputs{Matrix(type, 6, 24)};
      fill_inputs(operation, inputs, bounds, 11);
      inputs[0].set(1, 19, std::numeric_limits<double>::quiet_NaN());
      inputs[0].set(2, 3, infinity);
      inputs[0].set(3, 5, -infinity);
      for (int64_t col = 0; col < 3; ++col) {
        inputs[0].set(4, col, -infinity);
      }
      for_each_capability([&](const CpuCapability& capability) {
        Matrix output(type, 6, 24);
        capability.run_rows(make_problem(operation, output, inputs, bounds), 0, 6);
        const Case c{operation, type, type};
        check_row(c, capability.name, inputs, output, bounds, 0);
        check_row(c, capability.name, inputs, output, bounds, 5);
        for (int64_t row : {1, 2, 4}) {
          for (int64_t col = 0; col < bounds.lengths[static_cast<size_t>(row)]; ++col) {
            CHECK(std::isnan(output.get(row, col)), capability.name << ' ' << name_of(operation) << ' ' << name_of(type)
                                                                    << " row " << row << ": " << output.get(row, col));
          }
        }
        const double nothing = operation == Operation::kSoftmax ? 0.0 : -infinity;
        CHECK(output.get(3, 5) == nothing, capability.name << ' ' << name_of(operation) << ": " << output.get(3, 5));
        CHECK(std::isfinite(output.get(3, 4)), capability.name << ": " << output.get(3, 4));
      });
    }
  }
}

TEST("types: a bool is true in any byte but 0") {
  constexpr int64_t kCols = 40;
  const Bounds bounds{{0, 3}, {kCols, 9}};
  std::vector<Matrix> bools{Matrix(ElementType::kBool, 2, kCols)};
  std::vector<Matrix> numbers{Matrix(ElementType::kFloat32, 2, kCols)};
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      const auto byte = static_cast<unsigned char>(col % 3 * (7 * col + row));
      static_cast<unsigned char*>(bools[0].operand().data)[row * bools[0].operand().row_strides[0] + col] = byte;
      numbers[0].set(row, col, byte == 0 ? 0 : 1);
    }
  }
  for_each_capability([&](const CpuCapability& capability) {
    for (ElementType type : kFloatingTypes) {
      Matrix of_bools(type, 2, kCols);
      Matrix of_numbers(type, 2, kCols);
      capability.run_rows(make_problem(Operation::kSoftmax, of_bools, bools, bounds), 0, 2);
      capability.run_rows(make_problem(Operation::kSoftmax, of_numbers, numbers, bounds), 0, 2);
      for (int64_t row = 0; row < 2; ++row) {
        for (int64_t col = 0; col < kCols; ++col) {
          CHECK(of_bools.bits(row, col) == of_numbers.bits(row, col),
                capability.name << ' ' << name_of(type) << ", row " << row << ", column " << col);
        }
      }
    }
  });
}

}  // namespace kernel_tests
