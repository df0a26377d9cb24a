// Values of unusual rows: operands of different types, extreme scales, a million columns, uneven blocks, single
// columns, no columns. And a check of the error bounds themselves: zeros are outside of them.
#include <algorithm>

#include "check.h"
#include "reference.h"

namespace kernel_tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Beyond this distance every probability is 0 anyway, and a bound that went on growing with the distance would accept a
// log_softmax of zeros.
constexpr real kLargestDistance = 1000;

double padding_of(Operation operation) { return operation == Operation::kLogSoftmax ? -kInfinity : 0.0; }

real tolerance_of(const Expected& want, const Problem& problem) {
  if (!is_forward(problem.operation)) {
    return want.tolerance;
  }
  const bool is_double = accumulates_in_double(problem) && !is_scale_extreme(problem);
  const real relative = (4 + kLargestDistance) * epsilon_of(is_double);
  return std::fmin(want.tolerance,
                   relative * std::fabs(want.value) + rounding_of(problem.output.type, is_double, want.value));
}

bool is_close(double got, real value, real tolerance, ElementType type) {
  if (std::fabs(value) > largest_of(type) * (1 + 0x1p-8L)) {
    return got == std::copysign(kInfinity, static_cast<double>(value));
  }
  return std::fabs(got - value) <= tolerance;
}

// Checks every column of one row.
void check_row(const std::string& what, const Problem& problem, const std::vector<Expected>& expected,
               const Matrix& output, const Bounds& bounds, int64_t row) {
  const int64_t start = bounds.starts[static_cast<size_t>(row)];
  const int64_t length = bounds.lengths[static_cast<size_t>(row)];
  const double padding = padding_of(problem.operation);
  for (int64_t col = 0; col < output.cols(); ++col) {
    const double got = output.get(row, col);
    if (col < start || col >= start + length) {
      CHECK(got == padding && std::signbit(got) == std::signbit(padding),
            what << ", row " << row << ", padding in column " << col << " is " << got);
      continue;
    }
    const Expected& want = expected[static_cast<size_t>(col - start)];
    const real tolerance = tolerance_of(want, problem);
    CHECK(is_close(got, want.value, tolerance, output.type()),
          what << ", row " << row << " of " << length << " from " << start << ", column " << col << ": got " << got
               << ", expected " << static_cast<double>(want.value) << " within " << static_cast<double>(tolerance));
  }
}

std::string describe(const CpuCapability& capability, const Problem& problem) {
  std::ostringstream text;
  text << capability.name << ' ' << name_of(problem.operation) << " of";
  for (int k = 0; k < problem.input_count; ++k) {
    text << ' ' << name_of(problem.inputs[k].type);
  }
  text << " to " << name_of(problem.output.type) << ", scale " << problem.scale;
  return text.str();
}

void check_rows(Operation operation, std::vector<Matrix>& inputs, ElementType output_type, const Bounds& bounds,
                double scale = 1.0) {
  std::vector<std::vector<Expected>> expected;
  for (int64_t row = 0; row < inputs[0].rows(); ++row) {
    expected.push_back(expected_row(operation, inputs, row, bounds, scale, output_type));
  }
  for_each_capability([&](const CpuCapability& capability) {
    Matrix output(output_type, inputs[0].rows(), inputs[0].cols(), 1, 0, 1);
    const Problem problem = make_problem(operation, output, inputs, bounds, scale);
    capability.run_rows(problem, 0, problem.rows);
    const std::string what = describe(capability, problem);
    for (int64_t row = 0; row < problem.rows; ++row) {
      check_row(what, problem, expected[static_cast<size_t>(row)], output, bounds, row);
    }
    CHECK(output.surroundings_are_untouched(), what);
  });
}

