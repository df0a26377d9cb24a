// Rows that end, or begin, at an unreadable page: those of the inputs, which are read-only as well, of the output, and
// lengths and starts. Any operand types and column stride, empty rows, unit row stride, packed rows, in place.
#include <memory>

#include "cases.h"
#include "check.h"
#include "fault.h"
#include "guard.h"

namespace kernel_tests {
namespace {

constexpr int64_t kPadding = 100;  // columns on the unreadable side: more than any vector holds, less than a page

// Rows between unreadable pages. With padding behind, every row's valid columns end at column `longest`, the page
// boundary; with padding before, they begin at column `padding_before`, the page boundary. Empty rows have no readable
// memory.
class GuardedRows {
 public:
  GuardedRows(ElementType type, const std::vector<int64_t>& lengths, int64_t col_stride, bool padding_behind,
              int64_t padding_before = kPadding, int64_t row_elems = 0)
      : type_(type), lengths_(lengths), col_stride_(col_stride), page_(sysconf(_SC_PAGESIZE)) {
    int64_t longest = 1;
    for (int64_t length : lengths) {
      longest = std::max(longest, length);
    }
    const int64_t elem_bytes = size_bytes(type);
    const int64_t step = std::abs(col_stride);
    readable_bytes_ = (((longest - 1) * step + 1) * elem_bytes + page_ - 1) / page_ * page_;
    // Between two rows, all columns of padding are unreadable, as far as the stride spreads them.
    unreadable_bytes_ = (kPadding * step * elem_bytes + page_ - 1) / page_ * page_;
    row_bytes_ = row_elems > 0 ? row_elems * elem_bytes : readable_bytes_ + unreadable_bytes_;
    mapped_bytes_ = unreadable_bytes_ + row_bytes_ * static_cast<int64_t>(lengths.size());
    mapping_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(mapped_bytes_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for_each_readable([&](char* first, int64_t) {
      mprotect(first, static_cast<size_t>(readable_bytes_), PROT_READ | PROT_WRITE);
      std::memset(first, Matrix::kPoison, static_cast<size_t>(readable_bytes_));
    });
    const int64_t anchored_col = padding_behind ? longest - 1 : padding_before;
    const bool at_end = padding_behind == (col_stride > 0);
    char* anchor = mapping_ + unreadable_bytes_ + (at_end ? readable_bytes_ - elem_bytes : 0);
    first_ = anchor - anchored_col * col_stride * elem_bytes;
  }
  GuardedRows(const GuardedRows&) = delete;
  GuardedRows& operator=(const GuardedRows&) = delete;
  ~GuardedRows() { munmap(mapping_, static_cast<size_t>(mapped_bytes_)); }

  void set(int64_t row, int64_t col, const std::string& bits) {
    std::memcpy(first_ + row * row_bytes_ + col * col_stride_ * size_bytes(type_), bits.data(), bits.size());
  }
  // Precondition: unit column stride.
  std::string bytes(int64_t row, int64_t col, int64_t count) const {
    return {first_ + row * row_bytes_ + col * size_bytes(type_), static_cast<size_t>(count * size_bytes(type_))};
  }
  void forbid_writing() {
    for_each_readable([&](char* first, int64_t) { mprotect(first, static_cast<size_t>(readable_bytes_), PROT_READ); });
  }
  // Whether all other readable bytes still are poison. Precondition: unit column stride.
  bool is_untouched_beside(int64_t first_col, int64_t count) const {
    bool is_untouched = true;
    const auto is_poison = [](char byte) { return byte == static_cast<char>(Matrix::kPoison); };
    for_each_readable([&](const char* begin, int64_t row) {
      const char* own = first_ + row * row_bytes_ + first_col * size_bytes(type_);
      is_untouched = is_untouched && std::all_of(begin, own, is_poison) &&
                     std::all_of(own + count * size_bytes(type_), begin + readable_bytes_, is_poison);
    });
    return is_untouched;
  }
  Operand operand() const {
    Operand result;
    result.data = first_;
    result.type = type_;
    result.col_stride = col_stride_;
    result.row_strides[0] = row_bytes_ / size_bytes(type_);
    return result;
  }

 private:
  template <class Visitor>
  void for_each_readable(const Visitor& visit) const {
    for (int64_t row = 0; row < static_cast<int64_t>(lengths_.size()); ++row) {
      if (lengths_[static_cast<size_t>(row)] > 0) {
        visit(mapping_ + unreadable_bytes_ + row * row_bytes_, row);
      }
    }
  }

  ElementType type_;
  std::vector<int64_t> lengths_;
  int64_t col_stride_;
  int64_t page_;
  int64_t readable_bytes_;
  int64_t unreadable_bytes_;
  int64_t row_bytes_;
  int64_t mapped_bytes_;
  char* mapping_;
  char* first_;
};

// Read-only integers, in the `turn`-th of the types that can hold them, at the end of readable memory or at its
// beginning.
class GuardedIntegers {
 public:
  GuardedIntegers(const std::vector<int64_t>& values, unsigned turn, bool at_end)
      : type_(type_for(values, turn)), buffer_(static_cast<int64_t>(values.size()) * size_bytes(type_), at_end) {
    store_integers(buffer_.data(), type_, values);
    buffer_.forbid_writing();
  }
  void guard(RowIndex& index) const {
    index.data = buffer_.data();
    index.type = type_;
  }

