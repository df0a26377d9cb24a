// The kernel layer under libFuzzer: any problem that a Problem can describe, on any instruction set.
//
// Checked for every input: invalid bounds are found before a kernel runs; padding is exact; only valid elements are
// read and only the output's elements are written, even if bounds change after the check; neither layout, nor padded
// width, nor partition changes a bit; and the reference agrees.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "common/bounds.h"
#include "cpu/partition.h"
#include "kernel_case.h"
#include "reference.h"

namespace fuzz {
namespace {

std::string describe(const Case& c) {
  const Problem& problem = c.problem();
  std::ostringstream text;
  text << c.capability().name << ' ' << kernel_tests::name_of(problem.operation) << ", scale " << problem.scale
       << ", types";
  for (int k = 0; k < problem.input_count; ++k) {
    text << ' ' << static_cast<int>(problem.inputs[k].type);
  }
  text << " -> " << static_cast<int>(problem.output.type) << (c.is_packed() ? ", packed" : "")
       << (c.has_sinks() ? ", sinks" : "") << ", rows (";
  for (int64_t size : c.shape().row_sizes) {
    text << ' ' << size;
  }
  text << " ), cols " << problem.cols << ", col_strides";
  for (int k = 0; k < problem.input_count; ++k) {
    text << ' ' << problem.inputs[k].col_stride;
  }
  text << " -> " << problem.output.col_stride;
  return text.str();
}

void require(bool holds, const Case& c, const std::string& promise) {
  if (!holds) {
    std::fprintf(stderr, "BROKEN: %s\n  %s\n", promise.c_str(), describe(c).c_str());
    std::abort();
  }
}

std::string place(int64_t row, int64_t col) { return "row " + std::to_string(row) + ", column " + std::to_string(col); }

// Runs the rows part by part, as threads would, in any order.
void run_in_parts(Case& c, const Problem& problem) {
  const int parts = 1 + static_cast<int>(c.bytes().up_to(4));
  std::vector<int64_t> boundaries = partition_rows(problem, parts);
  require(boundaries.size() == static_cast<size_t>(parts) + 1 && boundaries.front() == 0 &&
              boundaries.back() == problem.rows && std::is_sorted(boundaries.begin(), boundaries.end()),
          c, "parts cover all rows, each once");
  if (c.bytes().flag()) {
    for (int64_t& boundary : boundaries) {
      boundary = boundary == 0 || boundary == problem.rows ? boundary : c.bytes().up_to(problem.rows);
    }
    std::sort(boundaries.begin(), boundaries.end());
  }
  for (size_t part = boundaries.size() - 1; part-- > 0;) {
    c.capability().run_rows(problem, boundaries[part], boundaries[part + 1]);
  }
}

long double element(const void* at, ElementType type) {
  long double value = 0;
  visit_element_type(type, [&](auto element) {
    using T = decltype(element);
    std::memcpy(&element, at, sizeof(T));
    if constexpr (std::is_integral_v<T>) {
      value = static_cast<long double>(element);
    } else {
      value = static_cast<long double>(to_acc<double>(element));
    }
  });
  return value;
}

bool agrees(long double got, const kernel_tests::Expected& expected, ElementType type) {
  if (std::isnan(expected.value)) {
    return std::isnan(got);
  }
  if (got == expected.value || std::fabs(got - expected.value) <= expected.tolerance) {
    return true;
  }
  const long double magnitude = std::fabs(expected.value) + expected.tolerance;
  return std::isinf(got) && (got < 0) == (expected.value < 0) && magnitude >= kernel_tests::largest_of(type);
}

// One row's results; empty if it has no valid column.
struct ExpectedRow {
  std::vector<kernel_tests::Expected> y;
  kernel_tests::Expected sink_weight;
};

ExpectedRow expected_row(Case& c, int64_t row, const Bounds& bounds) {
  const Problem& problem = c.problem();
  bool in_double = problem.output.type == ElementType::kFloat64;
  for (Matrix& input : c.twin_inputs()) {
    in_double = in_double || input.type() == ElementType::kFloat64;
  }
  kernel_tests::RowValues values(c.twin_inputs().size());
  for (size_t k = 0; k < values.size(); ++k) {
    const Operand operand = c.twin_inputs()[k].operand();
    for (int64_t i = 0; i < bounds.lengths[static_cast<size_t>(row)]; ++i) {
      const int64_t offset = row * operand.row_strides[0] + bounds.starts[static_cast<size_t>(row)] + i;
      const long double value =
          element(static_cast<const char*>(operand.data) + offset * size_bytes(operand.type), operand.type);
      // Integers are converted to the accumulation type first.
      values[k].push_back(in_double ? static_cast<double>(value) : static_cast<float>(value));
    }
  }
  const double sink = c.has_sinks() ? c.sinks()[static_cast<size_t>(row)] : -kInfinity;
  if (values[0].empty()) {
    return {{}, {sink == -kInfinity ? 0 : 1 + (sink - sink), 0}};
  }
  const kernel_tests::real eps = kernel_tests::epsilon_of(in_double);
  ExpectedRow expected;
  if (!is_forward(problem.operation)) {
    expected.y = kernel_tests::expected_derivative(problem.operation, values, problem.scale, eps);
  } else {
    const std::vector<kernel_tests::real>& x = values[0];
    const long double sign = problem.scale < 0 ? -1 : 1;
    bool is_nan = false;
    bool all_lowest = true;
    for (long double value : x) {
      is_nan = is_nan || std::isnan(value) || sign * value == kInfinity;
      all_lowest = all_lowest && sign * value == -kInfinity;
    }
    is_nan = is_nan || std::isnan(sink) || sink == kInfinity;
    if (is_nan || (all_lowest && sink == -kInfinity)) {
      const kernel_tests::Expected nan{static_cast<long double>(kNan), 0};
      return {std::vector<kernel_tests::Expected>(x.size(), nan), nan};
    }
    const bool is_log = problem.operation == Operation::kLogSoftmax;
    kernel_tests::ExpectedForward forward =
        kernel_tests::expected_forward_and_row_numbers(x, is_log, problem.scale, eps, sink);
    expected = {std::move(forward.y), forward.sink_weight};
  }
  for (kernel_tests::Expected& result : expected.y) {
    result.tolerance += kernel_tests::rounding_of(problem.output.type, in_double, result.value);
  }
  if (c.has_sinks()) {
    expected.sink_weight.tolerance +=
        kernel_tests::rounding_of(c.sink_weight_type(), in_double, expected.sink_weight.value);
  }
  return expected;
}

void check_padding(Case& c) {
  const Problem& problem = c.problem();
  const auto size = static_cast<size_t>(size_bytes(problem.output.type));
  unsigned char padding[8] = {};
  visit_element_type(problem.output.type, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_integral_v<T>) {
      element = from_acc<T>(problem.padding_value());
      std::memcpy(padding, &element, sizeof(T));
    }
  });
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t start = c.bounds().starts[static_cast<size_t>(row)];
    const int64_t end = start + c.bounds().lengths[static_cast<size_t>(row)];
    for (int64_t col = 0; col < problem.cols; ++col) {
      require((col >= start && col < end) || std::memcmp(c.result_at(row, col), padding, size) == 0, c,
              "padding is exact: " + place(row, col));
    }
  }
}