// Rows so uneven that no block is like the next: empty ones, single elements, and long ones in between.
Bounds uneven_bounds(int64_t rows, int64_t cols, unsigned seed) {
  std::mt19937 random(seed);
  Bounds bounds;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t longest = row % 5 == 0 ? 3 : row % 7 == 0 ? cols : 90;
    bounds.lengths.push_back(static_cast<int64_t>(random()) % (std::min(longest, cols) + 1));
    bounds.starts.push_back(static_cast<int64_t>(random()) % (cols - bounds.lengths.back() + 1));
  }
  return bounds;
}

}  // namespace

TEST("accuracy: zeros, and gradients of zeros, are out of every bound") {
  const Bounds bounds{{0, 0, 0}, {2, 33, 70}};
  for (Operation operation : kOperations) {
    for (ElementType type : kFloatingTypes) {
      std::vector<Matrix> inputs;
      for (int k = 0; k < input_count(operation); ++k) {
        inputs.emplace_back(type, 3, 70);
      }
      fill_inputs(operation, inputs, bounds, 21);
      for (int64_t row = 0; row < 3; ++row) {
        int refused = 0;
        for (const Expected& want : expected_row(operation, inputs, row, bounds, 0.5, type)) {
          refused += std::fabs(want.value) > want.tolerance ? 1 : 0;
        }
        CHECK(2 * refused > bounds.lengths[static_cast<size_t>(row)],
              name_of(operation) << ' ' << name_of(type) << ", row " << row << ": refused " << refused);
      }
    }
  }
}

TEST("types: a derivative's inputs may differ in type; the widest one is the accumulation type") {
  constexpr int64_t kCols = 40;
  Bounds bounds = uneven_bounds(24, kCols, 1);
  for (Operation operation : kOperations) {
    for (ElementType first : kFloatingTypes) {
      for (ElementType last : kFloatingTypes) {
        for (ElementType output_type : kFloatingTypes) {
          std::vector<Matrix> inputs;
          for (int k = 0; k < input_count(operation); ++k) {
            inputs.emplace_back(k == 0 ? first : last, 24, kCols, 1 + k % 2, k);
          }
          fill_inputs(operation, inputs, bounds, 31);
          check_rows(operation, inputs, output_type, bounds, 0.3);
        }
      }
    }
  }
}

TEST("blocks: rows of very different lengths next to each other") {
  constexpr int64_t kCols = 2100;
  const Bounds bounds = uneven_bounds(70, kCols, 2);
  for (Operation operation : kOperations) {
    for (ElementType type : {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat64}) {
      std::vector<Matrix> inputs;
      for (int k = 0; k < input_count(operation); ++k) {
        inputs.emplace_back(type, 70, kCols);
      }
      fill_inputs(operation, inputs, bounds, 41);
      check_rows(operation, inputs, type, bounds);
    }
  }
}

TEST("scale: none is too small or too large, on either side of 0") {
  const Bounds bounds{{0, 1, 2}, {40, 33, 1}};
  for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
    for (ElementType type : {ElementType::kFloat32, ElementType::kFloat64}) {
      const double largest = type == ElementType::kFloat32 ? 2e38 : 1.2e308;
      for (double magnitude : {1e-320, 1e-300, 1e-40, 1e-37, 1e-20, 1e20, 1e37, 1e40, 1e300, 1.7e308}) {
        for (double scale : {magnitude, -magnitude}) {
          // Scores whose scaled distances are a few units wherever the type reaches that far.
          const double spread = std::clamp(3 / magnitude, 1 / largest, largest);
          std::vector<Matrix> inputs{Matrix(type, 3, 41)};
          fill_inputs(operation, inputs, bounds, 51, spread / 3);
          inputs[0].set(0, 7, 1.4 * spread);  // their distance overflows where the spread is the largest
          inputs[0].set(0, 30, -1.4 * spread);
          check_rows(operation, inputs, type, bounds, scale);
        }
      }
      for (double scale : {0.0, -0.0}) {
        std::vector<Matrix> inputs{Matrix(type, 3, 41)};
        fill_inputs(operation, inputs, bounds, 51);
        check_rows(operation, inputs, type, bounds, scale);
      }
    }
  }
}

