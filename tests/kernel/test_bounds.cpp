// Bounds as arrays of any shape: the first invalid row is the one that a plain loop finds, bounds out of range are
// clamped to the row, and the parts that threads get cost about the same.
#include "common/bounds.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <numeric>

#include "cases.h"
#include "check.h"
#include "cpu/partition.h"
#include "fault.h"
#include "guard.h"

namespace kernel_tests {
namespace {

constexpr int64_t kSmallest = std::numeric_limits<int64_t>::min();
constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

// Integers of any type over three row dimensions, with strides of any sign, or 0.
struct Integers {
  ElementType type;
  int64_t strides[3];
  int64_t first = 0;
  std::vector<int64_t> memory;  // holds the narrower types' elements too

  void store(int64_t position, int64_t value) {
    store_integer(reinterpret_cast<char*>(memory.data()) + position * size_bytes(type), type, value);
  }
  RowIndex index() const {
    RowIndex result;
    result.data = reinterpret_cast<const char*>(memory.data()) + first * size_bytes(type);
    result.type = type;
    std::copy(strides, strides + 3, result.row_strides);
    return result;
  }
};

constexpr ElementType kIntegerTypes[] = {ElementType::kInt8,   ElementType::kUInt8, ElementType::kInt16,
                                         ElementType::kUInt16, ElementType::kInt32, ElementType::kUInt32,
                                         ElementType::kInt64};

constexpr int64_t kSizes[] = {2, 3, 5};

constexpr int64_t kCols = 400;

// The sum of two is at most kCols; some need the eighth bit of an unsigned byte.
Integers random_integers(std::mt19937& random, bool with_invalid) {
  Integers integers;
  integers.type = kIntegerTypes[random() % std::size(kIntegerTypes)];
  const int64_t largest = integers.type == ElementType::kInt8 ? 127 : kCols / 2;
  int64_t step = 1;
  for (int dim = 2; dim >= 0; --dim) {
    const int kind = static_cast<int>(random() % 4);  // broadcast, reversed, or as it comes
    integers.strides[dim] = kind == 0 ? 0 : kind == 1 ? -step : step;
    integers.first += kind == 1 ? step * (kSizes[dim] - 1) : 0;
    step *= kSizes[dim] + static_cast<int64_t>(random() % 2);
  }
  integers.memory.assign(static_cast<size_t>(step), 0);
  for (int64_t i = 0; i < step; ++i) {
    integers.store(i, static_cast<int64_t>(random()) % (largest + 1));
  }
  if (with_invalid) {
    for (int i = 0; i < 3; ++i) {
      const int64_t wrong[] = {-1,  kCols + 1, -128,
                               255, kSmallest, kLargest};  // truncated to the type, and then perhaps valid
      integers.store(static_cast<int64_t>(random()) % step, wrong[random() % 6]);
    }
  }
  return integers;
}

Problem random_problem(const Integers& lengths, const Integers& starts) {
  Problem problem;
  problem.cols = kCols;
  problem.rows = 2 * 3 * 5;
  problem.row_ndim = 3;
  std::copy(kSizes, kSizes + 3, problem.row_sizes);
  std::fill(problem.output.row_strides, problem.output.row_strides + 3, 0);
  std::fill(problem.inputs[0].row_strides, problem.inputs[0].row_strides + 3, 0);
  problem.lengths = lengths.index();
  problem.starts = starts.index();
  return problem;
}

int64_t load_at(const RowIndex& index, int64_t row) {
  const int64_t position[] = {row / 15, row / 5 % 3, row % 5};
  int64_t offset = 0;
  for (int dim = 0; dim < 3; ++dim) {
    offset += position[dim] * index.row_strides[dim];
  }
  int64_t value = 0;
  visit_element_type(index.type, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_integral_v<T>) {
      value = static_cast<int64_t>(static_cast<const T*>(index.data)[offset]);
    }
  });
  return value;
}

bool is_valid(int64_t start, int64_t length, int64_t cols) {
  return start >= 0 && start <= cols && length >= 0 && length <= cols && start + length <= cols;
}

