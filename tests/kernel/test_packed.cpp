// Packed rows: they have the bits of padded ones, and no other row's memory is touched.
#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

// For each length, `width` packed rows with unit row stride. Position and column of an element are those of a matrix.
struct PackedRows {
  std::vector<int64_t> lengths;
  std::vector<int64_t> starts;
  int64_t width;
  int64_t total = 0;
  int64_t longest = 0;

  PackedRows(std::vector<int64_t> row_lengths, int64_t row_group) : lengths(std::move(row_lengths)), width(row_group) {
    for (int64_t length : lengths) {
      starts.push_back(total);
      total += length;
      longest = length > longest ? length : longest;
    }
  }
  int64_t rows() const { return static_cast<int64_t>(lengths.size()) * width; }

  Operand operand(Matrix& matrix) const {
    Operand result = matrix.operand();
    result.col_stride = result.row_strides[0];  // from one position to the next
    result.row_strides[0] = 0;
    result.row_strides[1] = 1;
    return result;
  }
  RowIndex index(const std::vector<int64_t>& values) const {
    RowIndex result = index_over(values);
    result.row_strides[1] = 0;
    return result;
  }

  Problem problem(Operation operation, Matrix& output, std::vector<Matrix>& inputs, double scale) const {
    Problem result;
    result.operation = operation;
    result.scale = scale;
    result.rows = rows();
    result.cols = total;
    result.row_ndim = 2;
    result.row_sizes[0] = static_cast<int64_t>(lengths.size());
    result.row_sizes[1] = width;
    result.output = operand(output);
    result.input_count = static_cast<int>(inputs.size());
    for (size_t k = 0; k < inputs.size(); ++k) {
      result.inputs[k] = operand(inputs[k]);
    }
    result.lengths = index(lengths);
    result.starts = index(starts);
    result.packing = {true, longest, total * width, static_cast<int64_t>(lengths.size())};
    return result;
  }

  // The same rows padded to the longest.
  Bounds padded_bounds() const {
    Bounds bounds;
    for (int64_t length : lengths) {
      bounds.lengths.insert(bounds.lengths.end(), static_cast<size_t>(width), length);
    }
    bounds.starts.assign(bounds.lengths.size(), 0);
    return bounds;
  }
};

void check_packed(const PackedRows& packed, Operation operation, ElementType input, ElementType output, double scale) {
  const Bounds bounds = packed.padded_bounds();
  std::vector<Matrix> padded_inputs(static_cast<size_t>(input_count(operation)),
                                    Matrix(input, packed.rows(), packed.longest));
  fill_inputs(operation, padded_inputs, bounds, 7);
  std::vector<Matrix> inputs(padded_inputs.size(), Matrix(input, packed.total, packed.width));
  const auto for_each_element = [&](const auto& visit) {
    for (int64_t row = 0; row < packed.rows(); ++row) {
      for (int64_t i = 0; i < bounds.lengths[static_cast<size_t>(row)]; ++i) {
        visit(row, i, packed.starts[static_cast<size_t>(row / packed.width)] + i, row % packed.width);
      }
    }
  };
  for_each_element([&](int64_t row, int64_t i, int64_t position, int64_t column) {
    for (size_t k = 0; k < inputs.size(); ++k) {
      inputs[k].set(position, column, padded_inputs[k].get(row, i));
    }
  });
  for_each_capability([&](const CpuCapability& capability) {
    Matrix expected(output, packed.rows(), packed.longest);
    capability.run_rows(make_problem(operation, expected, padded_inputs, bounds, scale), 0, packed.rows());
    for (int64_t split : {packed.rows(), packed.rows() / 2 + 1}) {  // in one call, and in two
      Matrix result(output, packed.total, packed.width);
      const Problem problem = packed.problem(operation, result, inputs, scale);
      capability.run_rows(problem, 0, split);
      capability.run_rows(problem, split, packed.rows());
      for_each_element([&](int64_t row, int64_t i, int64_t position, int64_t column) {
        CHECK(result.bits(position, column) == expected.bits(row, i),
              capability.name << ' ' << name_of(operation) << ' ' << name_of(input) << ", " << packed.width
                              << " with unit row stride, row " << row << ", column " << i);
      });
      CHECK(result.surroundings_are_untouched(), capability.name << ' ' << name_of(operation) << ": around the rows");
    }
  });
}

}  // namespace

TEST("packed rows have the bits of padded ones, every operation") {
  for (Operation operation : kOperations) {
    for (int64_t width : {1, 3, 9}) {
      check_packed({{5, 0, 17, 1, 40}, width}, operation, ElementType::kFloat32, ElementType::kFloat32, -0.75);
    }
  }
}

TEST("packed rows have the bits of padded ones, every type") {
  for (ElementType type : kFloatingTypes) {
    for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax, Operation::kSoftmaxBackward}) {
      check_packed({{0, 33, 2, 70}, 1}, operation, type, type, 1.0);
      check_packed({{0, 33, 2, 20}, 17}, operation, type, type, 1.0);
    }
  }
  check_packed({{9, 33}, 5}, Operation::kSoftmax, ElementType::kBFloat16, ElementType::kFloat32, 1.0);
  check_packed({{9, 33}, 5}, Operation::kSoftmax, ElementType::kFloat32, ElementType::kFloat64, 1.0);
}

TEST("packed rows of every size that matters, with cached and with non-temporal stores") {
  for_each_store_hint([] {
    for (int64_t length : {1, 15, 16, 17, 64, 65, 128, 512, 1030}) {
      check_packed({{length, 1, length}, 1}, Operation::kSoftmax, ElementType::kFloat32, ElementType::kFloat32, 1.0);
      check_packed({{length, 3, length}, 16}, Operation::kSoftmax, ElementType::kFloat32, ElementType::kFloat32, 1.0);
    }
  });
}

TEST("packed rows that are longer than a block, than the scratch buffer, than a column tile") {
  for (int64_t width : {1, 8}) {
    for (Operation operation : {Operation::kSoftmax, Operation::kLogSoftmax, Operation::kSoftmaxBackward}) {
      check_packed({{9000, 2, 2500}, width}, operation, ElementType::kFloat32, ElementType::kFloat32, 1.0);
    }
  }
}

// Kernels and column tiles are chosen for the longest row; another thread may change lengths after that was found.
TEST("packed rows whose lengths grow after they were checked stay in their buffers") {
  for (int64_t width : {1, 8}) {
    PackedRows packed(std::vector<int64_t>(200, 100), width);  // more than the scratch buffer holds
    std::vector<Matrix> inputs(1, Matrix(ElementType::kFloat32, packed.total, packed.width));
    for (int64_t position = 0; position < packed.total; ++position) {
      for (int64_t column = 0; column < packed.width; ++column) {
        inputs[0].set(position, column, 1.0);
      }
    }
    for_each_capability([&](const CpuCapability& capability) {
      for (int64_t length : {int64_t{130}, int64_t{1000}, int64_t{-5}, int64_t{1} << 62}) {
        Matrix result(ElementType::kFloat32, packed.total, packed.width);
        const Problem problem = packed.problem(Operation::kSoftmax, result, inputs, 1.0);
        const std::vector<int64_t> before = packed.lengths;
        packed.lengths[1] = length;
        capability.run_rows(problem, 0, packed.rows());
        packed.lengths = before;
        CHECK(result.surroundings_are_untouched(),
              capability.name << ": a length of " << length << ", width " << packed.width);
      }
    });
  }
}

}  // namespace kernel_tests