TEST("scale: it multiplies every derivative, whatever its size and sign") {
  const Bounds bounds = uneven_bounds(20, 60, 3);
  for (Operation operation : kOperations) {
    if (is_forward(operation)) {
      continue;
    }
    for (ElementType type : kFloatingTypes) {
      for (double scale : {-1.0, 0.125, -5.5, 3e4, 1e-4, 0.0}) {
        std::vector<Matrix> inputs;
        for (int k = 0; k < input_count(operation); ++k) {
          inputs.emplace_back(type, 20, 60);
        }
        fill_inputs(operation, inputs, bounds, 61);
        check_rows(operation, inputs, type == ElementType::kFloat16 ? ElementType::kFloat32 : type, bounds, scale);
      }
    }
  }
}

TEST("accuracy: scores that are far from 0 and near each other") {
  for (ElementType type : {ElementType::kFloat32, ElementType::kFloat64}) {
    const int digits = type == ElementType::kFloat32 ? 23 : 52;
    for (int power = 8; power < 2 * digits; power += 2) {
      const double step = power > digits ? std::ldexp(1.0, power - digits) : 1.0;
      for (double sign : {1.0, -1.0}) {
        for (int64_t cols : {40, 300, 9000}) {
          std::vector<Matrix> inputs(1, Matrix(type, 2, cols));
          for (int64_t col = 0; col < cols; ++col) {
            const double near = step * static_cast<double>(col * 7 % 11);
            inputs[0].set(0, col, sign * std::ldexp(1.0, power) + near);
            inputs[0].set(1, col, sign * std::ldexp(1.0, power) - near);
          }
          for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
            for (double scale : {1.0, 0.1}) {  // 0.1 is no float
              check_rows(operation, inputs, type, {{0, 0}, {cols, cols - 1}}, scale / step);
            }
          }
        }
      }
    }
  }
}

TEST("accuracy: the error of a log_softmax's derivatives does not grow with the distance") {
  // Probabilities down to the smallest normal number, a gradient in one column only: elsewhere the result is a single
  // product with exp(y), and relative errors show.
  for (ElementType type : {ElementType::kFloat32, ElementType::kFloat64}) {
    const double farthest = type == ElementType::kFloat32 ? -87.0 : -708.0;
    constexpr int64_t kCols = 300;
    const real eps = epsilon_of(type == ElementType::kFloat64);
    std::vector<Matrix> inputs(3, Matrix(type, 1, kCols));
    for (int64_t col = 0; col < kCols; ++col) {
      inputs[0].set(0, col, 1.25);
      inputs[1].set(0, col, col == 0 ? 3.0 : 0.0);
      inputs[2].set(0, col, farthest * static_cast<double>(col) / kCols);
    }
    const Bounds bounds{{0}, {kCols}};
    std::vector<Matrix> first_order(inputs.begin() + 1, inputs.end());
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : {Operation::kLogSoftmaxBackward, Operation::kLogSoftmaxBackwardWrtY}) {
        const bool second_order = operation == Operation::kLogSoftmaxBackwardWrtY;
        Matrix output(type, 1, kCols);
        const Problem problem = make_problem(operation, output, second_order ? inputs : first_order, bounds);
        capability.run_rows(problem, 0, 1);
        for (int64_t col = 1; col < kCols; ++col) {
          const real want = (second_order ? -1.25L : -1.0L) * 3 * std::exp(static_cast<real>(inputs[2].get(0, col)));
          const real error = (output.get(0, col) - want) / want / eps;
          CHECK(std::fabs(error) <= 8, describe(capability, problem) << ", y " << inputs[2].get(0, col) << ": "
                                                                     << static_cast<double>(error) << " eps off");
        }
      }
    });
  }
}