std::vector<int64_t> ascending_boundaries(const Problem& problem, int parts, const std::string& what) {
  std::vector<int64_t> boundaries = partition_rows(problem, parts);
  CHECK(boundaries.size() == static_cast<size_t>(parts) + 1, what << ": " << boundaries.size() << " boundaries");
  CHECK(boundaries.front() == 0 && boundaries.back() == problem.rows, what << ", " << parts << " parts");
  CHECK(std::is_sorted(boundaries.begin(), boundaries.end()), what << ", " << parts << " parts");
  return boundaries;
}

// `lengths` are those of the problem's rows, one for each.
void check_partition(const Problem& problem, const std::vector<int64_t>& lengths, const std::string& what) {
  std::vector<int64_t> costs;
  for (int64_t length : lengths) {
    costs.push_back(kRowCost + (problem.packing.is_packed ? length : problem.cols) + kValidCost * length);
  }
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
  const int64_t largest = *std::max_element(costs.begin(), costs.end());
  CHECK(max_total_cost(problem) >= total, what << ": " << max_total_cost(problem) << " < " << total);
  for (int parts : {1, 2, 3, 7, 16, 64}) {
    const std::vector<int64_t> boundaries = ascending_boundaries(problem, parts, what);
    // A part ends with the row that takes it beyond its share: one row's cost too much, at most.
    for (size_t part = 0; part < static_cast<size_t>(parts); ++part) {
      const int64_t cost =
          std::accumulate(costs.begin() + boundaries[part], costs.begin() + boundaries[part + 1], int64_t{0});
      CHECK(cost <= total / parts + parts + largest,
            what << ", " << parts << " parts, part " << part << " costs " << cost << " of " << total);
    }
  }
}

Problem problem_over(const std::vector<int64_t>& lengths) {
  Problem problem;
  problem.cols = 1000;
  problem.rows = static_cast<int64_t>(lengths.size());
  problem.row_ndim = 1;
  problem.row_sizes[0] = problem.rows;
  problem.output.row_strides[0] = problem.inputs[0].row_strides[0] = problem.starts.row_strides[0] = 0;
  problem.lengths = index_over(lengths);
  return problem;
}

void check_partition(const std::vector<int64_t>& lengths, const char* what) {
  check_partition(problem_over(lengths), lengths, what);
}

}  // namespace

TEST("lengths: the first invalid row is the one that a plain loop finds, whatever the types and strides") {
  std::mt19937 random(121);
  int found = 0;
  for (int round = 0; round < 4000; ++round) {
    const Integers lengths = random_integers(random, round % 2 == 0);
    const Integers starts = random_integers(random, round % 3 == 0);
    Problem problem = random_problem(lengths, starts);
    if (round % 5 == 0) {
      problem.starts.data = nullptr;
      problem.starts.value = static_cast<int64_t>(round % 7) * 40;
    }
    int64_t expected = -1;
    for (int64_t row = 0; row < problem.rows && expected < 0; ++row) {
      const int64_t start = problem.starts.data == nullptr ? problem.starts.value : load_at(problem.starts, row);
      expected = is_valid(start, load_at(problem.lengths, row), problem.cols) ? -1 : row;
    }
    found += expected > 0 ? 1 : 0;
    CHECK(first_invalid_row(problem) == expected,
          "round " << round << ": " << first_invalid_row(problem) << ", expected " << expected);
  }
  CHECK(found > 100, "too few rounds had an invalid row: " << found);
}

TEST("lengths: the kernels read them in every integer type and stride") {
  std::mt19937 random(131);
  for (int round = 0; round < 60; ++round) {
    const Integers lengths = random_integers(random, false);
    const Integers starts = random_integers(random, false);
    Problem problem = random_problem(lengths, starts);
    const std::vector<float> input(kCols, 0.5f);  // all rows read the same one: only lengths tell the results apart
    std::vector<float> output(30 * kCols);
    problem.inputs[0].data = const_cast<float*>(input.data());
    problem.inputs[0].col_stride = problem.output.col_stride = 1;
    problem.output.data = output.data();
    const int64_t output_strides[] = {15 * kCols, 5 * kCols, kCols};
    std::copy(output_strides, output_strides + 3, problem.output.row_strides);
    for_each_capability([&](const CpuCapability& capability) {
      std::fill(output.begin(), output.end(), -1.0f);
      capability.run_rows(problem, 0, 11);
      capability.run_rows(problem, 11, 30);
      for (int64_t row = 0; row < 30; ++row) {
        const int64_t start = load_at(problem.starts, row);
        const int64_t length = load_at(problem.lengths, row);
        for (int64_t col = 0; col < kCols; ++col) {
          const bool valid = start <= col && col < start + length;
          const float want = valid ? 1.0f / static_cast<float>(length) : 0.0f;
          const float got = output[static_cast<size_t>(row * kCols + col)];
          CHECK(std::fabs(got - want) <= 0x1p-22f * want, capability.name << ", round " << round << ", row " << row
                                                                          << " of " << length << " from " << start
                                                                          << ", column " << col << ": " << got);
        }
      }
    });
  }
}

