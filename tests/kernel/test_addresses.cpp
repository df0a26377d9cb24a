// Elements may begin anywhere in memory, at odd addresses too, as a framework's tensors do: same bits, and nothing that
// C++ leaves undefined. Proven where UndefinedBehaviorSanitizer watches.
#include <cstring>

#include "cases.h"
#include "check.h"
#include "common/bounds.h"

namespace kernel_tests {
namespace {

// A copy whose every element lies one byte behind where it should.
class OddCopy {
 public:
  OddCopy(const void* data, int64_t bytes) : bytes_(static_cast<size_t>(bytes) + 1) {
    std::memcpy(bytes_.data() + 1, data, static_cast<size_t>(bytes));
  }
  unsigned char* data() { return bytes_.data() + 1; }
  const unsigned char* bytes() const { return bytes_.data() + 1; }

 private:
  std::vector<unsigned char> bytes_;
};

enum class Arrangement { kContiguous, kStrided, kSideBySide };

constexpr int64_t kRows = 5;
constexpr int64_t kCols = 75;

void arrange(Operand& operand, Arrangement arrangement) {
  operand.col_stride = arrangement == Arrangement::kContiguous ? 1 : arrangement == Arrangement::kStrided ? 2 : kRows;
  operand.row_strides[0] = arrangement == Arrangement::kSideBySide ? 1 : kCols * operand.col_stride;
}

void check_odd_addresses(const CpuCapability& capability, Operation operation, ElementType input_type,
                         ElementType output_type, Arrangement arrangement) {
  const Bounds bounds{{0, 3, 70, 0, 10}, {75, 20, 5, 0, 64}};
  // Wide enough for every arrangement of the same elements.
  std::vector<Matrix> inputs;
  for (int k = 0; k < input_count(operation); ++k) {
    inputs.emplace_back(input_type, kRows, 2 * kCols);
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t col = 0; col < 2 * kCols; ++col) {
        inputs.back().set(row, col, 0.01 * static_cast<double>((row * 31 + col * 7 + k) % 100));
      }
    }
  }
  Matrix output(output_type, kRows, 2 * kCols);
  Problem problem = make_problem(operation, output, inputs, bounds);
  problem.cols = kCols;
  arrange(problem.output, arrangement);
  for (int k = 0; k < problem.input_count; ++k) {
    arrange(problem.inputs[k], arrangement);
  }
  const Operand even = problem.output;
  const int64_t output_bytes = kRows * 2 * kCols * size_of(output_type);
  OddCopy odd_output(even.data, output_bytes);
  capability.run_rows(problem, 0, kRows);

  std::vector<OddCopy> odd_inputs;
  for (int k = 0; k < problem.input_count; ++k) {
    odd_inputs.emplace_back(problem.inputs[k].data, kRows * 2 * kCols * size_of(input_type));
    problem.inputs[k].data = odd_inputs.back().data();
  }
  const auto index_bytes = static_cast<int64_t>(kRows * sizeof(int64_t));
  OddCopy odd_lengths(bounds.lengths.data(), index_bytes);
  OddCopy odd_starts(bounds.starts.data(), index_bytes);
  problem.lengths.data = odd_lengths.data();
  problem.starts.data = odd_starts.data();
  problem.output.data = odd_output.data();
  CHECK(first_invalid_row(problem) < 0, "the bounds are valid");
  capability.run_rows(problem, 0, kRows);
  CHECK(std::memcmp(odd_output.bytes(), even.data, static_cast<size_t>(output_bytes)) == 0,
        capability.name << ' ' << name_of(operation) << " of " << name_of(input_type) << " to " << name_of(output_type)
                        << ", arrangement " << static_cast<int>(arrangement));
}

}  // namespace

TEST("addresses: elements, lengths and starts may begin anywhere") {
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : kOperations) {
      for (ElementType input_type : kFloatingTypes) {
        for (ElementType output_type : kFloatingTypes) {
          for (Arrangement arrangement : {Arrangement::kContiguous, Arrangement::kStrided, Arrangement::kSideBySide}) {
            check_odd_addresses(capability, operation, input_type, output_type, arrangement);
          }
        }
      }
    }
  });
}

}  // namespace kernel_tests
