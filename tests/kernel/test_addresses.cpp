// Elements at any address, odd ones too: tensors that wrap other libraries' memory may be unaligned. The same bits, and
// nothing for UndefinedBehaviorSanitizer to report.
#include <cstring>
#include <optional>

#include "cases.h"
#include "check.h"
#include "common/bounds.h"

namespace kernel_tests {
namespace {

// Memory that begins at an odd address.
class OddBytes {
 public:
  explicit OddBytes(int64_t count) : bytes_(static_cast<size_t>(count) + 1) {}
  OddBytes(const void* data, int64_t count) : OddBytes(count) {
    std::memcpy(this->data(), data, static_cast<size_t>(count));
  }
  unsigned char* data() { return bytes_.data() + 1; }

 private:
  std::vector<unsigned char> bytes_;
};

enum class Arrangement { kContiguous, kStrided, kUnitRowStride };

constexpr Arrangement kArrangements[] = {Arrangement::kContiguous, Arrangement::kStrided, Arrangement::kUnitRowStride};
constexpr ElementType kIndexTypes[] = {ElementType::kInt64, ElementType::kInt32, ElementType::kInt16};
constexpr int64_t kRows = 37;  // with unit row stride, more than any vector holds

void arrange(Operand& operand, Arrangement arrangement, int64_t cols) {
  operand.col_stride = arrangement == Arrangement::kContiguous ? 1 : arrangement == Arrangement::kStrided ? 2 : kRows;
  operand.row_strides[0] = arrangement == Arrangement::kUnitRowStride ? 1 : cols * operand.col_stride;
}

// Stores the integers, converted to the type, at an odd address.
OddBytes odd_integers(const std::vector<int64_t>& values, RowIndex& index, ElementType type) {
  OddBytes memory(static_cast<int64_t>(values.size()) * size_bytes(type));
  store_integers(memory.data(), type, values);
  index.data = memory.data();
  index.type = type;
  return memory;
}

struct Case {
  Operation operation;
  ElementType input_type;
  ElementType output_type;
  ElementType index_type;
  Arrangement arrangement;
  int64_t cols;
  bool has_starts;
};

void check_odd_addresses(const CpuCapability& capability, const Case& c) {
  Bounds bounds;
  for (int64_t row = 0; row < kRows; ++row) {
    bounds.starts.push_back(c.has_starts ? row * 7 % c.cols : 0);
    bounds.lengths.push_back((c.cols - bounds.starts.back()) * (row % 5) / 4);
  }
  // Wide enough for every arrangement of the same elements.
  std::vector<Matrix> inputs;
  for (int k = 0; k < input_count(c.operation); ++k) {
    inputs.emplace_back(c.input_type, kRows, 2 * c.cols);
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t col = 0; col < 2 * c.cols; ++col) {
        inputs.back().set(row, col, 0.01 * static_cast<double>((row * 31 + col * 7 + k) % 100));
      }
    }
  }
  Matrix output(c.output_type, kRows, 2 * c.cols);
  Problem problem = make_problem(c.operation, output, inputs, bounds);
  problem.cols = c.cols;
  if (!c.has_starts) {
    problem.starts = RowIndex{};
    problem.starts.row_strides[0] = 0;
  }
  arrange(problem.output, c.arrangement, c.cols);
  for (int k = 0; k < problem.input_count; ++k) {
    arrange(problem.inputs[k], c.arrangement, c.cols);
  }
  const Operand even = problem.output;
  const int64_t output_bytes = kRows * 2 * c.cols * size_bytes(c.output_type);
  OddBytes odd_output(even.data, output_bytes);
  capability.run_rows(problem, 0, kRows);

  std::vector<OddBytes> odd_inputs;
  odd_inputs.reserve(inputs.size());
  for (int k = 0; k < problem.input_count; ++k) {
    odd_inputs.emplace_back(problem.inputs[k].data, kRows * 2 * c.cols * size_bytes(c.input_type));
    problem.inputs[k].data = odd_inputs.back().data();
  }
  const OddBytes lengths = odd_integers(bounds.lengths, problem.lengths, c.index_type);
  std::optional<OddBytes> starts;
  if (c.has_starts) {
    starts = odd_integers(bounds.starts, problem.starts, c.index_type);
  }
  problem.output.data = odd_output.data();
  const std::string what = std::string(capability.name) + ' ' + name_of(c.operation) + " of " + name_of(c.input_type) +
                           " to " + name_of(c.output_type) + ", lengths of " + name_of(c.index_type) +
                           ", arrangement " + std::to_string(static_cast<int>(c.arrangement)) + ", " +
                           std::to_string(c.cols) + " columns" + (c.has_starts ? ", starts" : "");
  CHECK(first_invalid_row(problem) == -1, what);
  capability.run_rows(problem, 0, kRows);
  CHECK(std::memcmp(odd_output.data(), even.data, static_cast<size_t>(output_bytes)) == 0, what);
}

}  // namespace

TEST("addresses: elements, lengths and starts may begin anywhere") {
  for_each_store_hint([&] {
    for_each_capability([&](const CpuCapability& capability) {
      unsigned turn = 0;
      for (Operation operation : kOperations) {
        for (ElementType input_type : kFloatingTypes) {
          for (ElementType output_type : kFloatingTypes) {
            for (Arrangement arrangement : kArrangements) {
              for (int64_t cols : {33, 64, 75}) {
                for (bool has_starts : {false, true}) {
                  const ElementType index_type = kIndexTypes[turn++ % 3];
                  check_odd_addresses(capability,
                                      {operation, input_type, output_type, index_type, arrangement, cols, has_starts});
                }
              }
            }
          }
        }
        const ElementType type = ElementType::kBFloat16;
        check_odd_addresses(capability,
                            {operation, type, type, ElementType::kInt64, Arrangement::kContiguous, 9001, true});
      }
    });
  });
}

}  // namespace kernel_tests
