// Plain rows (csrc/cuda/kernel_problem.h): the kernels that hold them, beside those of the same rows with starts.
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "check.h"
#include "emulate.h"
#include "reference.h"

namespace {

using namespace masked_softmax;
using namespace kernel_tests;
using cuda::Strategy;

enum class Directions { kNone, kForward, kBackward, kBoth };

struct TypePair {
  ElementType input;
  ElementType output;
  Directions held;  // that have kernels of held rows
};

constexpr TypePair kTypePairs[] = {
#define MASKED_SOFTMAX_TYPE_PAIR(input_t, output_t, cuda) \
  {ElementTraits<input_t>::kType, ElementTraits<output_t>::kType, Directions::cuda},
#include "common/type_pairs.inc"
#undef MASKED_SOFTMAX_TYPE_PAIR
};

constexpr Operation kTuned[] = {Operation::kSoftmax, Operation::kLogSoftmax, Operation::kSoftmaxBackward,
                                Operation::kLogSoftmaxBackward};

struct Case {
  Strategy strategy;
  int64_t rows;
  int64_t cols;

  std::string text() const {
    return std::string(cuda::strategy_name(strategy)) + ", " + std::to_string(rows) + " rows of " +
           std::to_string(cols);
  }
};

// Lengths of all kinds, the longest first.
Bounds bounds_of(const Case& c) {
  std::vector<int64_t> lengths{c.cols, 1, c.cols - 1, 0, c.cols / 2 + 1, 3};
  Bounds bounds;
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto kind = static_cast<size_t>(row);
    bounds.lengths.push_back(kind < lengths.size() ? lengths[kind] : row * 7919 % (c.cols + 1));
  }
  bounds.starts.assign(static_cast<size_t>(c.rows), 0);
  return bounds;
}

// The strategy that sums rows that are not plain in the same order.
Strategy for_any_rows(Strategy strategy) { return strategy == Strategy::kStaged ? Strategy::kBlock : strategy; }

// One sample, its plain problem, and the memory of both.
class Sample {
 public:
  Sample(Operation operation, ElementType input, ElementType output, const Case& c, double scale)
      : case_(c), operation_(operation), scale_(scale), bounds_(bounds_of(c)), output_type_(output) {
    for (int k = 0; k < input_count(operation); ++k) {
      inputs_.emplace_back(input, c.rows, c.cols);
    }
    fill_inputs(operation, inputs_, bounds_, 23);
  }

  std::string text() const {
    return case_.text() + ", " + name_of(operation_) + ' ' + name_of(inputs_[0].type()) + " to " +
           name_of(output_type_) + ", scale " + std::to_string(scale_);
  }

  // The result in memory of its own. With starts, which are all 0, the rows are not plain.
  Matrix compute(bool has_starts, int sm_count, Strategy expected) {
    static unsigned seed = 0;
    Matrix output(output_type_, case_.rows, case_.cols);
    Problem problem = make_problem(operation_, output, inputs_, bounds_, scale_);
    if (!has_starts) {
      problem.starts.data = nullptr;
    }
    cuda::DeviceProperties device = emulator::kWithClusters;
    device.sm_count = sm_count;
    const Strategy forced = has_starts ? for_any_rows(case_.strategy) : case_.strategy;
    const emulator::Emulation done = emulator::emulate(problem, forced, device, ++seed);
    CHECK(done.error.empty(), text() << ": " << done.error);
    CHECK(done.strategy == expected, text() << ": " << cuda::strategy_name(done.strategy));
    CHECK(done.is_plain == !has_starts, text() << (done.is_plain ? ": plain" : ": not plain"));
    CHECK(output.surroundings_are_untouched(), text());
    return output;
  }

