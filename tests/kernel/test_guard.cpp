// Whole batches whose rows each end, or begin, at an unreadable page: any operand types, any column stride, rows that
// are empty, and the arrays of lengths and starts themselves.
#include <memory>

#include "cases.h"
#include "check.h"
#include "fault.h"
#include "guard.h"

namespace kernel_tests {
namespace {

constexpr int64_t kPadding = 100;  // columns on the unreadable side: more than any vector holds, less than a page

// Rows of `longest` + kPadding columns. With padding behind, every row's valid range ends at column `longest`, the page
// boundary; with padding before it begins at column kPadding, the page boundary. Empty rows have no readable memory.
class GuardedRows {
 public:
  GuardedRows(ElementType type, const std::vector<int64_t>& lengths, int64_t col_stride, bool padding_behind)
      : type_(type), col_stride_(col_stride), page_(sysconf(_SC_PAGESIZE)) {
    int64_t longest = 1;
    for (int64_t length : lengths) {
      longest = std::max(longest, length);
    }
    const int64_t elem_bytes = size_of(type);
    const int64_t step = std::abs(col_stride);
    const int64_t readable = (((longest - 1) * step + 1) * elem_bytes + page_ - 1) / page_ * page_;
    // Unreadable between two rows: all columns of padding, as far as the stride spreads them.
    const int64_t unreadable = (kPadding * step * elem_bytes + page_ - 1) / page_ * page_;
    row_bytes_ = readable + unreadable;
    mapped_bytes_ = unreadable + row_bytes_ * static_cast<int64_t>(lengths.size());
    mapping_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(mapped_bytes_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (size_t row = 0; row < lengths.size(); ++row) {
      if (lengths[row] > 0) {
        char* first = mapping_ + unreadable + static_cast<int64_t>(row) * row_bytes_;
        mprotect(first, static_cast<size_t>(readable), PROT_READ | PROT_WRITE);
        std::memset(first, Matrix::kPoison, static_cast<size_t>(readable));
      }
    }
    const int64_t anchored_col = padding_behind ? longest - 1 : kPadding;
    const bool at_end = padding_behind == (col_stride > 0);
    char* anchor = mapping_ + unreadable + (at_end ? readable - elem_bytes : 0);
    first_ = anchor - anchored_col * col_stride * elem_bytes;
  }
  GuardedRows(const GuardedRows&) = delete;
  GuardedRows& operator=(const GuardedRows&) = delete;
  ~GuardedRows() { munmap(mapping_, static_cast<size_t>(mapped_bytes_)); }

  void set(int64_t row, int64_t col, const std::string& bits) {
    std::memcpy(first_ + row * row_bytes_ + col * col_stride_ * size_of(type_), bits.data(), bits.size());
  }
  Operand operand() const {
    Operand result;
    result.data = first_;
    result.type = type_;
    result.col_stride = col_stride_;
    result.row_strides[0] = row_bytes_ / size_of(type_);
    return result;
  }

 private:
  ElementType type_;
  int64_t col_stride_;
  int64_t page_;
  int64_t row_bytes_;
  int64_t mapped_bytes_;
  char* mapping_;
  char* first_;
};

// The same integers, the last of them at the end of readable memory.
class GuardedIntegers {
 public:
  explicit GuardedIntegers(const std::vector<int64_t>& values)
      : buffer_(static_cast<int64_t>(values.size() * sizeof(int64_t)), true) {
    std::memcpy(buffer_.data(), values.data(), values.size() * sizeof(int64_t));
  }
  const void* data() const { return buffer_.data(); }

 private:
  GuardedBuffer buffer_;
};

constexpr int64_t kGap = 3;  // elements between two rows of an output, where nothing may be written

// The bytes of `count` elements of one row, whose columns are adjacent.
std::string bytes_at(Matrix& matrix, int64_t row, int64_t col, int64_t count) {
  const Operand operand = matrix.operand();
  const int64_t first = row * operand.row_strides[0] + col;
  return {static_cast<const char*>(operand.data) + first * size_of(operand.type),
          static_cast<size_t>(count * size_of(operand.type))};
}

struct Types {
  ElementType first_input;
  ElementType other_inputs;
  ElementType output;
};

void check_batch(const CpuCapability& capability, Operation operation, const Types& types,
                 const std::vector<int64_t>& lengths, int64_t col_stride, bool padding_behind) {
  const auto rows = static_cast<int64_t>(lengths.size());
  int64_t longest = 1;
  for (int64_t length : lengths) {
    longest = std::max(longest, length);
  }
  const int64_t cols = longest + kPadding;
  Bounds bounds{{}, lengths};
  for (int64_t length : lengths) {
    bounds.starts.push_back(padding_behind ? longest - length : kPadding);
  }
  const std::string what = std::string(capability.name) + ' ' + name_of(operation) + " of " +
                           name_of(types.first_input) + " and " + name_of(types.other_inputs) + " to " +
                           name_of(types.output) + ", stride " + std::to_string(col_stride) + ", " +
                           std::to_string(rows) + " rows, padding " + (padding_behind ? "behind" : "before");
  const FaultReport report(what);

  std::vector<Matrix> inputs;
  for (int k = 0; k < input_count(operation); ++k) {
    inputs.emplace_back(k == 0 ? types.first_input : types.other_inputs, rows, cols);
  }
  fill_inputs(operation, inputs, bounds, 91);
  Matrix expected(types.output, rows, cols, 1, 0, kGap);
  capability.run_rows(make_problem(operation, expected, inputs, bounds), 0, rows);

  Matrix output(types.output, rows, cols, 1, 0, kGap);
  Problem problem = make_problem(operation, output, inputs, bounds);
  std::vector<std::unique_ptr<GuardedRows>> guarded;
  for (size_t k = 0; k < inputs.size(); ++k) {
    guarded.push_back(std::make_unique<GuardedRows>(inputs[k].type(), lengths, col_stride, padding_behind));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t start = bounds.starts[static_cast<size_t>(row)];
      for (int64_t col = start; col < start + lengths[static_cast<size_t>(row)]; ++col) {
        guarded[k]->set(row, col, bytes_at(inputs[k], row, col, 1));
      }
    }
    problem.inputs[k] = guarded[k]->operand();
  }
  const GuardedIntegers guarded_lengths(bounds.lengths);
  const GuardedIntegers guarded_starts(bounds.starts);
  problem.lengths.data = guarded_lengths.data();
  problem.starts.data = guarded_starts.data();
  capability.run_rows(problem, 0, rows);