 private:
  static ElementType type_for(const std::vector<int64_t>& values, unsigned turn) {
    const int64_t largest = *std::max_element(values.begin(), values.end());
    std::vector<ElementType> types{ElementType::kInt64, ElementType::kInt32};
    if (largest <= 32767) {
      types.push_back(ElementType::kInt16);
    }
    if (largest <= 127) {
      types.push_back(ElementType::kInt8);
      types.push_back(ElementType::kUInt8);
    }
    return types[turn % types.size()];
  }

  ElementType type_;
  GuardedBuffer buffer_;
};

// Cycles through the types of lengths and starts.
unsigned next_turn() {
  static unsigned turn = 0;
  return turn++;
}

// The bytes of `count` adjacent elements of one row.
std::string bytes_at(Matrix& matrix, int64_t row, int64_t col, int64_t count) {
  const Operand operand = matrix.operand();
  const int64_t first = row * operand.row_strides[0] + col;
  return {static_cast<const char*>(operand.data) + first * size_bytes(operand.type),
          static_cast<size_t>(count * size_bytes(operand.type))};
}

// Fills rows of adjacent columns with ones. Rows end at column `end`, or begin at column 0 if that is 0.
void fill_with_ones(GuardedRows& rows, ElementType type, const std::vector<int64_t>& lengths, int64_t end = 0) {
  Matrix one(type, 1, 1);
  one.set(0, 0, 1.0);
  for (size_t row = 0; row < lengths.size(); ++row) {
    const int64_t first = end > 0 ? end - lengths[row] : 0;
    for (int64_t col = first; col < first + lengths[row]; ++col) {
      rows.set(static_cast<int64_t>(row), col, one.bits(0, 0));
    }
  }
}

// Whether no element of such rows is poison.
bool is_written(const GuardedRows& rows, ElementType type, const std::vector<int64_t>& lengths, int64_t end) {
  const std::string poison(static_cast<size_t>(size_bytes(type)), static_cast<char>(Matrix::kPoison));
  for (size_t row = 0; row < lengths.size(); ++row) {
    const int64_t first = end > 0 ? end - lengths[row] : 0;
    for (int64_t col = first; col < first + lengths[row]; ++col) {
      if (rows.bytes(static_cast<int64_t>(row), col, 1) == poison) {
        return false;
      }
    }
  }
  return true;
}

struct Types {
  ElementType first_input;
  ElementType other_inputs;
  ElementType output;
};

// Which end of a row's valid columns is at an unreadable page. kBeginningAtColumn0: without starts.
enum class Side { kEnd, kBeginning, kBeginningAtColumn0 };

constexpr Side kSides[] = {Side::kEnd, Side::kBeginning, Side::kBeginningAtColumn0};

const char* side_name(Side side) {
  switch (side) {
    case Side::kEnd: return "padding behind";
    case Side::kBeginning: return "padding before";
    case Side::kBeginningAtColumn0: return "no starts";
  }
  return "";
}

void check_batch(const CpuCapability& capability, Operation operation, const Types& types,
                 const std::vector<int64_t>& lengths, int64_t col_stride, Side side) {
  const bool padding_behind = side == Side::kEnd;
  const int64_t padding_before = side == Side::kBeginning ? kPadding : 0;
  const auto rows = static_cast<int64_t>(lengths.size());
  int64_t longest = 1;
  for (int64_t length : lengths) {
    longest = std::max(longest, length);
  }
  const int64_t cols = longest + kPadding;
  Bounds bounds{{}, lengths};
  for (int64_t length : lengths) {
    bounds.starts.push_back(padding_behind ? longest - length : padding_before);
  }
  const std::string what = std::string(capability.name) + ' ' + name_of(operation) + " of " +
                           name_of(types.first_input) + " and " + name_of(types.other_inputs) + " to " +
                           name_of(types.output) + ", stride " + std::to_string(col_stride) + ", " +
                           std::to_string(rows) + " rows, " + side_name(side);
  const FaultReport report(what);

  std::vector<Matrix> inputs;
  for (int k = 0; k < input_count(operation); ++k) {
    inputs.emplace_back(k == 0 ? types.first_input : types.other_inputs, rows, cols);
  }
  fill_inputs(operation, inputs, bounds, 91);
  Matrix expected(types.output, rows, cols);
  Problem problem = make_problem(operation, expected, inputs, bounds);
  capability.run_rows(problem, 0, rows);

  std::vector<std::unique_ptr<GuardedRows>> guarded;
  for (size_t k = 0; k < inputs.size(); ++k) {
    guarded.push_back(
        std::make_unique<GuardedRows>(inputs[k].type(), lengths, col_stride, padding_behind, padding_before));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t start = bounds.starts[static_cast<size_t>(row)];
      for (int64_t col = start; col < start + lengths[static_cast<size_t>(row)]; ++col) {
        guarded[k]->set(row, col, bytes_at(inputs[k], row, col, 1));
      }
    }
    guarded[k]->forbid_writing();
    problem.inputs[k] = guarded[k]->operand();
  }
  const GuardedIntegers guarded_lengths(bounds.lengths, next_turn(), side != Side::kBeginning);
  const GuardedIntegers guarded_starts(bounds.starts, next_turn(), padding_behind);
  guarded_lengths.guard(problem.lengths);
  guarded_starts.guard(problem.starts);
  if (side == Side::kBeginningAtColumn0) {
    problem.starts = RowIndex{};
    problem.starts.row_strides[0] = 0;
  }
  const std::vector<int64_t> all_columns(lengths.size(), cols);
  const GuardedRows output(types.output, all_columns, 1, padding_behind, 0);
  problem.output = output.operand();
  capability.run_rows(problem, 0, rows);

