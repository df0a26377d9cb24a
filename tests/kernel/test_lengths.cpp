// Lengths and starts: read in their own types and strides, invalid ones found, and none leads outside of its row.
#include <limits>

#include "cases.h"
#include "check.h"
#include "common/bounds.h"
#include "cpu/partition.h"

namespace kernel_tests {
namespace {

constexpr int64_t kSmallest = std::numeric_limits<int64_t>::min();
constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

// A problem of two row dimensions (outer, inner) and no memory but its lengths and starts.
Problem index_problem(int64_t outer, int64_t inner, int64_t cols) {
  Problem problem;
  problem.rows = outer * inner;
  problem.cols = cols;
  problem.row_ndim = 2;
  problem.row_sizes[0] = outer;
  problem.row_sizes[1] = inner;
  for (int64_t* strides : {problem.output.row_strides, problem.inputs[0].row_strides, problem.lengths.row_strides,
                           problem.starts.row_strides}) {
    strides[0] = strides[1] = 0;
  }
  return problem;
}

template <class T>
void check_type(ElementType type, int64_t invalid) {
  for (int64_t bad = -1; bad < 12; ++bad) {
    std::vector<T> lengths(12, T{5});
    if (bad >= 0) {
      lengths[static_cast<size_t>(bad)] = static_cast<T>(invalid);
    }
    Problem problem = index_problem(3, 4, 5);
    problem.lengths.data = lengths.data();
    problem.lengths.type = type;
    problem.lengths.row_strides[0] = 4;
    problem.lengths.row_strides[1] = 1;
    CHECK(first_invalid_row(problem) == bad,
          name_of(type) << " length " << invalid << " in row " << bad << ": " << first_invalid_row(problem));
  }
}

}  // namespace

TEST("lengths: the first invalid one is found, in every integer type") {
  check_type<int8_t>(ElementType::kInt8, -128);
  check_type<uint8_t>(ElementType::kUInt8, 255);
  check_type<int16_t>(ElementType::kInt16, 6);
  check_type<int32_t>(ElementType::kInt32, -1);
  for (int64_t invalid : {int64_t{-1}, int64_t{6}, kSmallest, kLargest}) {
    check_type<int64_t>(ElementType::kInt64, invalid);
  }
}

TEST("lengths: broadcast along either dimension, the row that is named is the first of all") {
  std::vector<int64_t> lengths{5, 9, 5};
  Problem problem = index_problem(3, 4, 5);
  problem.lengths.data = lengths.data();
  problem.lengths.row_strides[0] = 1;
  CHECK(first_invalid_row(problem) == 4, first_invalid_row(problem));
  problem.lengths.row_strides[0] = 0;
  problem.lengths.row_strides[1] = 1;
  problem.row_sizes[0] = 4;
  problem.row_sizes[1] = 3;
  CHECK(first_invalid_row(problem) == 1, first_invalid_row(problem));
}

TEST("starts: start + length beyond the columns is invalid, without overflow") {
  const auto is_valid = [](int64_t start, int64_t length) {
    Problem problem = index_problem(1, 1, 5);
    problem.starts.value = start;
    problem.lengths.value = length;
    return first_invalid_row(problem) < 0;
  };
  CHECK(is_valid(0, 5) && is_valid(5, 0) && is_valid(2, 3), "inside");
  for (int64_t extreme : {int64_t{-1}, int64_t{6}, kSmallest, kLargest}) {
    CHECK(!is_valid(extreme, 0), "start " << extreme);
    CHECK(!is_valid(0, extreme), "length " << extreme);
    CHECK(!is_valid(extreme, extreme), "both " << extreme);
    CHECK(!is_valid(1, extreme) && !is_valid(extreme, 1), "one " << extreme);
  }
  CHECK(!is_valid(3, 3), "3 + 3 of 5");
}

TEST("lengths: changed after the check, they still do not lead outside of the row") {
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : kOperations) {
      for (ElementType type : kFloatingTypes) {
        for (int64_t start : {int64_t{0}, int64_t{3}, int64_t{-5}, int64_t{99}, kSmallest, kLargest}) {
          for (int64_t length : {int64_t{2}, int64_t{-7}, int64_t{1000}, kSmallest, kLargest}) {
            const Bounds inside{{0, 0, 0}, {20, 20, 20}};
            std::vector<Matrix> inputs;
            for (int k = 0; k < input_count(operation); ++k) {
              inputs.emplace_back(type, 3, 20, 1, 0, 9);
            }
            fill_inputs(operation, inputs, inside, 3);
            Matrix output(type, 3, 20, 1, 0, 9);
            const Bounds bounds{{0, start, 0}, {20, length, 20}};
            capability.run_rows(make_problem(operation, output, inputs, bounds), 0, 3);
            CHECK(output.surroundings_are_untouched(),
                  capability.name << ' ' << name_of(operation) << " start " << start << " length " << length);
          }
        }
      }
    }
  });
}