  void check_values(const Matrix& output) const {
    const double padding = operation_ == Operation::kLogSoftmax ? -std::numeric_limits<double>::infinity() : 0.0;
    for (int64_t row = 0; row < case_.rows; ++row) {
      const int64_t length = bounds_.lengths[static_cast<size_t>(row)];
      const std::vector<Expected> expected = expected_row(operation_, inputs_, row, bounds_, scale_, output_type_);
      for (int64_t col = 0; col < case_.cols; ++col) {
        const double got = output.get(row, col);
        if (col < length) {
          const Expected& want = expected[static_cast<size_t>(col)];
          CHECK(std::fabs(got - want.value) <= want.tolerance,
                text() << ", row of " << length << ", column " << col << ": got " << got << ", expected "
                       << static_cast<double>(want.value) << " within " << static_cast<double>(want.tolerance));
        } else {
          CHECK(got == padding && std::signbit(got) == std::signbit(padding),
                text() << ", row of " << length << ", padding in column " << col << " is " << got);
        }
      }
    }
  }

  void check_same_bits(const Matrix& got, const Matrix& expected, const char* what) const {
    for (int64_t row = 0; row < case_.rows; ++row) {
      for (int64_t col = 0; col < case_.cols; ++col) {
        CHECK(got.bits(row, col) == expected.bits(row, col),
              text() << ", " << what << ", row of " << bounds_.lengths[static_cast<size_t>(row)] << ", column " << col
                     << ": got " << got.get(row, col) << ", expected " << expected.get(row, col));
      }
    }
  }

 private:
  Case case_;
  Operation operation_;
  double scale_;
  Bounds bounds_;
  ElementType output_type_;
  std::vector<Matrix> inputs_;
};

// Calls visit(operation, input type, output type) for all that have kernels of held rows.
template <class Visitor>
void for_each_held(const Visitor& visit) {
  for (Operation operation : kTuned) {
    for (const TypePair& pair : kTypePairs) {
      const Directions own = is_forward(operation) ? Directions::kForward : Directions::kBackward;
      if (pair.held == own || pair.held == Directions::kBoth) {
        visit(operation, pair.input, pair.output);
      }
    }
  }
}

constexpr Strategy kPlainStrategies[] = {Strategy::kLanes, Strategy::kBlock, Strategy::kStaged, Strategy::kCluster};

// The columns that a strategy holds at most, of whatever types, in the kernels for any rows.
int64_t max_cols(Strategy strategy, Operation operation) {
  const int64_t of_thread = is_forward(operation) ? 32 : 16;  // of 16-bit types, twice as many in a backward pass
  return of_thread * (strategy == Strategy::kLanes ? 32 : strategy == Strategy::kCluster ? 8 * 512 : 512);
}

// Whether the held rows of a pair of types have a kernel of the strategy.
bool has_kernel(Strategy strategy, ElementType input, ElementType output) {
  return strategy != Strategy::kStaged || input == output;
}

void check_case(const Case& c, double scale = 1.0) {
  for_each_held([&](Operation operation, ElementType input, ElementType output) {
    if (!has_kernel(c.strategy, input, output) || c.cols > max_cols(c.strategy, operation)) {
      return;
    }
    Sample sample(operation, input, output, c, scale);
    const Matrix plain = sample.compute(/*has_starts=*/false, /*sm_count=*/0, c.strategy);
    sample.check_values(plain);
    sample.check_same_bits(sample.compute(/*has_starts=*/true, /*sm_count=*/0, for_any_rows(c.strategy)), plain,
                           "with starts");
    sample.check_same_bits(sample.compute(/*has_starts=*/false, /*sm_count=*/1, c.strategy), plain, "on one SM");
  });
}

}  // namespace

TEST("plain rows: lanes, of every number of lanes and of elements") {
  std::set<std::pair<int, int>> steps;
  for (int64_t cols : {8, 16, 64, 72, 256, 264, 512, 520, 1024}) {
    cuda::RowShape shape;
    shape.rows = 1;
    shape.cols = cols;
    const cuda::SumOrder order = cuda::order_of(Strategy::kLanes, shape, emulator::kWithClusters);
    steps.insert({order.threads, order.vectors * order.elems});
    // On one SM, a warp takes several groups of the shortest rows in turn.
    check_case({Strategy::kLanes, cols == 8 ? 2500 : cols <= 64 ? 150 : 31, cols});
  }
  for (const cuda::LanesStep& step : cuda::kLanesSteps) {
    CHECK(steps.count({step.threads_per_row, step.elems_per_thread}) == 1,
          "no row has " << step.threads_per_row << " lanes of " << step.elems_per_thread << " elements");
  }
  check_case({Strategy::kLanes, 40, 64}, -0.5);
}

