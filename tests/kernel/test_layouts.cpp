// The same bits in any layout: types that differ, columns reversed or strided, rows reversed, transposed or shared, and
// every alignment.
#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

// How a matrix lies in memory.
enum class Layout { kContiguous, kShifted, kReversedCols, kReversedRows, kTransposed, kStrided, kReversedStrided };

constexpr Layout kLayouts[] = {Layout::kShifted,    Layout::kReversedCols, Layout::kReversedRows,
                               Layout::kTransposed, Layout::kStrided,      Layout::kReversedStrided};

const char* layout_name(Layout layout) {
  switch (layout) {
    case Layout::kContiguous: return "contiguous";
    case Layout::kShifted: return "shifted";
    case Layout::kReversedCols: return "reversed columns";
    case Layout::kReversedRows: return "reversed rows";
    case Layout::kTransposed: return "transposed";
    case Layout::kStrided: return "strided";
    case Layout::kReversedStrided: return "strided, reversed columns";
  }
  return "";
}

// A matrix's memory in one of the layouts.
class LaidOut {
 public:
  LaidOut(ElementType type, int64_t rows, int64_t cols, Layout layout, int64_t shift = 3) {
    operand_.type = type;
    operand_.col_stride = 1;
    operand_.row_strides[0] = cols + 2;
    int64_t first = layout == Layout::kShifted ? shift : 0;
    switch (layout) {
      case Layout::kReversedCols:
        operand_.col_stride = -1;
        first = cols - 1;
        break;
      case Layout::kReversedRows:
        operand_.row_strides[0] = -cols;
        first = (rows - 1) * cols;
        break;
      case Layout::kTransposed:
        operand_.col_stride = rows;
        operand_.row_strides[0] = 1;
        break;
      case Layout::kStrided:
        operand_.col_stride = 2;
        operand_.row_strides[0] = 2 * cols + 1;
        break;
      case Layout::kReversedStrided:
        operand_.col_stride = -3;
        operand_.row_strides[0] = 3 * cols;
        first = 3 * (cols - 1);
        break;
      default: break;
    }
    bytes_.assign(static_cast<size_t>((rows * 3 * (cols + 2) + shift) * size_bytes(type)), Matrix::kPoison);
    operand_.data = bytes_.data() + first * size_bytes(type);
  }

  const Operand& operand() const { return operand_; }
  void set(int64_t row, int64_t col, const std::string& bits) { std::memcpy(at(row, col), bits.data(), bits.size()); }
  std::string bits(int64_t row, int64_t col) const {
    return {at(row, col), static_cast<size_t>(size_bytes(operand_.type))};
  }

 private:
  char* at(int64_t row, int64_t col) const {
    return static_cast<char*>(operand_.data) +
           (row * operand_.row_strides[0] + col * operand_.col_stride) * size_bytes(operand_.type);
  }

  Operand operand_;
  std::vector<unsigned char> bytes_;
};

// One problem, its inputs, and the bits of its result where everything is contiguous.
struct Sample {
  Operation operation;
  ElementType input_type;
  ElementType output_type;
  int64_t cols;
  double scale;
  Bounds bounds;
  std::vector<Matrix> inputs;

  Sample(Operation op, ElementType input, ElementType output, int64_t columns, double factor)
      : operation(op), input_type(input), output_type(output), cols(columns), scale(factor) {
    for (int64_t length : {cols, int64_t{0}, int64_t{1}, int64_t{17}, cols - 1}) {
      bounds.lengths.push_back(length);
      bounds.starts.push_back((cols - length) / 3);
    }
    for (int k = 0; k < input_count(operation); ++k) {
      inputs.emplace_back(input_type, rows(), cols);
    }
    fill_inputs(operation, inputs, bounds, 101);
  }
  int64_t rows() const { return static_cast<int64_t>(bounds.lengths.size()); }
};