TEST("lengths: a number for every row gives the bits of a tensor that repeats it") {
  constexpr int64_t kRows = 6;
  for (Operation operation : kOperations) {
    for (ElementType type : kFloatingTypes) {
      for (int64_t length : {0, 1, 40, 72}) {
        for (int64_t start : {0, 3}) {
          const Bounds bounds{std::vector<int64_t>(kRows, start), std::vector<int64_t>(kRows, length)};
          std::vector<Matrix> inputs;
          for (int k = 0; k < input_count(operation); ++k) {
            inputs.emplace_back(type, kRows, 75);
          }
          fill_inputs(operation, inputs, bounds, 17);
          for_each_capability([&](const CpuCapability& capability) {
            Matrix expected(type, kRows, 75);
            Matrix output(type, kRows, 75);
            Problem problem = make_problem(operation, expected, inputs, bounds);
            capability.run_rows(problem, 0, kRows);
            problem.output = output.operand();
            problem.lengths.data = problem.starts.data = nullptr;
            problem.lengths.value = length;
            problem.starts.value = start;
            capability.run_rows(problem, 0, kRows);
            for (int64_t row = 0; row < kRows; ++row) {
              for (int64_t col = 0; col < 75; ++col) {
                CHECK(output.bits(row, col) == expected.bits(row, col),
                      capability.name << ' ' << name_of(operation) << ' ' << name_of(type) << ", length " << length
                                      << ", start " << start << ", row " << row << ", column " << col);
              }
            }
          });
        }
      }
    }
  }
}

TEST("lengths: out of range they are clamped to the row, and nothing beside it is read") {
  constexpr int64_t kFew = 37;
  const int64_t some[] = {0, 1, 5, kFew, kFew + 1, -1, 1 << 20, -(1 << 20), kSmallest, kLargest};
  for_each_capability([&](const CpuCapability& capability) {
    for (Operation operation : kOperations) {
      for (ElementType type : kFloatingTypes) {
        for (bool at_end : {true, false}) {
          GuardedBuffer first(kFew * size_bytes(type), at_end);
          GuardedBuffer second(kFew * size_bytes(type), at_end);
          GuardedBuffer third(kFew * size_bytes(type), at_end);
          char* const guarded[] = {first.data(), second.data(), third.data()};
          std::vector<Matrix> inputs;
          for (int k = 0; k < input_count(operation); ++k) {
            inputs.emplace_back(type, 1, kFew);
          }
          fill_inputs(operation, inputs, {{0}, {kFew}}, 141);
          for (int64_t start : some) {
            for (int64_t length : some) {
              const std::string what = std::string(capability.name) + ' ' + name_of(operation) + ' ' + name_of(type) +
                                       ", start " + std::to_string(start) + ", length " + std::to_string(length);
              const FaultReport report(what);
              const int64_t clamped_start = std::clamp<int64_t>(start, 0, kFew);
              const Bounds inside{{clamped_start}, {std::clamp<int64_t>(length, 0, kFew - clamped_start)}};
              const Bounds outside{{start}, {length}};
              Matrix expected(type, 1, kFew);
              capability.run_rows(make_problem(operation, expected, inputs, inside), 0, 1);
              Matrix output(type, 1, kFew, 1, 5);
              Problem problem = make_problem(operation, output, inputs, outside);
              for (int k = 0; k < problem.input_count; ++k) {
                std::memcpy(guarded[k], problem.inputs[k].data, static_cast<size_t>(kFew * size_bytes(type)));
                problem.inputs[k].data = guarded[k];
              }
              capability.run_rows(problem, 0, 1);
              CHECK(output.surroundings_are_untouched(), what);
              for (int64_t col = 0; col < kFew; ++col) {
                CHECK(output.bits(0, col) == expected.bits(0, col), what << ", column " << col);
              }
            }
          }
        }
      }
    }
  });
}