void check_sink_weight(Case& c, int64_t row, const std::string& twin, const kernel_tests::Expected& want) {
  const ElementType type = c.sink_weight_type();
  const unsigned char* const result = c.sink_weight_at(row);
  const long double got = element(result, type);
  require(
      std::memcmp(result, twin.data(), twin.size()) == 0 || (std::isnan(got) && std::isnan(element(twin.data(), type))),
      c, "a sink's weight has the same bits beside a contiguous matrix: row " + std::to_string(row));
  if (c.has_reference() && !agrees(got, want, type)) {
    std::ostringstream what;
    what << "the reference agrees: the weight of the sink " << c.sinks()[static_cast<size_t>(row)] << " of row " << row
         << " is " << got << ", expected " << want.value << ", tolerance " << want.tolerance;
    require(false, c, what.str());
  }
}

// weights: those of the twin's sinks.
void check_values(Case& c, const Matrix& twin, const Matrix& weights, const Bounds& bounds) {
  const Problem& problem = c.problem();
  const auto size = static_cast<size_t>(size_bytes(problem.output.type));
  for (int64_t row = 0; row < problem.rows; ++row) {
    const ExpectedRow row_of_reference = c.has_reference() ? expected_row(c, row, bounds) : ExpectedRow();
    const std::vector<kernel_tests::Expected>& expected = row_of_reference.y;
    if (c.has_sinks()) {
      check_sink_weight(c, row, weights.bits(row, 0), row_of_reference.sink_weight);
    }
    for (int64_t i = 0; i < bounds.lengths[static_cast<size_t>(row)]; ++i) {
      const int64_t col = bounds.starts[static_cast<size_t>(row)] + i;
      const unsigned char* const result = c.result_at(row, col);
      const long double got = element(result, problem.output.type);
      const long double there = twin.get(row, col);
      const bool is_same = std::memcmp(result, twin.bits(row, col).data(), size) == 0;
      if (!is_same && !(std::isnan(got) && std::isnan(there))) {
        std::ostringstream what;
        what << "the same bits in a contiguous matrix: " << place(row, col) << " is " << got << ", there " << there;
        require(false, c, what.str());
      }
      if (!expected.empty()) {
        const kernel_tests::Expected& want = expected[static_cast<size_t>(i)];
        std::ostringstream what;
        if (!agrees(got, want, problem.output.type)) {
          what << "the reference agrees: " << place(row, col) << " is " << got << ", expected " << want.value
               << ", tolerance " << want.tolerance;
          require(false, c, what.str());
        }
      }
    }
  }
}