void check_layout(const CpuCapability& capability, Sample& sample, const Matrix& expected, Layout input_layout,
                  Layout output_layout, int64_t shift = 3) {
  Matrix unused(sample.output_type, sample.rows(), sample.cols);
  Problem problem = make_problem(sample.operation, unused, sample.inputs, sample.bounds, sample.scale);
  std::vector<LaidOut> inputs;
  inputs.reserve(sample.inputs.size());
  for (size_t k = 0; k < sample.inputs.size(); ++k) {
    inputs.emplace_back(sample.input_type, sample.rows(), sample.cols, input_layout, shift);
    for (int64_t row = 0; row < sample.rows(); ++row) {
      for (int64_t col = 0; col < sample.cols; ++col) {
        inputs[k].set(row, col, sample.inputs[k].bits(row, col));
      }
    }
    problem.inputs[k] = inputs[k].operand();
  }
  const LaidOut output(sample.output_type, sample.rows(), sample.cols, output_layout, shift);
  problem.output = output.operand();
  capability.run_rows(problem, 0, sample.rows());
  for (int64_t row = 0; row < sample.rows(); ++row) {
    for (int64_t col = 0; col < sample.cols; ++col) {
      CHECK(output.bits(row, col) == expected.bits(row, col),
            capability.name << ' ' << name_of(sample.operation) << ' ' << name_of(sample.input_type) << " to "
                            << name_of(sample.output_type) << ", inputs " << layout_name(input_layout) << ", output "
                            << layout_name(output_layout) << " by " << shift << ", row " << row << " of "
                            << sample.bounds.lengths[static_cast<size_t>(row)] << ", column " << col);
    }
  }
}

Matrix contiguous_result(const CpuCapability& capability, Sample& sample) {
  Matrix result(sample.output_type, sample.rows(), sample.cols);
  capability.run_rows(make_problem(sample.operation, result, sample.inputs, sample.bounds, sample.scale), 0,
                      sample.rows());
  return result;
}

void check_all_layouts(Sample sample) {
  for_each_capability([&](const CpuCapability& capability) {
    const Matrix expected = contiguous_result(capability, sample);
    for (Layout layout : kLayouts) {
      check_layout(capability, sample, expected, layout, Layout::kContiguous);
      check_layout(capability, sample, expected, Layout::kContiguous, layout);
      check_layout(capability, sample, expected, layout, layout);
    }
  });
}

}  // namespace

TEST("bits: the same in any layout of inputs and output, for every pair of types") {
  for (Operation operation : kOperations) {
    for (ElementType input_type : kFloatingTypes) {
      for (ElementType output_type : kFloatingTypes) {
        check_all_layouts({operation, input_type, output_type, 75, 0.8});
      }
    }
  }
}

TEST("bits: the same in any layout for rows that are read tile by tile, and for a negative scale") {
  for (Operation operation : kOperations) {
    check_all_layouts({operation, ElementType::kFloat32, ElementType::kFloat32, 2300, 1.0});
    check_all_layouts({operation, ElementType::kBFloat16, ElementType::kBFloat16, 2300, 1.0});
    check_all_layouts({operation, ElementType::kFloat32, ElementType::kFloat32, 300, -0.8});
    check_all_layouts({operation, ElementType::kFloat64, ElementType::kFloat64, 300, 1e-305});
  }
  check_all_layouts({Operation::kSoftmax, ElementType::kFloat32, ElementType::kFloat32, 8400, 1.0});
  check_all_layouts({Operation::kSoftmax, ElementType::kFloat16, ElementType::kFloat16, 8400, 1.0});
  check_all_layouts({Operation::kLogSoftmaxBackward, ElementType::kFloat64, ElementType::kFloat64, 8400, 1.0});
}

