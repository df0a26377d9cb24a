// Sinks and their weights, and the operations that return or take one number a row: right values on every instruction
// set, and nothing written beside the results.
#include <functional>

#include "check.h"
#include "reference.h"

namespace kernel_tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// One number a row, in memory that is poison around it.
RowInput row_input_of(Matrix& numbers) {
  const Operand operand = numbers.operand();
  RowInput input;
  input.data = operand.data;
  input.type = operand.type;
  input.row_strides[0] = operand.row_strides[0];
  return input;
}

ElementType acc_type(ElementType input, ElementType output) {
  const bool is_double = input == ElementType::kFloat64 || output == ElementType::kFloat64;
  return is_double ? ElementType::kFloat64 : ElementType::kFloat32;
}

// Every length around the vector widths, and rows at the sizes where the strategy changes.
Bounds short_and_long_rows(int64_t cols) {
  Bounds bounds;
  for (int64_t length :
       {0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 500, 1000, 4096, 8192, 8193}) {
    if (length <= cols) {
      bounds.lengths.push_back(length);
      bounds.starts.push_back(length * 5 % (cols - length + 1));
    }
  }
  return bounds;
}

// The sink of each row: none, near the scores, far below and above them, where its term is out of float32's range.
double sink_of(int64_t row) {
  constexpr double kSinks[] = {-kInfinity, 0.5, -2.0, 4.0, -40.0, 60.0, -110.0, 300.0, -2000.0, 6e4};
  return kSinks[row % 10];
}

std::vector<real> valid_elements(const Matrix& matrix, int64_t row, const Bounds& bounds) {
  std::vector<real> values;
  for (int64_t i = 0; i < bounds.lengths[static_cast<size_t>(row)]; ++i) {
    values.push_back(matrix.get(row, bounds.starts[static_cast<size_t>(row)] + i));
  }
  return values;
}

void check_near(double got, const Expected& want, ElementType type, bool in_double, const std::string& where) {
  const real tolerance = want.tolerance + rounding_of(type, in_double, want.value);
  CHECK(got == want.value || std::fabs(got - want.value) <= tolerance,
        where << ": got " << got << ", expected " << static_cast<double>(want.value) << " within "
              << static_cast<double>(tolerance));
}

struct SinkCase {
  Operation operation;
  ElementType input_type;
  ElementType output_type;
  ElementType sink_type = ElementType::kFloat32;
  double scale = 1.0;
  int64_t col_stride = 1;
  double offset = 0.0;  // of the scores and the sinks
};

void check_sinks(const SinkCase& c, int64_t cols) {
  const Bounds bounds = short_and_long_rows(cols);
  const auto rows = static_cast<int64_t>(bounds.lengths.size());
  const ElementType acc = acc_type(c.input_type, c.output_type);
  const bool in_double = acc == ElementType::kFloat64;
  std::vector<Matrix> inputs{Matrix(c.input_type, rows, cols, c.col_stride, 0, 3)};
  fill_inputs(c.operation, inputs, bounds, 7);
  Matrix sinks(c.sink_type, rows, 1, 1, 2, 3);
  for (int64_t row = 0; row < rows; ++row) {
    sinks.set(row, 0, sink_of(row) + c.offset * c.scale);
    for (int64_t i = 0; i < bounds.lengths[static_cast<size_t>(row)]; ++i) {
      const int64_t col = bounds.starts[static_cast<size_t>(row)] + i;
      inputs[0].set(row, col, inputs[0].get(row, col) + c.offset);
    }
  }
  for_each_capability([&](const CpuCapability& capability) {
    Matrix output(c.output_type, rows, cols, c.col_stride, 0, 5);
    Matrix weights(acc, rows, 1);
    Problem problem = make_problem(c.operation, output, inputs, bounds, c.scale);
    problem.row_input = row_input_of(sinks);
    problem.row_result = {weights.operand().data, acc};
    problem.padding = -7.0;
    capability.run_rows(problem, 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      const std::vector<real> x = valid_elements(inputs[0], row, bounds);
      const double sink = sinks.get(row, 0);
      std::ostringstream where;
      where << capability.name << ' ' << name_of(c.operation) << ' ' << name_of(c.input_type) << " to "
            << name_of(c.output_type) << ", scale " << c.scale << ", row of " << x.size() << ", sink " << sink;
      const int64_t start = bounds.starts[static_cast<size_t>(row)];
      for (int64_t col = 0; col < cols; ++col) {
        const bool is_valid = col >= start && col < start + static_cast<int64_t>(x.size());
        CHECK(is_valid || output.get(row, col) == -7.0, where.str() << ": padding " << output.get(row, col));
      }
      if (x.empty()) {
        CHECK(weights.get(row, 0) == (sink == -kInfinity ? 0 : 1), where.str() << ": weight " << weights.get(row, 0));
        continue;
      }
      const ExpectedForward expected = expected_forward_and_row_numbers(x, c.operation == Operation::kLogSoftmax,
                                                                        c.scale, epsilon_of(in_double), sink);
      for (size_t i = 0; i < x.size(); ++i) {
        check_near(output.get(row, start + static_cast<int64_t>(i)), expected.y[i], c.output_type, in_double,
                   where.str() + ", element " + std::to_string(i));
      }
      check_near(weights.get(row, 0), expected.sink_weight, acc, in_double, where.str() + ", the weight");
    }
    CHECK(output.surroundings_are_untouched() && weights.surroundings_are_untouched(), capability.name);
  });
}

