// Plain rows with sinks: the kernels that hold them, beside those of the same rows with starts; and the strategies that
// have no such kernels.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"
#include "emulate.h"
#include "reference.h"

namespace {

using namespace masked_softmax;
using namespace kernel_tests;
using cuda::Strategy;

constexpr int64_t kBatches = 2;
constexpr int64_t kHeads = 5;
constexpr int64_t kQueries = 4;
constexpr int64_t kRows = kBatches * kHeads * kQueries;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Attention scores, with the dimensions that a call of a sink for each head leaves.
struct Scores {
  Operation operation = Operation::kSoftmax;
  ElementType type = ElementType::kFloat32;
  ElementType sink_type = ElementType::kFloat32;
  int64_t cols = 0;
  double scale = 1.0;
  bool has_sink_a_row = false;
};

struct Computed {
  Matrix y;
  Matrix weights;
  emulator::Emulation done;
};

class Sample {
 public:
  explicit Sample(const Scores& scores)
      : scores_(scores), inputs_{Matrix(scores.type, kRows, scores.cols)}, sinks_(scores.sink_type, kRows, 1) {
    for (int64_t row = 0; row < kRows; ++row) {
      const int64_t lengths[] = {scores.cols, scores.cols / 2 + 1, 1, 0, 3, scores.cols + 1};
      bounds_.lengths.push_back(row < 6 ? lengths[row] : row * 7919 % (scores.cols + 1));
    }
    bounds_.starts.assign(kRows, 0);
    Bounds valid = bounds_;
    valid.lengths[5] = 0;
    fill_inputs(scores.operation, inputs_, valid, 37);
    constexpr double kSinks[kHeads] = {1.5, -kInfinity, 90, -3, 6};
    for (int64_t row = 0; row < kRows; ++row) {
      sinks_.set(row, 0, kSinks[row % kHeads] + (scores.has_sink_a_row ? static_cast<double>(row) / 64 : 0));
    }
    inputs_[0].set(kRows - 1, 0, kNaN);
    bounds_.lengths[kRows - 1] = 2;
  }

  // has_starts: the rows are not plain, and the start of each is 0.
  Computed compute(bool has_starts, Strategy forced, bool has_weights = true) {
    static unsigned seed = 0;
    Computed result{Matrix(scores_.type, kRows, scores_.cols), Matrix(ElementType::kFloat32, kRows, 1), {}};
    Problem problem = make_problem(scores_.operation, result.y, inputs_, bounds_, scores_.scale);
    problem.row_ndim = 3;
    const int64_t sizes[] = {kBatches, kHeads, kQueries};
    const int64_t sink_strides[] = {0, 1, 0};
    const Operand sinks = sinks_.operand();
    int64_t stride = 1;
    for (int dim = 2; dim >= 0; --dim) {
      problem.row_sizes[dim] = sizes[dim];
      problem.output.row_strides[dim] = problem.inputs[0].row_strides[dim] = stride * scores_.cols;
      problem.lengths.row_strides[dim] = problem.starts.row_strides[dim] = stride;
      problem.row_input.row_strides[dim] = (scores_.has_sink_a_row ? stride : sink_strides[dim]) * sinks.row_strides[0];
      stride *= sizes[dim];
    }
    problem.row_input.data = sinks.data;
    problem.row_input.type = sinks.type;
    if (has_weights) {
      problem.row_result = {result.weights.operand().data, ElementType::kFloat32};
    }
    if (!has_starts) {
      problem.starts.data = nullptr;
    }
    cuda::DeviceProperties device = emulator::kWithClusters;
    device.sm_count = static_cast<int>(seed % 2);  // 1: blocks loop over rows
    result.done = emulator::emulate(problem, forced, device, ++seed);
    return result;
  }

  void check_values(const Computed& got) const {
    for (int64_t row = 0; row < kRows; ++row) {
      const int64_t length = bounds_.lengths[static_cast<size_t>(row)];
      const double sink = sinks_.get(scores_.has_sink_a_row ? row : row / kQueries % kHeads, 0);
      const std::string where = text() + ", row " + std::to_string(row) + " of " + std::to_string(length) + ", sink " +
                                std::to_string(sink) + ": ";
      const bool is_nan = length > scores_.cols || row == kRows - 1;
      const double weight = got.weights.get(row, 0);
      if (is_nan || length == 0) {
        CHECK(is_nan ? std::isnan(weight) : weight == (sink == -kInfinity ? 0 : 1), where << "weight " << weight);
      }
      for (int64_t col = is_nan || length == 0 ? 0 : scores_.cols; col < scores_.cols; ++col) {
        const bool is_padding = col >= length && length <= scores_.cols;
        const double y = got.y.get(row, col);
        CHECK(is_padding ? y == 0 && !std::signbit(y) : std::isnan(y), where << "column " << col << " is " << y);
      }
      if (is_nan || length == 0) {
        continue;
      }
      std::vector<real> x;
      for (int64_t col = 0; col < length; ++col) {
        x.push_back(inputs_[0].get(row, col));
      }
      const ExpectedForward expected =
          expected_forward_and_row_numbers(x, false, scores_.scale, epsilon_of(false), sink);
      for (int64_t col = 0; col < scores_.cols; ++col) {
        Expected want{0, 0};
        if (col < length) {
          want = expected.y[static_cast<size_t>(col)];
          want.tolerance += rounding_of(scores_.type, false, want.value);
        }
        CHECK(std::fabs(got.y.get(row, col) - want.value) <= want.tolerance,
              where << "column " << col << " is " << got.y.get(row, col) << ", expected "
                    << static_cast<double>(want.value));
      }
      CHECK(std::fabs(weight - expected.sink_weight.value) <= expected.sink_weight.tolerance,
            where << "weight " << weight << ", expected " << static_cast<double>(expected.sink_weight.value));
    }
  }

