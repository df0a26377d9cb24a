// Problems for the kernels, with the memory that they point to.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/numeric.h"
#include "common/problem.h"
#include "cpu/dispatch.h"
#include "cpu/store_hint.h"

namespace kernel_tests {

using namespace masked_softmax;

// Stores the value, truncated to the integer type, at any address.
inline void store_integer(void* to, ElementType type, int64_t value) {
  visit_element_type_of<ElementKind::kInteger>(type, [&](auto element) {
    const auto stored = static_cast<decltype(element)>(value);
    std::memcpy(to, &stored, sizeof(stored));
  });
}

// Stores adjacent integers of that type.
inline void store_integers(void* to, ElementType type, const std::vector<int64_t>& values) {
  auto* next = static_cast<unsigned char*>(to);
  for (int64_t value : values) {
    store_integer(next, type, value);
    next += size_bytes(type);
  }
}

inline const char* name_of(ElementType type) { return element_type_name(type); }
inline const char* name_of(Operation operation) { return info_of(operation).name; }

constexpr ElementType kFloatingTypes[] = {ElementType::kFloat64, ElementType::kFloat32, ElementType::kBFloat16,
                                          ElementType::kFloat16};

// A matrix of any type in memory of its own: elements of a row are `col_stride` apart, the first is `shift` elements
// into the memory. All bytes between and around its elements are poison.
class Matrix {
 public:
  Matrix(ElementType type, int64_t rows, int64_t cols, int64_t col_stride = 1, int64_t shift = 0, int64_t row_gap = 0)
      : type_(type), rows_(rows), cols_(cols), col_stride_(col_stride), shift_(shift) {
    row_stride_ = cols * col_stride + row_gap;
    bytes_.assign(static_cast<size_t>((shift + rows * row_stride_ + kSlack) * size_bytes(type)), kPoison);
  }

  static constexpr unsigned char kPoison = 0xff;  // as an element of any floating type: NaN

  double get(int64_t row, int64_t col) const {
    double value = 0;
    visit_element_type_of<ElementKind::kFloating>(type_, [&](auto element) {
      std::memcpy(&element, at(row, col), sizeof(element));
      value = to_acc<double>(element);
    });
    return value;
  }
  void set(int64_t row, int64_t col, double value) {
    visit_element_type_of<ElementKind::kFloating>(type_, [&](auto element) {
      element = from_acc<decltype(element)>(value);
      std::memcpy(const_cast<unsigned char*>(at(row, col)), &element, sizeof(element));
    });
  }
  std::string bits(int64_t row, int64_t col) const {
    return {reinterpret_cast<const char*>(at(row, col)), static_cast<size_t>(size_bytes(type_))};
  }

  Operand operand() {
    Operand result;
    result.data = bytes_.data() + shift_ * size_bytes(type_);
    result.type = type_;
    result.col_stride = col_stride_;
    result.row_strides[0] = row_stride_;
    return result;
  }

  // Whether every byte around the elements still is poison.
  bool surroundings_are_untouched() const {
    std::vector<bool> ours(bytes_.size(), false);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t col = 0; col < cols_; ++col) {
        const auto first = static_cast<size_t>(at(row, col) - bytes_.data());
        for (int64_t byte = 0; byte < size_bytes(type_); ++byte) {
          ours[first + static_cast<size_t>(byte)] = true;
        }
      }
    }
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if (!ours[i] && bytes_[i] != kPoison) {
        return false;
      }
    }
    return true;
  }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  ElementType type() const { return type_; }

 private:
  static constexpr int64_t kSlack = 80;  // elements: more than any vector holds

  const unsigned char* at(int64_t row, int64_t col) const {
    return bytes_.data() + (shift_ + row * row_stride_ + col * col_stride_) * size_bytes(type_);
  }

  ElementType type_;
  int64_t rows_;
  int64_t cols_;
  int64_t col_stride_;
  int64_t shift_;
  int64_t row_stride_;
  std::vector<unsigned char> bytes_;
};