bool is_same(double got, double expected) { return got == expected || (std::isnan(got) && std::isnan(expected)); }

// One row; others: 0 for random numbers.
Matrix row_of(ElementType type, int64_t cols, double first, double others) {
  std::vector<Matrix> rows{Matrix(type, 1, cols)};
  fill_inputs(Operation::kSoftmax, rows, {{0}, {cols}}, 3);
  for (int64_t col = 1; others != 0 && col < cols; ++col) {
    rows[0].set(0, col, others);
  }
  rows[0].set(0, 0, first);
  return rows[0];
}

// The results of a reduction, or of row_scale: check(row, got, where).
void check_values(const Problem& problem, const Matrix& results,
                  const std::function<Expected(int64_t row, int64_t col)>& expected, bool in_double,
                  const char* capability) {
  for (int64_t row = 0; row < results.rows(); ++row) {
    for (int64_t col = 0; col < results.cols(); ++col) {
      std::ostringstream where;
      where << capability << ' ' << name_of(problem.operation) << ' ' << name_of(problem.inputs[0].type) << " row "
            << row << ", column " << col;
      check_near(results.get(row, col), expected(row, col), results.type(), in_double, where.str());
    }
  }
  CHECK(results.surroundings_are_untouched(), capability << ' ' << name_of(problem.operation));
}

}  // namespace

TEST("row numbers: softmax and log_softmax with sinks, and the sinks' weights") {
  for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
    for (ElementType input_type : kFloatingTypes) {
      for (ElementType output_type : kFloatingTypes) {
        check_sinks({operation, input_type, output_type}, 140);
      }
    }
    for (ElementType type : kFloatingTypes) {
      check_sinks({operation, type, type}, 8200);
      for (double scale : {-1.0, 0.125, -3.7, 1e-30, 0.0}) {
        check_sinks({operation, type, type, ElementType::kFloat64, scale}, 140);
      }
      check_sinks({operation, type, type, type, 1.0, 3}, 140);
    }
  }
}

TEST("row numbers: sinks beside large scores") {
  for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
    for (ElementType type : {ElementType::kFloat64, ElementType::kFloat32}) {
      for (double offset : {1e4, -1e6}) {
        SinkCase c{operation, type, type, ElementType::kFloat64, 0.5};
        c.offset = offset;
        check_sinks(c, 8200);
      }
    }
  }
}

// Results above 2^-126 or 2^-1022 are as accurate as promised, without the allowance of rounding_of().
TEST("row numbers: sinks that leave a row results around the smallest normal number, or none") {
  for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
    for (ElementType type : {ElementType::kFloat32, ElementType::kFloat64}) {
      const bool in_double = type == ElementType::kFloat64;
      const real smallest = in_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
      std::vector<double> distances = {200, 1000, 1e30};
      for (double d = in_double ? 706 : 85; d < (in_double ? 713 : 91); d += 0.25) {
        distances.push_back(d);
      }
      const auto rows = static_cast<int64_t>(distances.size());
      for (int64_t cols : {1, 20, 9000}) {
        const Bounds bounds{std::vector<int64_t>(distances.size(), 0), std::vector<int64_t>(distances.size(), cols)};
        std::vector<Matrix> inputs{Matrix(type, rows, cols)};
        fill_inputs(operation, inputs, bounds, 11, /*spread=*/1.0);
        Matrix sinks(ElementType::kFloat64, rows, 1);
        for (int64_t row = 0; row < rows; ++row) {
          inputs[0].set(row, cols / 2, 5.25);  // the maximum
          sinks.set(row, 0, distances[static_cast<size_t>(row)] + 5.25);
        }
        for_each_capability([&](const CpuCapability& capability) {
          Matrix output(type, rows, cols);
          Matrix weights(type, rows, 1);
          Problem problem = make_problem(operation, output, inputs, bounds);
          problem.row_input = row_input_of(sinks);
          problem.row_result = {weights.operand().data, type};
          capability.run_rows(problem, 0, rows);
          for (int64_t row = 0; row < rows; ++row) {
            const ExpectedForward expected = expected_forward_and_row_numbers(valid_elements(inputs[0], row, bounds),
                                                                              operation == Operation::kLogSoftmax, 1,
                                                                              epsilon_of(in_double), sinks.get(row, 0));
            std::ostringstream where;
            where << capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << ", " << cols
                  << " columns, a sink " << distances[static_cast<size_t>(row)] << " above: ";
            for (int64_t col = 0; col < cols; ++col) {
              const double got = output.get(row, col);
              const Expected& want = expected.y[static_cast<size_t>(col)];
              const bool is_right = std::fabs(want.value) >= smallest ? std::fabs(got - want.value) <= want.tolerance
                                    : want.value < smallest / 1e6     ? got == 0
                                                                      : got >= 0 && got <= smallest;
              CHECK(is_right, where.str() << "got " << got << ", expected " << static_cast<double>(want.value));
            }
            check_near(weights.get(row, 0), expected.sink_weight, type, in_double, where.str() + "the weight");
          }
        });
      }
    }
  }
}