TEST("edges: a single valid column is exactly 1, or 0; an empty row is padding and never NaN") {
  const Bounds bounds{{0, 3, 5, 0, 6, 2}, {1, 1, 1, 0, 0, 0}};
  for (ElementType type : kFloatingTypes) {
    for (double value : {-60000.0, -1e-3, 0.0, 7.0, 60000.0}) {
      for (double scale : {1.0, -2.5, 1e-300, 1e300}) {
        std::vector<Matrix> inputs{Matrix(type, 6, 6)};
        for (int64_t row = 0; row < 3; ++row) {
          inputs[0].set(row, bounds.starts[static_cast<size_t>(row)], value);
        }
        for_each_capability([&](const CpuCapability& capability) {
          for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax}) {
            Matrix output(type, 6, 6);
            const Problem problem = make_problem(operation, output, inputs, bounds, scale);
            capability.run_rows(problem, 0, 6);
            for (int64_t row = 0; row < 6; ++row) {
              for (int64_t col = 0; col < 6; ++col) {
                const bool is_valid = row < 3 && col == bounds.starts[static_cast<size_t>(row)];
                const double want = !is_valid ? padding_of(operation) : operation == Operation::kSoftmax ? 1.0 : 0.0;
                CHECK(output.get(row, col) == want, describe(capability, problem)
                                                        << ", value " << value << ", row " << row << ": "
                                                        << output.get(row, col));
              }
            }
          }
        });
      }
    }
  }
}

TEST("edges: with a negative scale +inf is probability 0 and -inf makes its row NaN") {
  const Bounds bounds{{0, 0, 0}, {20, 20, 20}};
  for (ElementType type : kFloatingTypes) {
    std::vector<Matrix> inputs{Matrix(type, 3, 20)};
    fill_inputs(Operation::kSoftmax, inputs, bounds, 71);
    inputs[0].set(0, 17, kInfinity);
    inputs[0].set(1, 17, -kInfinity);
    for_each_capability([&](const CpuCapability& capability) {
      Matrix output(type, 3, 20);
      const Problem problem = make_problem(Operation::kSoftmax, output, inputs, bounds, -0.5);
      capability.run_rows(problem, 0, 3);
      const std::string what = describe(capability, problem);
      CHECK(output.get(0, 17) == 0.0 && output.get(0, 3) > 0.0, what << ": " << output.get(0, 17));
      for (int64_t col = 0; col < 20; ++col) {
        CHECK(std::isnan(output.get(1, col)), what << ", column " << col << ": " << output.get(1, col));
      }
      check_row(what, problem, expected_row(Operation::kSoftmax, inputs, 2, bounds, -0.5, type), output, bounds, 2);
    });
  }
}

TEST("edges: no rows, no columns, no row dimensions") {
  const Bounds none{{0}, {0}};
  const Bounds one{{1}, {2}};
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : kOperations) {
      std::vector<Matrix> inputs;
      for (int k = 0; k < input_count(operation); ++k) {
        inputs.emplace_back(ElementType::kFloat32, 1, 4);
      }
      fill_inputs(operation, inputs, one, 81);
      Matrix output(ElementType::kFloat32, 1, 4);
      Problem problem = make_problem(operation, output, inputs, none);
      problem.cols = 0;
      capability.run_rows(problem, 0, 1);
      problem.cols = 4;
      capability.run_rows(problem, 0, 0);
      for (int64_t col = 0; col < 4; ++col) {
        CHECK(std::isnan(output.get(0, col)), describe(capability, problem) << " wrote " << output.get(0, col));
      }
      problem = make_problem(operation, output, inputs, one, 2.0);
      problem.row_ndim = 0;
      capability.run_rows(problem, 0, 1);
      check_row(describe(capability, problem) + ", no row dimensions", problem,
                expected_row(operation, inputs, 0, one, 2.0, ElementType::kFloat32), output, one, 0);
    }
  });
}