TEST("plain rows: a block, of a few warps and of the most") {
  for (int64_t cols : {8, 520, 1032, 2056}) {
    check_case({Strategy::kBlock, 21, cols});
  }
  check_case({Strategy::kBlock, 6, 8192});
  check_case({Strategy::kBlock, 6, 16384});
}

TEST("plain rows: staged, of a few warps and of the most, once and several times around the ring") {
  for (int64_t cols : {8, 520, 1032, 2056}) {
    check_case({Strategy::kStaged, 21, cols});
  }
  check_case({Strategy::kStaged, 210, 40});
  check_case({Strategy::kStaged, 9, 8192});
  check_case({Strategy::kStaged, 9, 16384});
  check_case({Strategy::kStaged, 40, 2056}, -0.5);
}

TEST("plain rows: rows of two types are not staged, and a call that forces it is refused") {
  int64_t pairs = 0;
  for_each_held([&](Operation operation, ElementType input, ElementType output) {
    constexpr Case kCase{Strategy::kStaged, 3, 2048};
    Matrix result(output, kCase.rows, kCase.cols);
    std::vector<Matrix> inputs;
    for (int k = 0; k < input_count(operation); ++k) {
      inputs.emplace_back(input, kCase.rows, kCase.cols);
    }
    const Bounds bounds = bounds_of(kCase);
    Problem problem = make_problem(operation, result, inputs, bounds);
    problem.starts.data = nullptr;
    const bool is_planned = cuda::plan_problem(problem, emulator::kWithClusters, Strategy::kStaged).is_valid();
    CHECK(is_planned == has_kernel(kCase.strategy, input, output),
          name_of(operation) << " from " << element_type_name(input) << " to " << element_type_name(output));
    pairs += input != output;
  });
  CHECK(pairs > 0, "no pair of two types");
}

TEST("plain rows: a cluster, of every number of blocks") {
  for (int64_t cols : {8, 1032, 4104}) {
    check_case({Strategy::kCluster, 6, cols});
  }
  for (int64_t cols : {16392, 32776}) {
    check_case({Strategy::kCluster, 2, cols});
  }
}

TEST("plain rows: a cluster holds gradients that other rows' clusters cannot, which then are strided; the same bits") {
  constexpr Case kLong{Strategy::kCluster, 1, 65536 + 8};
  for (Operation operation : {Operation::kSoftmaxBackward, Operation::kLogSoftmaxBackward}) {
    Sample sample(operation, ElementType::kFloat32, ElementType::kFloat32, kLong, 1.0);
    const Matrix plain = sample.compute(/*has_starts=*/false, /*sm_count=*/0, Strategy::kCluster);
    sample.check_values(plain);
    sample.check_same_bits(sample.compute(/*has_starts=*/true, /*sm_count=*/0, Strategy::kStrided), plain,
                           "with starts");
  }
}