TEST("row numbers: a sink of -inf is none, bit for bit") {
  constexpr int64_t kCols = 8200;
  const Bounds bounds = short_and_long_rows(kCols);
  const auto rows = static_cast<int64_t>(bounds.lengths.size());
  for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
    for (ElementType type : kFloatingTypes) {
      std::vector<Matrix> inputs{Matrix(type, rows, kCols)};
      fill_inputs(operation, inputs, bounds, 7);
      Matrix sinks(ElementType::kFloat32, rows, 1);
      for (int64_t row = 0; row < rows; ++row) {
        sinks.set(row, 0, -kInfinity);
      }
      for_each_capability([&](const CpuCapability& capability) {
        Matrix without(type, rows, kCols);
        Matrix with(type, rows, kCols);
        capability.run_rows(make_problem(operation, without, inputs, bounds), 0, rows);
        Problem problem = make_problem(operation, with, inputs, bounds);
        problem.row_input = row_input_of(sinks);
        capability.run_rows(problem, 0, rows);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t col = 0; col < kCols; ++col) {
            CHECK(with.bits(row, col) == without.bits(row, col),
                  capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << " row " << row);
          }
        }
      });
    }
  }
}

TEST("row numbers: infinities and NaN, in the row and as its sink") {
  struct Edge {
    double first;
    double others;  // 0: random numbers
    double sink;
    double y;  // of softmax; NaN: that of log_softmax is NaN too, otherwise it is -inf
    double weight;
  };
  constexpr Edge kEdges[] = {
      {-kInfinity, -kInfinity, 0.5, 0, 1},
      {-kInfinity, -kInfinity, 1e305, 0, 1},
      {-kInfinity, -kInfinity, -1e305, 0, 1},
      {-kInfinity, -kInfinity, -kInfinity, kNan, kNan},
      {kNan, 0, -kInfinity, kNan, kNan},
      {kNan, -kInfinity, -kInfinity, kNan, kNan},
      {kInfinity, 0, -kInfinity, kNan, kNan},
      {kNan, 0, 0.5, kNan, kNan},
      {kNan, 0, -1e305, kNan, kNan},
      {kNan, -kInfinity, 0.5, kNan, kNan},
      {kInfinity, 0, 0.5, kNan, kNan},
      {0, 0, kInfinity, kNan, kNan},
      {0, 0, kNan, kNan, kNan},
      {-kInfinity, -kInfinity, kNan, kNan, kNan},
  };
  for (ElementType type : kFloatingTypes) {
    for (int64_t cols : {1, 20, 9000}) {
      for (const Edge& edge : kEdges) {
        for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
          const Bounds bounds{{0}, {cols}};
          std::vector<Matrix> inputs{row_of(type, cols, edge.first, edge.others)};
          Matrix sinks(ElementType::kFloat64, 1, 1);
          sinks.set(0, 0, edge.sink);
          const double y = operation == Operation::kLogSoftmax && edge.y == 0 ? -kInfinity : edge.y;
          for_each_capability([&](const CpuCapability& capability) {
            Matrix output(type, 1, cols);
            Matrix weights(ElementType::kFloat64, 1, 1);
            Problem problem = make_problem(operation, output, inputs, bounds);
            problem.row_input = row_input_of(sinks);
            problem.row_result = {weights.operand().data, ElementType::kFloat64};
            capability.run_rows(problem, 0, 1);
            CHECK(is_same(output.get(0, cols - 1), y) && is_same(weights.get(0, 0), edge.weight),
                  capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << ", " << cols
                                  << " columns, first " << edge.first << ", others " << edge.others << ", sink "
                                  << edge.sink << ": " << output.get(0, cols - 1) << ", weight " << weights.get(0, 0));
          });
        }
      }
    }
  }
}