struct Bounds {
  std::vector<int64_t> starts;
  std::vector<int64_t> lengths;
};

inline RowIndex index_over(const std::vector<int64_t>& values) {
  RowIndex index;
  index.data = values.data();
  index.type = ElementType::kInt64;
  index.row_strides[0] = 1;
  return index;
}

inline Problem make_problem(Operation operation, Matrix& output, std::vector<Matrix>& inputs, const Bounds& bounds,
                            double scale = 1.0) {
  Problem problem;
  problem.operation = operation;
  problem.scale = scale;
  problem.rows = output.rows();
  problem.cols = output.cols();
  problem.row_ndim = 1;
  problem.row_sizes[0] = output.rows();
  problem.output = output.operand();
  problem.input_count = static_cast<int>(inputs.size());
  for (size_t k = 0; k < inputs.size(); ++k) {
    problem.inputs[k] = inputs[k].operand();
  }
  problem.lengths = index_over(bounds.lengths);
  problem.starts = index_over(bounds.starts);
  return problem;
}

// Whether the operation's `y`, the last input of every derivative, is a log_softmax.
constexpr bool takes_log_softmax(Operation operation) {
  switch (operation) {
    case Operation::kSoftmax:
    case Operation::kLogSoftmax:
    case Operation::kLogSumExp:
    case Operation::kRowDot:
    case Operation::kRowScale: return false;  // no y
    case Operation::kSoftmaxBackward:
    case Operation::kSoftmaxBackwardWrtY:
    case Operation::kSoftmaxBackwardJvpWrtY: return false;
    case Operation::kLogSoftmaxBackward:
    case Operation::kLogSoftmaxJvp:
    case Operation::kLogSoftmaxBackwardWrtY:
    case Operation::kLogSoftmaxJvpJvpWrtY: return true;
  }
  return false;
}

// Fills the valid columns with scores, gradients and results of a forward pass (y). Padding stays poison.
inline void fill_inputs(Operation operation, std::vector<Matrix>& inputs, const Bounds& bounds, unsigned seed,
                        double spread = 3.0) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, spread);
  for (size_t k = 0; k < inputs.size(); ++k) {
    const bool is_y = inputs.size() > 1 && k + 1 == inputs.size();
    for (int64_t row = 0; row < inputs[k].rows(); ++row) {
      const int64_t length = bounds.lengths[static_cast<size_t>(row)];
      for (int64_t i = 0; i < length; ++i) {
        double value = normal(random);
        if (is_y) {
          const double logarithm = -std::fabs(value) - std::log(static_cast<double>(length));
          value = takes_log_softmax(operation) ? logarithm : std::exp(logarithm);
        }
        inputs[k].set(row, bounds.starts[static_cast<size_t>(row)] + i, value);
      }
    }
  }
}

// Selects every supported instruction set in turn, checks that it is in use, and calls visit(capability).
template <class Visitor>
void for_each_capability(const Visitor& visit) {
  for (const CpuCapability& capability : supported_cpu_capabilities()) {
    set_cpu_capability(capability.name);
    CHECK(std::string(cpu_capability().name) == capability.name, cpu_capability().name << " is in use");
    visit(capability);
  }
  set_cpu_capability(supported_cpu_capabilities().back().name);
}

// Calls visit() with cached stores of the results, and with non-temporal ones.
template <class Visitor>
void for_each_store_hint(const Visitor& visit) {
#ifdef MASKED_SOFTMAX_EMULATOR_IS_CHECKED  // the CUDA kernels have no such choice
  visit();
#else
  for (StoreHint hint : {StoreHint::kCached, StoreHint::kNonTemporal}) {
    force_store_hint(hint);
    CHECK(store_hint_of(Problem()) == hint, "the store hint is forced");
    visit();
  }
  force_store_hint({});
#endif
}

}  // namespace kernel_tests