TEST("plain rows: with unit row stride, in registers too; the bits of contiguous rows") {
  constexpr int64_t kRows = 70;
  // Element (row, col) of a row's matrix is element (col, row) of the other.
  const auto transposed = [](Matrix& matrix) {
    Operand operand = matrix.operand();
    std::swap(operand.col_stride, operand.row_strides[0]);
    return operand;
  };
  for_each_held([&](Operation operation, ElementType input, ElementType output_type) {
    if (input != output_type) {
      return;
    }
    for (int64_t cols : {2, 8, 9, 64, 65, 256, 512}) {
      const Bounds bounds = bounds_of({Strategy::kColumn, kRows, cols});
      std::vector<Matrix> rows;
      std::vector<Matrix> columns;
      for (int k = 0; k < input_count(operation); ++k) {
        rows.emplace_back(input, kRows, cols);
        columns.emplace_back(input, cols, kRows);
      }
      fill_inputs(operation, rows, bounds, 37);
      Matrix expected(output_type, kRows, cols);
      Matrix got(output_type, cols, kRows);
      Problem problem = make_problem(operation, expected, rows, bounds);
      problem.starts.data = nullptr;
      const emulator::Emulation contiguous =
          emulator::emulate(problem, Strategy::kAutomatic, emulator::kWithClusters, 1);
      problem.output = transposed(got);
      for (int k = 0; k < problem.input_count; ++k) {
        for (int64_t row = 0; row < kRows; ++row) {
          for (int64_t col = 0; col < bounds.lengths[static_cast<size_t>(row)]; ++col) {
            columns[static_cast<size_t>(k)].set(col, row, rows[static_cast<size_t>(k)].get(row, col));
          }
        }
        problem.inputs[k] = transposed(columns[static_cast<size_t>(k)]);
      }
      const emulator::Emulation done = emulator::emulate(problem, Strategy::kAutomatic, emulator::kWithClusters, 2);
      const std::string text = std::string(name_of(operation)) + ' ' + name_of(input) + ' ' + std::to_string(cols);
      CHECK(contiguous.error.empty() && done.error.empty(), text << ": " << contiguous.error << done.error);
      CHECK(done.strategy == Strategy::kColumn && done.is_plain, text << ": " << cuda::strategy_name(done.strategy));
      CHECK(got.surroundings_are_untouched(), text);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
          CHECK(got.bits(col, row) == expected.bits(row, col),
                text << ", row of " << bounds.lengths[static_cast<size_t>(row)] << ", column " << col << ": got "
                     << got.get(col, row) << ", expected " << expected.get(row, col));
        }
      }
    }
  });
}

TEST("plain rows: two dimensions, with lengths that the inner ones share, of either type, or one for all") {
  constexpr int64_t kOuter = 5;
  constexpr int64_t kInner = 7;
  for (Strategy strategy : kPlainStrategies) {
    for (ElementType type : {ElementType::kInt64, ElementType::kInt32}) {
      for (int dims : {0, 1, 2}) {  // of the lengths
        const int64_t cols = 40;
        Matrix input(ElementType::kFloat32, kOuter * kInner, cols);
        Bounds bounds;
        std::vector<int64_t> given;
        for (int64_t row = 0; row < kOuter * kInner; ++row) {
          const int64_t of = dims == 0 ? 4 : dims == 1 ? row / kInner : row;
          bounds.lengths.push_back(of * 11 % (cols + 1));
          bounds.starts.push_back(0);
          if (dims == 2 || (dims == 1 && row % kInner == 0)) {
            given.push_back(bounds.lengths.back());
          }
        }
        std::vector<Matrix> inputs{input};
        fill_inputs(Operation::kSoftmax, inputs, bounds, 29);
        Matrix output(ElementType::kFloat32, kOuter * kInner, cols);
        Problem problem = make_problem(Operation::kSoftmax, output, inputs, bounds);
        problem.row_ndim = 2;
        problem.row_sizes[0] = kOuter;
        problem.row_sizes[1] = kInner;
        for (Operand* operand : {&problem.output, &problem.inputs[0]}) {
          operand->row_strides[0] = kInner * cols;
          operand->row_strides[1] = cols;
        }
        std::vector<int64_t> memory(given.size() + 1);
        store_integers(memory.data(), type, given);
        problem.starts.data = nullptr;
        problem.lengths.type = type;
        problem.lengths.data = dims == 0 ? nullptr : memory.data();
        problem.lengths.value = bounds.lengths[0];
        problem.lengths.row_strides[0] = dims == 2 ? kInner : 1;
        problem.lengths.row_strides[1] = dims == 2 ? 1 : 0;
        const emulator::Emulation done = emulator::emulate(problem, strategy, emulator::kWithClusters, 0);
        CHECK(done.error.empty() && done.strategy == strategy && done.is_plain, cuda::strategy_name(done.strategy)
                                                                                    << ": " << done.error);
        for (int64_t row = 0; row < kOuter * kInner; ++row) {
          const std::vector<Expected> expected =
              expected_row(Operation::kSoftmax, inputs, row, bounds, 1.0, ElementType::kFloat32);
          for (int64_t col = 0; col < cols; ++col) {
            const bool is_valid = col < bounds.lengths[static_cast<size_t>(row)];
            const Expected want = is_valid ? expected[static_cast<size_t>(col)] : Expected{0, 0};
            CHECK(std::fabs(output.get(row, col) - want.value) <= want.tolerance,
                  cuda::strategy_name(strategy) << ", lengths in " << dims << " dimensions, row " << row << ", column "
                                                << col << ": " << output.get(row, col));
          }
        }
      }
    }
  }
}