  void check_same_bits(const Computed& got, const Computed& expected) const {
    for (int64_t row = 0; row < kRows; ++row) {
      const auto is_same = [&](const Matrix& a, const Matrix& b, int64_t col) {
        return a.bits(row, col) == b.bits(row, col) || (std::isnan(a.get(row, col)) && std::isnan(b.get(row, col)));
      };
      for (int64_t col = 0; col < scores_.cols; ++col) {
        CHECK(is_same(got.y, expected.y, col), text() << ", row " << row << ", column " << col << ": "
                                                      << got.y.get(row, col) << ", " << expected.y.get(row, col));
      }
      CHECK(is_same(got.weights, expected.weights, 0), text() << ", the weight of row " << row);
    }
  }

  std::string text() const {
    return std::string(name_of(scores_.type)) + ", sinks in " + name_of(scores_.sink_type) + ", rows of " +
           std::to_string(scores_.cols) + ", scale " + std::to_string(scores_.scale);
  }

 private:
  Scores scores_;
  Bounds bounds_;
  std::vector<Matrix> inputs_;
  Matrix sinks_;
};

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16};

void check_plain(const Scores& scores, Strategy strategy) {
  Sample sample(scores);
  const Computed got = sample.compute(/*has_starts=*/false, Strategy::kAutomatic);
  CHECK(got.done.error.empty() && got.done.strategy == strategy && got.done.is_plain,
        sample.text() << ": " << cuda::strategy_name(got.done.strategy) << (got.done.is_plain ? "" : ", not plain")
                      << got.done.error);
  CHECK(got.y.surroundings_are_untouched() && got.weights.surroundings_are_untouched(), sample.text());
  sample.check_values(got);
  for (Strategy other : {strategy, Strategy::kStrided}) {
    const Computed same = sample.compute(/*has_starts=*/true, other);
    CHECK(same.done.error.empty() && same.done.strategy == other && !same.done.is_plain,
          sample.text() << ": " << cuda::strategy_name(same.done.strategy) << same.done.error);
    sample.check_same_bits(got, same);
  }
}

}  // namespace

TEST(
    "plain rows with sinks: lanes and blocks, values, weights, and the bits of rows in any place and of strided ones") {
  for (ElementType type : kTypes) {
    for (ElementType sink_type : {type, ElementType::kFloat32}) {
      for (int64_t cols : {16, 64, 256, 512, 1024}) {
        check_plain({Operation::kSoftmax, type, sink_type, cols}, Strategy::kLanes);
      }
      for (int64_t cols : {2048, 5120}) {
        check_plain({Operation::kSoftmax, type, sink_type, cols}, Strategy::kBlock);
      }
      check_plain({Operation::kSoftmax, type, sink_type, 64, -0.375}, Strategy::kLanes);
      check_plain({Operation::kSoftmax, type, sink_type, 64, 1.0, /*has_sink_a_row=*/true}, Strategy::kLanes);
    }
  }
}

TEST("plain rows with sinks: without a place for the weights") {
  for (int64_t cols : {64, 2048}) {
    Sample sample({Operation::kSoftmax, ElementType::kFloat32, ElementType::kFloat32, cols});
    const Computed with = sample.compute(/*has_starts=*/false, Strategy::kAutomatic);
    Computed without = sample.compute(/*has_starts=*/false, Strategy::kAutomatic, /*has_weights=*/false);
    CHECK(without.done.error.empty() && without.done.is_plain, without.done.error);
    without.weights = with.weights;
    sample.check_same_bits(with, without);
  }
}

TEST("plain rows with sinks: calls for which there are no such kernels take those of rows in any place") {
  struct Other {
    Scores scores;
    Strategy forced;
    Strategy expected;
  };
  constexpr ElementType kFloat32 = ElementType::kFloat32;
  const Other others[] = {
      {{Operation::kLogSoftmax, kFloat32, kFloat32, 64}, Strategy::kAutomatic, Strategy::kLanes},
      {{Operation::kSoftmax, kFloat32, kFloat32, 8}, Strategy::kAutomatic, Strategy::kLanes},  // one lane a row
      {{Operation::kSoftmax, kFloat32, ElementType::kBFloat16, 64}, Strategy::kAutomatic, Strategy::kLanes},
      {{Operation::kSoftmax, kFloat32, ElementType::kFloat64, 2048}, Strategy::kAutomatic, Strategy::kBlock},
      {{Operation::kSoftmax, kFloat32, kFloat32, 2048}, Strategy::kCluster, Strategy::kCluster},
      {{Operation::kSoftmax, kFloat32, kFloat32, 2048}, Strategy::kSplit, Strategy::kSplit},
  };
  for (const Other& other : others) {
    Sample sample(other.scores);
    const Computed got = sample.compute(/*has_starts=*/false, other.forced);
    CHECK(got.done.error.empty() && got.done.strategy == other.expected && !got.done.is_plain,
          sample.text() << ": " << cuda::strategy_name(got.done.strategy) << (got.done.is_plain ? ", plain" : "")
                        << got.done.error);
    if (other.scores.operation == Operation::kSoftmax) {
      sample.check_values(got);
    }
  }
}

TEST("plain rows with sinks: staged rows have none, and a call that forces them is refused") {
  Sample sample({Operation::kSoftmax, ElementType::kFloat32, ElementType::kFloat32, 2048});
  const Computed got = sample.compute(/*has_starts=*/false, Strategy::kStaged);
  CHECK(got.done.strategy == Strategy::kAutomatic && got.done.error == "the strategy cannot compute such rows",
        cuda::strategy_name(got.done.strategy) << ": " << got.done.error);
}