TEST("bits: numbers of rows, beside inputs and outputs in any layout") {
  struct Case {
    Operation operation;
    bool has_row_input;
    bool has_row_result;
  };
  constexpr Case kCases[] = {{Operation::kSoftmax, true, true},
                             {Operation::kLogSoftmax, true, true},
                             {Operation::kLogSumExp, false, true},
                             {Operation::kRowDot, false, true},
                             {Operation::kRowScale, true, false}};
  for (const Case& c : kCases) {
    for (int64_t cols : {75, 300}) {
      Sample sample(c.operation, ElementType::kFloat32, ElementType::kFloat32, cols, 0.8);
      const int64_t rows = sample.rows();
      for_each_capability([&](const CpuCapability& capability) {
        // Runs the sample in that layout; returns the bits of its elements, then those of its rows' numbers.
        const auto result = [&](Layout layout) {
          Matrix unused(ElementType::kFloat32, rows, cols);
          Problem problem = make_problem(c.operation, unused, sample.inputs, sample.bounds, sample.scale);
          std::vector<LaidOut> inputs;
          inputs.reserve(sample.inputs.size());
          for (size_t k = 0; k < sample.inputs.size(); ++k) {
            inputs.emplace_back(ElementType::kFloat32, rows, cols, layout);
            for (int64_t row = 0; row < rows; ++row) {
              for (int64_t col = 0; col < cols; ++col) {
                inputs[k].set(row, col, sample.inputs[k].bits(row, col));
              }
            }
            problem.inputs[k] = inputs[k].operand();
          }
          const LaidOut output(ElementType::kFloat32, rows, cols, layout);
          problem.output = output.operand();
          std::vector<double> row_input(static_cast<size_t>(rows) * 2);  // every other one is a row's
          for (size_t i = 0; i < row_input.size(); ++i) {
            row_input[i] = 0.25 * static_cast<double>(i) - 1;
          }
          std::vector<float> row_results(static_cast<size_t>(rows), -7.0F);
          if (c.has_row_input) {
            problem.row_input.data = row_input.data();
            problem.row_input.type = ElementType::kFloat64;
            problem.row_input.row_strides[0] = 2;
          }
          if (c.has_row_result) {
            problem.row_result = {row_results.data(), ElementType::kFloat32};
          }
          if (is_reduction(c.operation)) {  // it has no elements to write
            problem.output.data = row_results.data();
            problem.output.col_stride = problem.output.row_strides[0] = 1;
          }
          capability.run_rows(problem, 0, rows);
          std::string bits;
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t col = 0; col < cols; ++col) {
              bits += output.bits(row, col);
            }
          }
          const char* numbers = reinterpret_cast<const char*>(row_results.data());
          return bits.append(numbers, sizeof(float) * row_results.size());
        };
        const std::string expected = result(Layout::kContiguous);
        for (Layout layout : kLayouts) {
          CHECK(result(layout) == expected,
                capability.name << ' ' << name_of(c.operation) << ", " << cols << " columns, " << layout_name(layout));
        }
      });
    }
  }
}

TEST("bits: the same at every alignment within 64 bytes and beyond") {
  for (Operation operation : kOperations) {
    for (ElementType type : kFloatingTypes) {
      Sample sample(operation, type, type, 75, 1.0);
      for_each_capability([&](const CpuCapability& capability) {
        const Matrix expected = contiguous_result(capability, sample);
        for (int64_t shift = 1; shift <= 33; ++shift) {
          check_layout(capability, sample, expected, Layout::kShifted, Layout::kContiguous, shift);
          check_layout(capability, sample, expected, Layout::kContiguous, Layout::kShifted, shift);
        }
      });
    }
  }
}

TEST("bits: the same where the rows of an input share their memory") {
  // An incoming gradient that was broadcast along the rows: its stride is 0.
  for (Operation operation : kOperations) {
    for (ElementType type : kFloatingTypes) {
      Sample sample(operation, type, type, 75, 1.0);
      sample.bounds = {std::vector<int64_t>(5, 0), std::vector<int64_t>(5, 75)};
      fill_inputs(operation, sample.inputs, sample.bounds, 111);
      for (int64_t row = 1; row < 5; ++row) {
        for (int64_t col = 0; col < 75; ++col) {
          sample.inputs[0].set(row, col, sample.inputs[0].get(0, col));
        }
      }
      for_each_capability([&](const CpuCapability& capability) {
        const Matrix expected = contiguous_result(capability, sample);
        Matrix output(type, 5, 75);
        Problem problem = make_problem(operation, output, sample.inputs, sample.bounds);
        problem.inputs[0].row_strides[0] = 0;
        capability.run_rows(problem, 0, 5);
        for (int64_t row = 0; row < 5; ++row) {
          for (int64_t col = 0; col < 75; ++col) {
            CHECK(output.bits(row, col) == expected.bits(row, col), capability.name << ' ' << name_of(operation) << ' '
                                                                                    << name_of(type) << ", row " << row
                                                                                    << ", column " << col);
          }
        }
      });
    }
  }
}

}  // namespace kernel_tests