  for (int64_t row = 0; row < rows; ++row) {
    CHECK(output.bytes(row, 0, cols) == bytes_at(expected, row, 0, cols),
          what << ", row " << row << " of " << lengths[static_cast<size_t>(row)]);
  }
  CHECK(output.is_untouched_beside(0, cols), what << ", written beside a row");
}

// Unit row stride: the elements of each column border an unreadable page, and columns of padding are unreadable.
void check_unit_row_stride(const CpuCapability& capability, Operation operation, ElementType input_type,
                           ElementType output_type, int64_t width, bool at_end) {
  constexpr int64_t kCols = 21;
  const std::vector<int64_t> lengths = {17, 0, 1, kCols};
  const std::vector<int64_t> starts = {3, 5, 20, 0};
  const auto groups = static_cast<int64_t>(lengths.size());
  const FaultReport report(std::string(capability.name) + ' ' + name_of(operation) + " of " + name_of(input_type) +
                           " to " + name_of(output_type) + ", " + std::to_string(width) +
                           " rows with unit row stride, " + (at_end ? "the last" : "the first") + " at the page's end");
  std::vector<int64_t> readable;  // elements of each group's columns
  for (size_t group = 0; group < lengths.size(); ++group) {
    for (int64_t col = 0; col < kCols; ++col) {
      readable.push_back(starts[group] <= col && col < starts[group] + lengths[group] ? width : 0);
    }
  }
  const auto with_unit_row_stride = [&](const GuardedRows& columns) {
    Operand operand = columns.operand();
    operand.col_stride = operand.row_strides[0];
    operand.row_strides[0] = kCols * operand.col_stride;
    operand.row_strides[1] = 1;
    return operand;
  };

  Problem problem;
  problem.operation = operation;
  problem.rows = groups * width;
  problem.cols = kCols;
  problem.row_ndim = 2;
  problem.row_sizes[0] = groups;
  problem.row_sizes[1] = width;
  problem.input_count = input_count(operation);
  std::vector<std::unique_ptr<GuardedRows>> inputs;
  for (int k = 0; k < problem.input_count; ++k) {
    inputs.push_back(std::make_unique<GuardedRows>(input_type, readable, 1, at_end, 0));
    fill_with_ones(*inputs.back(), input_type, readable);
    inputs.back()->forbid_writing();
    problem.inputs[k] = with_unit_row_stride(*inputs.back());
  }
  const GuardedIntegers guarded_lengths(lengths, next_turn(), at_end);
  const GuardedIntegers guarded_starts(starts, next_turn(), at_end);
  for (RowIndex* index : {&problem.lengths, &problem.starts}) {
    index->row_strides[0] = 1;
    index->row_strides[1] = 0;
  }
  guarded_lengths.guard(problem.lengths);
  guarded_starts.guard(problem.starts);
  const std::vector<int64_t> all_columns(readable.size(), width);
  const GuardedRows output(output_type, all_columns, 1, at_end, 0);
  problem.output = with_unit_row_stride(output);
  capability.run_rows(problem, 0, problem.rows);
  CHECK(is_written(output, output_type, all_columns, 0), capability.name << ' ' << name_of(operation));
  CHECK(output.is_untouched_beside(0, width), capability.name << ' ' << name_of(operation) << ", beside the rows");
}

// Unit row stride, where each row ends, or begins, one column before the previous one: in every column the last valid
// row, or the first, borders an unreadable page. So no row's padding can be read together with its neighbours.
void check_stairs(const CpuCapability& capability, Operation operation, ElementType type, int64_t width, bool at_end) {
  const int64_t cols = std::min<int64_t>(21, width);
  const FaultReport report(std::string(capability.name) + ' ' + name_of(operation) + " of " + name_of(type) + ", " +
                           std::to_string(width) + " rows with unit row stride, each " +
                           (at_end ? "ending" : "beginning") + " a column before the last");
  std::vector<int64_t> lengths;
  std::vector<int64_t> starts;
  std::vector<int64_t> readable(static_cast<size_t>(cols), 0);  // elements of each column
  for (int64_t row = 0; row < width; ++row) {
    const int64_t start = at_end ? 0 : std::min<int64_t>(cols, width - 1 - row);
    const int64_t end = at_end ? std::min<int64_t>(cols, width - row) : cols;
    starts.push_back(start);
    lengths.push_back(end - start);
    for (int64_t col = start; col < end; ++col) {
      ++readable[static_cast<size_t>(col)];
    }
  }

  Problem problem;
  problem.operation = operation;
  problem.rows = width;
  problem.cols = cols;
  problem.row_ndim = 1;
  problem.row_sizes[0] = width;
  problem.input_count = input_count(operation);
  Matrix one(type, 1, 1);
  one.set(0, 0, 1.0);
  std::vector<std::unique_ptr<GuardedRows>> inputs;
  for (int k = 0; k < problem.input_count; ++k) {
    inputs.push_back(std::make_unique<GuardedRows>(type, readable, 1, at_end, width - 1));
    for (int64_t row = 0; row < width; ++row) {
      const int64_t start = starts[static_cast<size_t>(row)];
      for (int64_t col = start; col < start + lengths[static_cast<size_t>(row)]; ++col) {
        inputs.back()->set(col, col + row, one.bits(0, 0));
      }
    }
    inputs.back()->forbid_writing();
    problem.inputs[k] = inputs.back()->operand();
    // Column c lies c elements further on in its pages, so that its last valid row, or its first, borders their end.
    problem.inputs[k].col_stride = problem.inputs[k].row_strides[0] + 1;
    problem.inputs[k].row_strides[0] = 1;
  }
  const GuardedIntegers guarded_lengths(lengths, next_turn(), at_end);
  const GuardedIntegers guarded_starts(starts, next_turn(), at_end);
  guarded_lengths.guard(problem.lengths);
  guarded_starts.guard(problem.starts);
  problem.lengths.row_strides[0] = problem.starts.row_strides[0] = 1;
  const std::vector<int64_t> all_columns(static_cast<size_t>(cols), width);
  const GuardedRows output(type, all_columns, 1, at_end, 0);
  problem.output = output.operand();
  problem.output.col_stride = problem.output.row_strides[0];
  problem.output.row_strides[0] = 1;
  capability.run_rows(problem, 0, problem.rows);
  CHECK(is_written(output, type, all_columns, 0), capability.name << ' ' << name_of(operation) << ", stairs");
  CHECK(output.is_untouched_beside(0, width), capability.name << ' ' << name_of(operation) << ", beside the stairs");
}

// Packed rows in groups of `width` (a power of two) with unit row stride, and unreadable pages between the groups.
void check_packed(const CpuCapability& capability, Operation operation, ElementType input_type, ElementType output_type,
                  const std::vector<int64_t>& lengths, int64_t width, bool at_end) {
  constexpr int64_t kRowElems = 4096;  // whole pages of any type, more than the rows of a group have
  const FaultReport report(std::string(capability.name) + ' ' + name_of(operation) + " of " + name_of(input_type) +
                           " to " + name_of(output_type) + ", packed rows, " + std::to_string(width) +
                           " with unit row stride, " + (at_end ? "ending" : "beginning") + " at a page");
  std::vector<int64_t> elems;
  int64_t longest = 0;
  int64_t total = 0;
  for (int64_t length : lengths) {
    elems.push_back(length * width);
    longest = std::max(longest, length);
    total += length * width;
  }
  Problem problem;
  problem.operation = operation;
  problem.rows = static_cast<int64_t>(lengths.size()) * width;
  problem.row_ndim = 2;
  problem.row_sizes[0] = static_cast<int64_t>(lengths.size());
  problem.row_sizes[1] = width;
  problem.packing = {true, longest, total};
  problem.input_count = input_count(operation);
  const auto packed = [&](const GuardedRows& rows) {
    Operand operand = rows.operand();
    operand.col_stride = width;
    operand.row_strides[0] = 0;
    operand.row_strides[1] = 1;
    return operand;
  };
  std::vector<std::unique_ptr<GuardedRows>> inputs;
  for (int k = 0; k < problem.input_count; ++k) {
    inputs.push_back(std::make_unique<GuardedRows>(input_type, elems, 1, at_end, 0, kRowElems));
    fill_with_ones(*inputs.back(), input_type, elems, at_end ? longest * width : 0);
    inputs.back()->forbid_writing();
    problem.inputs[k] = packed(*inputs.back());
  }
  const GuardedRows output(output_type, elems, 1, at_end, 0, kRowElems);
  problem.output = packed(output);
  std::vector<int64_t> starts;
  for (int64_t length : lengths) {
    starts.push_back(static_cast<int64_t>(starts.size()) * kRowElems / width + (at_end ? longest - length : 0));
  }
  problem.cols = static_cast<int64_t>(lengths.size()) * kRowElems / width;
  const GuardedIntegers guarded_lengths(lengths, next_turn(), at_end);
  const GuardedIntegers guarded_starts(starts, next_turn(), at_end);
  for (RowIndex* index : {&problem.lengths, &problem.starts}) {
    index->row_strides[0] = 1;
    index->row_strides[1] = 0;
  }
  guarded_lengths.guard(problem.lengths);
  guarded_starts.guard(problem.starts);
  capability.run_rows(problem, 0, problem.rows);
  CHECK(is_written(output, output_type, elems, at_end ? longest * width : 0),
        capability.name << ' ' << name_of(operation) << ", packed rows");
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
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType input_type : kFloatingTypes) {
          for (ElementType output_type : kFloatingTypes) {
            for (Side side : kSides) {
              const Types types{input_type, input_type, output_type};
              check_batch(capability, operation, types, short_lengths(), 1, side);
            }
          }
        }
      }
    });
  });
}