TEST("row numbers: the logsumexp of infinities and NaN is torch's") {
  struct Edge {
    double first;
    double others;  // 0: random numbers
    double logsumexp;
  };
  constexpr Edge kEdges[] = {
      {-kInfinity, -kInfinity, -kInfinity},
      {kNan, 0, kNan},
      {kNan, -kInfinity, kNan},
      {kInfinity, 0, kInfinity},
      {kNan, kInfinity, kNan},
      {kInfinity, kInfinity, kInfinity},
  };
  for (ElementType type : kFloatingTypes) {
    for (int64_t cols : {1, 20, 9000}) {
      for (const Edge& edge : kEdges) {
        const Bounds bounds{{0}, {cols}};
        std::vector<Matrix> inputs{row_of(type, cols, edge.first, edge.others)};
        for_each_capability([&](const CpuCapability& capability) {
          Matrix shape(type, 1, cols);
          Matrix results(type, 1, 1);
          Problem problem = make_problem(Operation::kLogSumExp, shape, inputs, bounds);
          problem.output = results.operand();
          problem.row_result = {results.operand().data, type};
          capability.run_rows(problem, 0, 1);
          CHECK(is_same(results.get(0, 0), edge.logsumexp),
                capability.name << ' ' << name_of(type) << ", " << cols << " columns, first " << edge.first
                                << ", others " << edge.others << ": " << results.get(0, 0));
        });
      }
    }
  }
}

TEST("row numbers: logsumexp, row_dot and row_scale") {
  for (ElementType type : kFloatingTypes) {
    const bool in_double = type == ElementType::kFloat64;
    const real eps = epsilon_of(in_double);
    for (int64_t cols : {140, 8200}) {
      for (double scale : {1.0, -3.7}) {
        const Bounds bounds = short_and_long_rows(cols);
        const auto rows = static_cast<int64_t>(bounds.lengths.size());
        std::vector<Matrix> two{Matrix(type, rows, cols), Matrix(type, rows, cols, 1, 0, 3)};
        fill_inputs(Operation::kSoftmaxBackward, two, bounds, 5);
        std::vector<Matrix> one{two[0]};
        Matrix factors(ElementType::kFloat32, rows, 1, 1, 1, 2);
        for (int64_t row = 0; row < rows; ++row) {
          factors.set(row, 0, 1.5 - static_cast<double>(row));
        }
        for_each_capability([&](const CpuCapability& capability) {
          const auto reduced = [&](Operation operation, std::vector<Matrix>& inputs,
                                   const std::function<Expected(int64_t, int64_t)>& expected) {
            Matrix shape(type, rows, cols);  // a reduction has no elements to write
            Matrix results(type, rows, 1);
            Problem problem = make_problem(operation, shape, inputs, bounds, scale);
            problem.output = results.operand();
            problem.row_result = {results.operand().data, type};
            capability.run_rows(problem, 0, rows);
            check_values(problem, results, expected, in_double, capability.name);
          };
          reduced(Operation::kLogSumExp, one, [&](int64_t row, int64_t /*col*/) -> Expected {
            const std::vector<real> x = valid_elements(one[0], row, bounds);
            return x.empty() ? Expected{-kInfinity, 0}
                             : expected_forward_and_row_numbers(x, false, scale, eps, -kInfinity).logsumexp;
          });
          reduced(Operation::kRowDot, two, [&](int64_t row, int64_t /*col*/) -> Expected {
            const std::vector<real> a = valid_elements(two[0], row, bounds);
            const std::vector<real> b = valid_elements(two[1], row, bounds);
            real dot = 0;
            real magnitude = 0;
            for (size_t i = 0; i < a.size(); ++i) {
              dot += a[i] * b[i];
              magnitude += std::fabs(a[i] * b[i]);
            }
            return {scale * dot, 8 * eps * std::fabs(static_cast<real>(scale)) * magnitude};
          });
          Matrix scaled(type, rows, cols);
          Problem problem = make_problem(Operation::kRowScale, scaled, one, bounds, scale);
          problem.row_input = row_input_of(factors);
          capability.run_rows(problem, 0, rows);
          check_values(
              problem, scaled,
              [&](int64_t row, int64_t col) -> Expected {
                const int64_t i = col - bounds.starts[static_cast<size_t>(row)];
                if (i < 0 || i >= bounds.lengths[static_cast<size_t>(row)]) {
                  return {0, 0};
                }
                const real value = static_cast<real>(scale) * one[0].get(row, col) * factors.get(row, 0);
                return {value, 4 * eps * std::fabs(value)};
              },
              in_double, capability.name);
        });
      }
    }
  }
}

}  // namespace kernel_tests