TEST("threads: parts cost about the same, whatever the order of the lengths") {
  std::mt19937 random(151);
  std::vector<int64_t> lengths(1000);
  for (int64_t& length : lengths) {
    length = static_cast<int64_t>(random()) % 1001;
  }
  check_partition(lengths, "random lengths");
  std::sort(lengths.begin(), lengths.end());
  check_partition(lengths, "ascending lengths");
  std::reverse(lengths.begin(), lengths.end());
  check_partition(lengths, "descending lengths");
  check_partition(std::vector<int64_t>(500, 1000), "full rows");
  check_partition(std::vector<int64_t>(500, 0), "empty rows");
  std::vector<int64_t> one_full(500, 0);
  one_full[250] = 1000;
  check_partition(one_full, "one full row");
  check_partition({7, 1000, 0}, "fewer rows than parts");
}

TEST("threads: parts cost about the same in several dimensions, with lengths of every type and stride, and packed") {
  std::mt19937 random(157);
  for (int round = 0; round < 400; ++round) {
    const Integers lengths = random_integers(random, false);
    Problem problem = random_problem(lengths, random_integers(random, false));
    if (round % 5 == 0) {
      problem.lengths.data = nullptr;
      problem.lengths.value = round % 7;
    }
    std::vector<int64_t> of_rows;
    for (int64_t row = 0; row < problem.rows; ++row) {
      of_rows.push_back(problem.lengths.data == nullptr ? problem.lengths.value : load_at(problem.lengths, row));
    }
    check_partition(problem, of_rows, "round " + std::to_string(round));
    problem.packing = {true, kCols, std::accumulate(of_rows.begin(), of_rows.end(), int64_t{0}), 0};
    check_partition(problem, of_rows, "round " + std::to_string(round) + ", packed");
  }
}

TEST("threads: every row has its part, even if lengths become invalid after they were checked") {
  std::mt19937 random(163);
  for (int64_t wrong : {int64_t{-1}, int64_t{-1000000}, kSmallest, kLargest, kLargest / 3}) {
    std::vector<int64_t> lengths(300, 100);
    for (int i = 0; i < 100; ++i) {
      lengths[random() % lengths.size()] = wrong;
      const Problem problem = problem_over(lengths);
      for (int parts : {2, 5, 64}) {
        ascending_boundaries(problem, parts, "length " + std::to_string(wrong));
      }
    }
  }
}

TEST("bounds: packed rows whose starts differ where they were one stay in their buffers") {
  // As if another thread wrote to starts while they are read: rows with unit row stride and different starts, which
  // together cover more columns than the longest of them has.
  constexpr int64_t kTotal = 30;
  constexpr int64_t kWidth = 8;
  std::vector<Matrix> inputs(1, Matrix(ElementType::kFloat32, kTotal, kWidth));
  for (int64_t position = 0; position < kTotal; ++position) {
    for (int64_t column = 0; column < kWidth; ++column) {
      inputs[0].set(position, column, 1.0);
    }
  }
  const std::vector<int64_t> lengths(kWidth, 12);
  const std::vector<int64_t> starts{0, 18, 3, 7, 30, 1, 18, 22};
  for_each_capability([&](const CpuCapability& capability) {
    Matrix result(ElementType::kFloat32, kTotal, kWidth);
    Problem problem = make_problem(Operation::kSoftmax, result, inputs, {starts, lengths});
    problem.rows = kWidth;
    problem.cols = kTotal;
    problem.row_sizes[0] = kWidth;
    problem.packing = {true, 12, kTotal * kWidth};
    for (Operand* operand : {&problem.output, &problem.inputs[0]}) {
      operand->col_stride = kWidth;
      operand->row_strides[0] = 1;
    }
    problem.lengths = index_over(lengths);
    problem.starts = index_over(starts);
    const Matrix before = result;
    capability.run_rows(problem, 0, kWidth);
    CHECK(result.surroundings_are_untouched(), capability.name << ": around the rows");
    // A column tile of 12 columns begins at the first start; nothing behind it is written.
    for (int64_t position = 12; position < kTotal; ++position) {
      for (int64_t column = 0; column < kWidth; ++column) {
        CHECK(result.bits(position, column) == before.bits(position, column),
              capability.name << ": position " << position << ", column " << column);
      }
    }
  });
}

}  // namespace kernel_tests