TEST("guard pages: long rows, and rows with strided or reversed columns") {
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          for (Side side : kSides) {
            const Types types{type, type, type};
            check_batch(capability, operation, types, kLongLengths, 1, side);
            if (type == ElementType::kFloat32 || operation == Operation::kSoftmax) {
              check_batch(capability, operation, types, kLongestLengths, 1, side);
            }
            for (int64_t col_stride : {3, -1, -2}) {
              check_batch(capability, operation, types, short_lengths(), col_stride, side);
            }
          }
        }
      }
    });
  });
}

TEST("guard pages: derivatives whose inputs differ in type") {
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          if (!is_forward(operation) && type != ElementType::kFloat32) {
            check_batch(capability, operation, {ElementType::kFloat32, type, ElementType::kFloat32}, short_lengths(), 1,
                        Side::kEnd);
            check_batch(capability, operation, {type, ElementType::kFloat32, type}, short_lengths(), 1,
                        Side::kBeginning);
          }
        }
      }
    });
  });
}

TEST("guard pages: rows with unit row stride, between unreadable pages at both ends of every column") {
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType input_type : kFloatingTypes) {
          for (ElementType output_type : kFloatingTypes) {
            for (bool at_end : {true, false}) {
              check_unit_row_stride(capability, operation, input_type, output_type, 37, at_end);
              if (input_type == output_type) {
                check_unit_row_stride(capability, operation, input_type, output_type, 3, at_end);
              }
            }
          }
        }
      }
    });
  });
}