TEST("rows are walked in order over many dimensions and broadcast strides") {
  // The output has row dimensions (2, 3, 4); lengths follow the middle one. Each row's length is seen in its padding.
  const std::vector<int32_t> lengths{0, 2, 5};
  std::vector<float> input(2 * 3 * 4 * 5, 1.0f);
  for_each_capability([&](const CpuCapability& capability) {
    std::vector<float> output(input.size(), -1.0f);
    Problem problem = index_problem(1, 1, 5);
    problem.row_ndim = 3;
    problem.rows = 24;
    const int64_t sizes[] = {2, 3, 4};
    const int64_t strides[] = {60, 20, 5};
    const int64_t length_strides[] = {0, 1, 0};
    for (int d = 0; d < 3; ++d) {
      problem.row_sizes[d] = sizes[d];
      problem.output.row_strides[d] = problem.inputs[0].row_strides[d] = strides[d];
      problem.lengths.row_strides[d] = length_strides[d];
      problem.starts.row_strides[d] = 0;
    }
    problem.output.data = output.data();
    problem.inputs[0].data = input.data();
    problem.output.col_stride = problem.inputs[0].col_stride = 1;
    problem.lengths.data = lengths.data();
    problem.lengths.type = ElementType::kInt32;
    for (int64_t split : {0, 1, 7, 12, 23}) {
      capability.run_rows(problem, 0, split);
      capability.run_rows(problem, split, 24);
      for (int64_t row = 0; row < 24; ++row) {
        const int32_t length = lengths[static_cast<size_t>(row / 4 % 3)];
        for (int64_t col = 0; col < 5; ++col) {
          const float want = col < length ? 1.0f / static_cast<float>(length) : 0.0f;
          const float got = output[static_cast<size_t>(row * 5 + col)];
          CHECK(got == want, capability.name << " row " << row << " column " << col << ": " << got);
        }
      }
    }
  });
}

TEST("threads: parts hold the same work, not the same number of rows") {
  std::vector<int64_t> lengths(1000);
  for (size_t i = 0; i < lengths.size(); ++i) {
    lengths[i] = static_cast<int64_t>(i);  // sorted: the second half holds three quarters of the work
  }
  Problem problem = index_problem(1, 1000, 1000);
  problem.lengths = index_over(lengths);
  problem.lengths.row_strides[0] = 0;
  problem.lengths.row_strides[1] = 1;
  for (int parts : {1, 2, 3, 8, 1000, 2000}) {
    const std::vector<int64_t> boundaries = partition_rows(problem, parts);
    CHECK(boundaries.size() == static_cast<size_t>(parts) + 1, boundaries.size());
    CHECK(boundaries.front() == 0 && boundaries.back() == 1000, parts << " parts");
    for (size_t i = 1; i < boundaries.size(); ++i) {
      CHECK(boundaries[i - 1] <= boundaries[i], parts << " parts, boundary " << i);
    }
  }
  const auto cost = [&](int64_t begin, int64_t end) {
    int64_t total = 0;
    for (int64_t row = begin; row < end; ++row) {
      total += kRowCost + 1000 + kValidCost * lengths[static_cast<size_t>(row)];
    }
    return static_cast<double>(total);
  };
  const std::vector<int64_t> halves = partition_rows(problem, 2);
  const double ratio = cost(0, halves[1]) / cost(halves[1], 1000);
  CHECK(ratio > 0.98 && ratio < 1.02, "first half over second: " << ratio);
}

}  // namespace kernel_tests