TEST("plain rows: an invalid length makes its row NaN, and changes nothing else") {
  constexpr int64_t kCols = 72;
  const std::vector<int64_t> invalid{
      kCols + 1, -1, -2, int64_t{1} << 32, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
  for (Strategy strategy : kPlainStrategies) {
    for_each_held([&](Operation operation, ElementType input, ElementType output_type) {
      if (!has_kernel(strategy, input, output_type)) {
        return;
      }
      Bounds bounds = bounds_of({strategy, 19, kCols});
      std::vector<Matrix> inputs;
      for (int k = 0; k < input_count(operation); ++k) {
        inputs.emplace_back(input, 19, kCols);
      }
      fill_inputs(operation, inputs, bounds, 31);
      const auto compute = [&](unsigned seed) {
        Matrix output(output_type, 19, kCols);
        Problem problem = make_problem(operation, output, inputs, bounds);
        problem.starts.data = nullptr;
        const emulator::Emulation done = emulator::emulate(problem, strategy, emulator::kWithClusters, seed);
        CHECK(done.error.empty() && done.strategy == strategy && done.is_plain, cuda::strategy_name(done.strategy)
                                                                                    << ": " << done.error);
        return output;
      };
      const Matrix expected = compute(1);
      for (size_t k = 0; k < invalid.size(); ++k) {
        bounds.lengths[k * 3] = invalid[k];
      }
      const Matrix got = compute(2);
      for (int64_t row = 0; row < 19; ++row) {
        for (int64_t col = 0; col < kCols; ++col) {
          const bool is_invalid = row % 3 == 0 && row / 3 < static_cast<int64_t>(invalid.size());
          CHECK(is_invalid ? std::isnan(got.get(row, col)) : got.bits(row, col) == expected.bits(row, col),
                cuda::strategy_name(strategy)
                    << ' ' << name_of(operation) << ", row " << row << ", column " << col << ": " << got.get(row, col));
        }
      }
    });
  }
}

TEST("plain rows: float64, and types without kernels of held rows, are strided, in the order of those that are held") {
  for (Operation operation : kTuned) {
    for (const TypePair& pair : kTypePairs) {
      const Directions own = is_forward(operation) ? Directions::kForward : Directions::kBackward;
      if (pair.held == own || pair.held == Directions::kBoth) {
        continue;
      }
      Matrix output(pair.output, 3, 64);
      std::vector<Matrix> inputs;
      for (int k = 0; k < input_count(operation); ++k) {
        inputs.emplace_back(pair.input, 3, 64);
      }
      const Bounds bounds = bounds_of({Strategy::kLanes, 3, 64});
      const Problem problem = make_problem(operation, output, inputs, bounds);
      for (Strategy forced : {Strategy::kAutomatic, Strategy::kLanes, Strategy::kBlock, Strategy::kCluster}) {
        const cuda::LaunchPlan plan = cuda::plan_problem(problem, emulator::kWithClusters, forced);
        CHECK(plan.strategy == Strategy::kStrided && !plan.is_plain, cuda::strategy_name(plan.strategy)
                                                                         << ", forced " << cuda::strategy_name(forced));
        const int threads = forced == Strategy::kAutomatic || forced == Strategy::kLanes ? 4 : 32;
        CHECK(plan.order.threads == threads, cuda::strategy_name(forced) << ": " << plan.order.threads << " threads");
      }
      CHECK(!cuda::plan_problem(problem, emulator::kWithClusters, Strategy::kStaged).is_valid(), "staged");
    }
  }
}
