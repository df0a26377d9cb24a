// Packed rows whose offsets only the GPU reads: they may leave gaps, overlap, or point anywhere.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulate.h"

namespace {

using namespace masked_softmax;

constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

// Rows of ones in a contiguous buffer of shape (outer, positions, inner).
struct Rows {
  std::string what;
  int64_t positions;
  int64_t longest;
  std::vector<int64_t> starts;
  std::vector<int64_t> lengths;
  int64_t outer = 1;
  int64_t inner = 1;

  int64_t elems() const { return outer * positions * inner; }
  // Those that overlap another valid row may have either's results.
  int covering_rows(int64_t position, int64_t& length) const {
    int count = 0;
    for (size_t row = 0; row < starts.size(); ++row) {
      const bool is_valid = bounds_are_valid(starts[row], lengths[row], positions) && lengths[row] <= longest;
      if (is_valid && starts[row] <= position && position < starts[row] + lengths[row]) {
        length = lengths[row];
        ++count;
      }
    }
    return count;
  }
};

// `ends` as the callers of packed_softmax() give them.
Rows rows_between(const std::string& what, int64_t positions, int64_t longest, const std::vector<int64_t>& offsets) {
  Rows rows{what, positions, longest, {}, {}};
  for (size_t row = 0; row + 1 < offsets.size(); ++row) {
    rows.starts.push_back(offsets[row]);
    rows.lengths.push_back(
        static_cast<int64_t>(static_cast<uint64_t>(offsets[row + 1]) - static_cast<uint64_t>(offsets[row])));
  }
  return rows;
}

void set_dimensions(const Rows& rows, Operand& operand, ElementType type, void* data) {
  operand.type = type;
  operand.data = data;
  operand.col_stride = rows.inner;
  operand.row_strides[0] = 0;
  operand.row_strides[1] = rows.positions * rows.inner;
  operand.row_strides[2] = 1;
}

void check(const Rows& rows, ElementType output_type, cuda::Strategy strategy) {
  constexpr int64_t kAround = 32;  // elements of the memory around the buffer
  constexpr unsigned char kUntouched = 0x3c;
  const int64_t elem_bytes = size_bytes(output_type);
  const auto buffer_bytes = static_cast<size_t>(rows.elems() * elem_bytes);
  const auto first = static_cast<size_t>(kAround * elem_bytes);
  std::vector<unsigned char> memory(buffer_bytes + 2 * first, kUntouched);
  std::vector<float> input(static_cast<size_t>(rows.elems()), 1.0f);

  Problem problem;
  problem.rows = static_cast<int64_t>(rows.starts.size()) * rows.outer * rows.inner;
  problem.cols = rows.positions;
  problem.row_ndim = 3;
  problem.row_sizes[0] = static_cast<int64_t>(rows.starts.size());
  problem.row_sizes[1] = rows.outer;
  problem.row_sizes[2] = rows.inner;
  set_dimensions(rows, problem.output, output_type, memory.data() + first);
  set_dimensions(rows, problem.inputs[0], ElementType::kFloat32, input.data());
  for (RowIndex* index : {&problem.lengths, &problem.starts}) {
    index->row_strides[0] = 1;
    index->row_strides[1] = index->row_strides[2] = 0;
  }
  problem.lengths.data = rows.lengths.data();
  problem.starts.data = rows.starts.data();
  problem.packing = {true, rows.longest, rows.elems(), static_cast<int64_t>(rows.starts.size())};

  static unsigned seed = 0;
  const emulator::Emulation done = emulator::emulate(problem, strategy, emulator::kWithClusters, ++seed);
  CHECK(done.error.empty(), rows.what << ": " << done.error);
  for (int64_t elem = 0; elem < rows.elems(); ++elem) {
    const int64_t position = elem / rows.inner % rows.positions;
    double got = 0;
    visit_element_type_of<ElementKind::kFloating>(output_type, [&](auto element) {
      got = to_acc<double>(read_element(reinterpret_cast<const decltype(element)*>(memory.data() + first) + elem));
    });
    int64_t length = 0;
    const int covering = rows.covering_rows(position, length);
    const double expected = 1.0 / static_cast<double>(length);
    CHECK(covering == 0   ? std::isnan(got)
          : covering == 1 ? std::fabs(got - expected) <= 0x1p-8 * expected
                          : true,
          rows.what << ", " << element_type_name(output_type) << ", element " << elem << ", in " << covering
                    << " rows: " << got);
  }
  for (size_t i = 0; i < memory.size(); ++i) {
    if (i < first || i >= first + buffer_bytes) {
      CHECK(memory[i] == kUntouched, rows.what << ": around the buffer");
    }
  }
}

// Offsets that ascend from 0 to the end, and offsets that do not.
std::vector<Rows> named_cases() {
  std::vector<Rows> cases{
      rows_between("no gap", 40, 16, {0, 5, 5, 21, 40 - 15, 40}),
      rows_between("first after 0", 40, 40, {3, 20, 40}),
      rows_between("last before the end", 40, 40, {0, 20, 37}),
      rows_between("last after the end", 40, 41, {0, 20, 41}),
      rows_between("descending", 40, 40, {0, 30, 10, 40}),
      rows_between("below 0", 40, 50, {0, -7, 40}),
      rows_between("the first below 0", 40, 50, {-7, 20, 40}),
      rows_between("far off", 40, 40, {0, kLargest, kLowest, 40}),
      rows_between("a row longer than the longest", 40, 10, {0, 9, 30, 40}),
      rows_between("all rows longer than the longest", 40, 3, {0, 20, 40}),
      rows_between("one row that is not valid", 40, 40, {0, 41}),
      rows_between("one empty row", 40, 40, {0, 0}),
      {"gaps", 40, 40, {1, 8, 20}, {3, 0, 5}},
      {"in another order, without gaps", 40, 40, {20, 0, 10}, {20, 10, 10}},
      {"in another order, with gaps", 40, 40, {30, 2, 15, 14}, {3, 10, 3, 0}},
      {"a row within another", 40, 40, {0, 5}, {30, 3}},
  };
  // More rows than a block of threads takes, with a gap in front of every one of them in turn.
  for (int64_t gap : {0, 1, 254, 255, 256, 257, 511, 512, 513, 600}) {
    Rows many{"a gap before row " + std::to_string(gap) + " of 600", 3 * 600 + 2, 3, {}, {}};
    for (int64_t row = 0; row < 600; ++row) {
      many.starts.push_back(3 * row + (row >= gap ? 2 : 0));
      many.lengths.push_back(3);
    }
    cases.push_back(many);
  }
  return cases;
}

// Mostly rows that follow one another, some of which then move, grow or shrink.
Rows drawn_case(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int64_t end) { return static_cast<int64_t>(random() % static_cast<uint64_t>(end)); };
  Rows rows{"drawn with seed " + std::to_string(seed), 0, 1 + below(12), {}, {}};
  const int64_t count = 1 + below(9);
  for (int64_t row = 0; row < count; ++row) {
    rows.starts.push_back(rows.positions);
    rows.lengths.push_back(below(rows.longest + 1));
    rows.positions += rows.lengths.back();
  }
  rows.positions += below(3);
  rows.positions = rows.positions < 1 ? 1 : rows.positions;
  for (int64_t change = below(4); change > 0; --change) {
    const auto row = static_cast<size_t>(below(count));
    const int64_t by = below(9) - 4;
    (below(2) == 0 ? rows.starts : rows.lengths)[row] += by;
  }
  rows.outer = 1 + below(3);
  rows.inner = 1 + below(3);
  return rows;
}