namespace {

// Scores that tempt a sum to lose terms: all equal; falling; one large one behind, and before, very many small ones.
double tempting_score(int pattern, int64_t i, int64_t length) {
  const double small = -16.0 + static_cast<double>(i % 3) * 0.01;
  switch (pattern) {
    case 0: return 1.25;
    case 1: return -20.0 * static_cast<double>(i) / static_cast<double>(length);
    case 2: return i == length - 1 ? 0.0 : small;
    default: return i == 5 ? 0.0 : small;
  }
}

// The sum with its rounding errors kept (Kahan): over 2^20 terms a plain sum in long double is off by ten eps of
// float64.
class ExactSum {
 public:
  void add(real term) {
    const real corrected = term - lost_;
    const real next = total_ + corrected;
    lost_ = (next - total_) - corrected;
    total_ = next;
  }
  real total() const { return total_; }

 private:
  real total_ = 0;
  real lost_ = 0;
};

void check_long_row(Operation operation, ElementType type, int pattern, int64_t length) {
  const bool is_log = operation == Operation::kLogSoftmax;
  const real eps = epsilon_of(type == ElementType::kFloat64);
  const Bounds bounds{{0}, {length}};
  std::vector<Matrix> inputs{Matrix(type, 1, length)};
  for (int64_t i = 0; i < length; ++i) {
    inputs[0].set(0, i, tempting_score(pattern, i, length));
  }
  // The largest score is counted as exactly 1, and once.
  int64_t largest = 0;
  for (int64_t i = 1; i < length; ++i) {
    largest = inputs[0].get(0, i) > inputs[0].get(0, largest) ? i : largest;
  }
  std::vector<real> distances;
  ExactSum rest;
  for (int64_t i = 0; i < length; ++i) {
    distances.push_back(static_cast<real>(inputs[0].get(0, i)) - inputs[0].get(0, largest));
    rest.add(i == largest ? 0 : std::exp(distances.back()));
  }
  const real log_sum = std::log1p(rest.total());
  for_each_capability([&](const CpuCapability& capability) {
    Matrix output(type, 1, length);
    const Problem problem = make_problem(operation, output, inputs, bounds);
    capability.run_rows(problem, 0, 1);
    const std::string what =
        describe(capability, problem) + ", pattern " + std::to_string(pattern) + ", row of " + std::to_string(length);
    ExactSum sum;
    for (int64_t i = 0; i < length; ++i) {
      const double got = output.get(0, i);
      const real d = distances[static_cast<size_t>(i)];
      const real want = is_log ? d - log_sum : std::exp(d) / (1 + rest.total());
      sum.add(got);
      CHECK(std::fabs(got - want) <= (4 + std::fabs(d)) * eps * std::fabs(want),
            what << ", column " << i << ": got " << got << ", " << static_cast<double>((got - want) / want / eps)
                 << " eps off");
    }
    CHECK(is_log || std::fabs(sum.total() - 1) <= 8 * eps,
          what << " sums to 1 + " << static_cast<double>((sum.total() - 1) / eps) << " eps");
  });
}

}  // namespace

TEST("accuracy: rows sum to 1 within 8 eps, and every value is right, up to 2^20 columns") {
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
  const std::vector<int64_t> lengths = {10000, 131071, int64_t{1} << 20};
#else
  const std::vector<int64_t> lengths = {10000, 40000};  // an emulated processor, or a slowed one, would take minutes
#endif
  for (int64_t length : lengths) {
    for (int pattern = 0; pattern < 4; ++pattern) {
      for (ElementType type : {ElementType::kFloat32, ElementType::kFloat64}) {
        // The longest rows take seconds: each pattern in one of the types.
        if (length < (1 << 20) || (type == ElementType::kFloat32) == (pattern % 2 == 0)) {
          check_long_row(Operation::kSoftmax, type, pattern, length);
          check_long_row(Operation::kLogSoftmax, type, pattern, length);
        }
      }
    }
  }
}

}  // namespace kernel_tests