void check(Bytes bytes) {
  Case c(bytes);
  const bool is_disturbed = c.bytes().up_to(15) == 15;
  const int64_t invalid = c.first_invalid_row();
  require(first_invalid_row(c.problem()) == invalid, c, "the first invalid row is found");
  const bool is_empty = c.problem().rows == 0 || (c.problem().cols == 0 && !c.has_sinks());
  if ((invalid >= 0 && !is_disturbed) || is_empty) {
    return;  // as binding/cpu_ops.cpp does
  }
  force_store_hint(c.store_hint());
  if (is_disturbed) {
    c.disturb_bounds();
  }
  c.poison_all_else(!is_disturbed);
  run_in_parts(c, c.problem());
  c.unpoison();
  require(c.surroundings_are_untouched(), c, "nothing but the output is written");
  if (is_disturbed) {
    return;
  }
  if (!c.is_packed()) {
    check_padding(c);
  }
  const Bounds bounds = c.twin_bounds();
  Matrix twin(c.problem().output.type, c.problem().rows, c.twin_cols());
  Problem problem = kernel_tests::make_problem(c.problem().operation, twin, c.twin_inputs(), bounds, c.problem().scale);
  Matrix sinks(ElementType::kFloat64, problem.rows, 1);
  Matrix weights(c.has_sinks() ? c.sink_weight_type() : ElementType::kFloat32, problem.rows, 1);
  if (c.has_sinks()) {
    for (int64_t row = 0; row < problem.rows; ++row) {
      sinks.set(row, 0, c.sinks()[static_cast<size_t>(row)]);
    }
    problem.row_input.data = sinks.operand().data;
    problem.row_input.type = ElementType::kFloat64;
    problem.row_input.row_strides[0] = 1;
    problem.row_result = {weights.operand().data, weights.type()};
  }
  if (problem.cols > 0) {
    force_store_hint({});
    c.capability().run_rows(problem, 0, problem.rows);
    check_values(c, twin, weights, bounds);
  }
}

}  // namespace
}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::check(fuzz::Bytes(data, size));
  return 0;
}