constexpr ElementType kTypes[] = {ElementType::kFloat64, ElementType::kFloat32, ElementType::kBFloat16,
                                  ElementType::kFloat16};

}  // namespace

TEST("packed rows: elements that no valid row covers are NaN, and valid rows are right, whatever the offsets") {
  for (const Rows& rows : named_cases()) {
    for (ElementType type : kTypes) {
      check(rows, type, cuda::Strategy::kAutomatic);
    }
    Rows wide = rows;
    wide.outer = 2;
    wide.inner = rows.starts.size() > 100 ? 1 : 35;
    check(wide, ElementType::kFloat32, cuda::Strategy::kAutomatic);
  }
  for (unsigned seed = 0; seed < 300; ++seed) {
    check(drawn_case(seed), kTypes[seed % 4], cuda::Strategy::kAutomatic);
  }
}

TEST("packed rows: every strategy leaves NaN in the gaps") {
  for (cuda::Strategy strategy : cuda::kStrategies) {
    if (emulator::takes_plain_rows_only(strategy)) {
      continue;
    }
    Rows rows =
        rows_between("gaps, " + std::string(cuda::strategy_name(strategy)), 300, 100, {7, 90, 80, 80, 150, 299});
    rows.inner = strategy == cuda::Strategy::kColumn ? 33 : 1;
    check(rows, ElementType::kFloat32, strategy);
  }
}
