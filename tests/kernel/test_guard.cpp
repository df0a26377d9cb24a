// Nothing is read or written outside of the valid range: it lies against unreadable pages here.
#include "cases.h"
#include "check.h"
#include "guard.h"

namespace kernel_tests {
namespace {

// One row of `length` valid columns at the end (or the beginning) of readable memory, with unreadable padding behind
// (or before) it.
void check_guarded(Operation operation, ElementType type, const CpuCapability& capability, int64_t length,
                   bool padding_behind) {
  constexpr int64_t kPadding = 100;
  const int64_t size_bytes = length * size_of(type);
  const Bounds alone{{0}, {length}};
  std::vector<Matrix> values;
  for (int k = 0; k < input_count(operation); ++k) {
    values.emplace_back(type, 1, length);
  }
  fill_inputs(operation, values, alone, 3);
  Matrix expected(type, 1, length);
  capability.run_rows(make_problem(operation, expected, values, alone), 0, 1);

  const Bounds bounds{{padding_behind ? 0 : kPadding}, {length}};
  Matrix output(type, 1, length + kPadding);
  std::vector<Matrix> placeholders = values;
  Problem problem = make_problem(operation, output, placeholders, bounds);
  std::vector<GuardedBuffer*> buffers;
  for (size_t k = 0; k < values.size(); ++k) {
    buffers.push_back(new GuardedBuffer(size_bytes, padding_behind));
    std::memcpy(buffers.back()->data(), values[k].operand().data, static_cast<size_t>(size_bytes));
    problem.inputs[k].data = buffers.back()->data() - bounds.starts[0] * size_of(type);
  }
  capability.run_rows(problem, 0, 1);
  for (int64_t i = 0; i < length; ++i) {
    CHECK(output.bits(0, bounds.starts[0] + i) == expected.bits(0, i),
          capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << ", row of " << length);
  }

  // And an output between the same pages: nothing is written outside of it.
  GuardedBuffer result(size_bytes, padding_behind);
  Problem exact = make_problem(operation, expected, values, alone);
  exact.output.data = result.data();
  capability.run_rows(exact, 0, 1);
  for (GuardedBuffer* buffer : buffers) {
    delete buffer;
  }
}

}  // namespace

TEST("guard pages: padding is never read, and nothing beyond a row's ends") {
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : kOperations) {
      for (ElementType type : kFloatingTypes) {
        for (bool padding_behind : {true, false}) {
          for (int64_t length = 1; length <= 70; ++length) {
            check_guarded(operation, type, capability, length, padding_behind);
          }
          for (int64_t length : {255, 257, 2047, 2049, 8191, 8193}) {
            check_guarded(operation, type, capability, length, padding_behind);
          }
        }
      }
    }
  });
}

}  // namespace kernel_tests