TEST("guard pages: rows with unit row stride, whose ends are at an unreadable page in every column") {
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          for (bool at_end : {true, false}) {
            for (int64_t width : {4, 16, 37}) {
              check_stairs(capability, operation, type, width, at_end);
            }
          }
        }
      }
    });
  });
}

TEST("guard pages: packed rows, with unreadable pages between them") {
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType input_type : kFloatingTypes) {
          for (ElementType output_type : kFloatingTypes) {
            for (bool at_end : {true, false}) {
              check_packed(capability, operation, input_type, output_type, {5, 0, 64, 1, 33, 17, 70}, 1, at_end);
              check_packed(capability, operation, input_type, output_type, {5, 0, 9, 1, 33}, 32, at_end);
            }
            check_packed(capability, operation, input_type, output_type, {5, 0, 9, 1, 33}, 2, true);
          }
        }
      }
    });
  });
}

TEST("guard pages: in place") {
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (ElementType type : kFloatingTypes) {
        for (bool at_end : {true, false}) {
          for (int64_t cols : {1, 7, 31, 64, 171, 1030}) {
            const FaultReport report(std::string(capability.name) + " of " + name_of(type) + ", in place, " +
                                     std::to_string(cols) + " columns");
            Bounds bounds{{0, 0, cols / 3, cols}, {cols, cols / 2, cols - cols / 3, 0}};
            std::vector<Matrix> inputs{Matrix(type, 4, cols)};
            fill_inputs(Operation::kSoftmax, inputs, bounds, 92);
            Matrix expected(type, 4, cols);
            Problem problem = make_problem(Operation::kSoftmax, expected, inputs, bounds);
            capability.run_rows(problem, 0, 4);

            GuardedRows rows(type, std::vector<int64_t>(4, cols), 1, at_end, 0);
            for (int64_t row = 0; row < 4; ++row) {
              rows.set(row, 0, bytes_at(inputs[0], row, 0, cols));
            }
            problem.inputs[0] = problem.output = rows.operand();
            capability.run_rows(problem, 0, 4);
            for (int64_t row = 0; row < 4; ++row) {
              CHECK(rows.bytes(row, 0, cols) == bytes_at(expected, row, 0, cols),
                    capability.name << ' ' << name_of(type) << " in place, row " << row << " of " << cols);
            }
            CHECK(rows.is_untouched_beside(0, cols), capability.name << ' ' << name_of(type) << " in place");
          }
        }
      }
    });
  });
}

TEST("guard pages: neither results nor padding are written beside the output") {
  const int64_t page = sysconf(_SC_PAGESIZE);
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      for (Operation operation : kOperations) {
        for (ElementType type : kFloatingTypes) {
          // One row that fills its pages: its first and its last column border unreadable ones.
          const int64_t cols = page / size_bytes(type);
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