  const std::string poison(static_cast<size_t>(kGap * size_of(types.output)), static_cast<char>(Matrix::kPoison));
  for (int64_t row = 0; row < rows; ++row) {
    CHECK(bytes_at(output, row, 0, cols) == bytes_at(expected, row, 0, cols),
          what << ", row " << row << " of " << lengths[static_cast<size_t>(row)]);
    CHECK(bytes_at(output, row, cols, kGap) == poison, what << ", written behind row " << row);
  }
}

// Every remainder of every vector width, empty rows among them.
std::vector<int64_t> short_lengths() {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i <= 70; ++i) {
    lengths.push_back(i * 29 % 71);
  }
  return lengths;
}

// The sizes where the strategy changes.
const std::vector<int64_t> kLongLengths = {255, 0, 256, 257, 2047, 2048, 0, 2049, 1};
const std::vector<int64_t> kLongestLengths = {8191, 0, 8192, 8193};

}  // namespace

TEST("guard pages: batches of rows, every one between unreadable pages, every pair of types") {
  for_each_writing([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType input_type : kFloatingTypes) {
          for (ElementType output_type : kFloatingTypes) {
            for (bool padding_behind : {true, false}) {
              const Types types{input_type, input_type, output_type};
              check_batch(capability, operation, types, short_lengths(), 1, padding_behind);
            }
          }
        }
      }
    });
  });
}

TEST("guard pages: long rows, and rows with strided or reversed columns") {
  for_each_writing([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          for (bool padding_behind : {true, false}) {
            const Types types{type, type, type};
            check_batch(capability, operation, types, kLongLengths, 1, padding_behind);
            if (type == ElementType::kFloat32 || operation == Operation::kSoftmax) {
              check_batch(capability, operation, types, kLongestLengths, 1, padding_behind);
            }
            for (int64_t col_stride : {3, -1, -2}) {
              check_batch(capability, operation, types, short_lengths(), col_stride, padding_behind);
            }
          }
        }
      }
    });
  });
}

TEST("guard pages: derivatives whose inputs differ in type") {
  for_each_writing([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          if (!is_forward(operation) && type != ElementType::kFloat32) {
            check_batch(capability, operation, {ElementType::kFloat32, type, ElementType::kFloat32}, short_lengths(), 1,
                        true);
            check_batch(capability, operation, {type, ElementType::kFloat32, type}, short_lengths(), 1, false);
          }
        }
      }
    });
  });
}

TEST("guard pages: neither results nor padding are written beside the output") {
  const int64_t page = sysconf(_SC_PAGESIZE);
  for_each_writing([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          // One row that fills its pages: its first and its last column border unreadable ones.
          const int64_t cols = page / size_of(type);
          GuardedBuffer memory(page, true);
          for (int64_t length = 0; length <= 70; ++length) {
            for (int64_t start : {int64_t{0}, int64_t{1}, length % 19, cols - length - 1, cols - length}) {
              const Bounds bounds{{start}, {length}};
              const FaultReport report(std::string(capability.name) + ' ' + name_of(operation) + " of " +
                                       name_of(type) + ", " + std::to_string(length) + " from " +
                                       std::to_string(start) + " of " + std::to_string(cols));
              std::vector<Matrix> inputs;
              for (int k = 0; k < input_count(operation); ++k) {
                inputs.emplace_back(type, 1, cols);
              }
              Matrix output(type, 1, cols);
              Problem problem = make_problem(operation, output, inputs, bounds);
              problem.output.data = memory.data();
              capability.run_rows(problem, 0, 1);
            }
          }
        }
      }
    });
  });
}

}  // namespace kernel_tests
