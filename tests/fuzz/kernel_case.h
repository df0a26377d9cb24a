// One problem for the kernels, with its memory, drawn from a fuzzer's input.
//
// Every case exists twice: as drawn, and as a twin in contiguous matrices (tests/kernel/cases.h). Both must have the
// same bits, and the twin's are compared with the reference.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "bytes.h"
#include "cases.h"
#include "common/bounds.h"
#include "cpu/dispatch.h"
#include "memory.h"

namespace fuzz {

using kernel_tests::Bounds;
using kernel_tests::Matrix;

constexpr ElementType kInputTypes[] = {ElementType::kFloat32,  ElementType::kFloat32, ElementType::kFloat64,
                                       ElementType::kBFloat16, ElementType::kFloat16, ElementType::kInt8,
                                       ElementType::kUInt8,    ElementType::kInt16,   ElementType::kInt32,
                                       ElementType::kInt64,    ElementType::kBool};

constexpr ElementType kIndexTypes[] = {ElementType::kInt64, ElementType::kInt32, ElementType::kInt16,
                                       ElementType::kInt8, ElementType::kUInt8};

// Around every size at which a strategy changes (tests/kernel/test_rows.cpp).
constexpr int64_t kThresholds[] = {0, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192};

constexpr int64_t kMaxElems = 6000;  // rows times columns: more would only be slower

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kScales[] = {1.0,    -1.0,   0.125, -0.0,    0.0,      3.7,       1e-3,       -1e30,
                              1e-300, 5e-324, 1e300, 0x1p100, 0x1p-100, kInfinity, -kInfinity, kNan};
constexpr double kSpecialValues[] = {0.0,  -0.0,  1.0,   -1.0,   88.0,      -104.0,     710.0, 65504.0,
                                     3e38, -3e38, 1e-40, 1e-310, kInfinity, -kInfinity, kNan,  -7.5};

enum class Values { kTame, kSpecial, kAnyBits };
constexpr Values kValueKinds[] = {Values::kTame, Values::kTame, Values::kSpecial, Values::kAnyBits};

inline bool is_floating(ElementType type) {
  return std::find(std::begin(kernel_tests::kFloatingTypes), std::end(kernel_tests::kFloatingTypes), type) !=
         std::end(kernel_tests::kFloatingTypes);
}

class Case {
 public:
  explicit Case(Bytes bytes) : bytes_(bytes) {
    capability_ = &supported_cpu_capabilities()[static_cast<size_t>(
        bytes_.up_to(static_cast<int64_t>(supported_cpu_capabilities().size()) - 1))];
    problem_.operation = bytes_.one_of(kernel_tests::kOperations);
    problem_.scale = draw_scale();
    const uint8_t hint = bytes_.bits<uint8_t>() % 3;
    if (hint < 2) {
      store_hint_ = static_cast<StoreHint>(hint);
    }
    is_packed_ = bytes_.up_to(3) == 3;
    draw_shape();
    draw_bounds();
    draw_operands();
    draw_values();
    draw_row_numbers();
  }

  const Problem& problem() const { return problem_; }
  const CpuCapability& capability() const { return *capability_; }
  std::optional<StoreHint> store_hint() const { return store_hint_; }
  const Shape& shape() const { return shape_; }
  const Bounds& bounds() const { return bounds_; }
  bool is_packed() const { return is_packed_; }
  Bytes& bytes() { return bytes_; }

  // The first row whose bounds are invalid, found by a plain loop; -1 where there is none.
  int64_t first_invalid_row() const {
    for (size_t row = 0; row < bounds_.lengths.size(); ++row) {
      const __int128 start = bounds_.starts[row];
      const __int128 length = bounds_.lengths[row];
      if (start < 0 || length < 0 || start + length > shape_.cols) {
        return static_cast<int64_t>(row);
      }
    }
    return -1;
  }

  // Changes lengths or starts, as another thread might after the check of the bounds.
  void disturb_bounds() {
    for (const auto& index : {lengths_.get(), starts_.get()}) {
      if (index != nullptr) {
        for (int64_t i = 0, changes = bytes_.up_to(3); i < changes && index->layout().elems > 0; ++i) {
          const int64_t element = bytes_.up_to(index->layout().elems - 1) - index->layout().first;
          store_index(*index, element, bytes_.bits<int64_t>());
        }
      }
    }
  }

  // Poisons all memory that a kernel must not touch. It may touch every column of the output, and of inputs the valid
  // ones.
  void poison_all_else(bool only_valid_is_read) {
    for (const auto& input : inputs_) {
      for_each_element(only_valid_is_read && input.get() != output_, *input,
                       [&](int64_t offset) { input->admit(offset); });
    }
    for_each_element(false, *output_, [&](int64_t offset) { output_->admit(offset); });
    for (const auto& input : inputs_) {
      input->poison_others();
    }
    output_->poison_others();
    for (const auto& numbers : {sinks_.get(), sink_weights_.get()}) {
      if (numbers != nullptr) {
        for (int64_t row = 0; row < shape_.rows(); ++row) {
          numbers->admit(shape_.offset(numbers->layout().row_strides.data(), row));
        }
        numbers->poison_others();
      }
    }
  }
  void unpoison() {
    for (const auto& input : inputs_) {
      input->unpoison();
    }
    output_->unpoison();
    for (const auto& numbers : {sinks_.get(), sink_weights_.get()}) {
      if (numbers != nullptr) {
        numbers->unpoison();
      }
    }
  }
  bool surroundings_are_untouched() const {
    return output_->others_are_untouched() && (sink_weights_ == nullptr || sink_weights_->others_are_untouched());
  }

  bool has_sinks() const { return sinks_ != nullptr; }
  const std::vector<double>& sinks() const { return sink_values_; }
  ElementType sink_weight_type() const { return sink_weights_->type(); }
  const unsigned char* sink_weight_at(int64_t row) const { return sink_weights_->at(row); }

  // The twin's inputs; packed rows are padded to the longest.
  std::vector<Matrix>& twin_inputs() { return twin_inputs_; }
  Bounds twin_bounds() const {
    Bounds twin = bounds_;
    if (is_packed_) {
      std::fill(twin.starts.begin(), twin.starts.end(), 0);
    }
    return twin;
  }
  int64_t twin_cols() const { return problem_.longest(); }

  // The result in the twin's row and column.
  const unsigned char* result_at(int64_t row, int64_t twin_col) const {
    const int64_t col = twin_col + (is_packed_ ? bounds_.starts[static_cast<size_t>(row)] : 0);
    return output_->at(element_offset(*output_, row, col));
  }

  // Whether the reference applies: to any scores, and to gradients that do not overflow.
  bool has_reference() const {
    const double magnitude = std::fabs(problem_.scale);
    return std::isfinite(magnitude) && (is_forward(problem_.operation) ? magnitude != 0 : is_tame_ && magnitude < 1e4);
  }

 private:
  double draw_scale() {
    const uint8_t kind = bytes_.bits<uint8_t>();
    return kind < 128   ? kScales[kind % 3 == 0 ? 0 : kind % 16]
           : kind < 224 ? (kind - 170) / 16.0
                        : bytes_.bits<double>();
  }

  int64_t draw_size(int64_t largest) {
    const uint8_t kind = bytes_.bits<uint8_t>();
    const int64_t size = kind % 2 == 0 ? kThresholds[kind / 2 % 16] + kind / 32 % 4 - 1 : kind / 2;
    return std::clamp<int64_t>(size, 0, largest);
  }

  void draw_shape() {
    shape_.cols = draw_size(8193);
    int64_t room = std::max<int64_t>(kMaxElems / std::max<int64_t>(shape_.cols, 1), 1);
    const int64_t ndim = is_packed_ ? 1 + bytes_.up_to(2) : bytes_.up_to(4);
    for (int64_t dim = 0; dim < ndim; ++dim) {
      const int64_t size = std::min(room, bytes_.flag() ? bytes_.up_to(7) : draw_size(100));
      shape_.row_sizes.push_back(size);
      room /= std::max<int64_t>(size, 1);
    }
    problem_.cols = shape_.cols;
    problem_.rows = shape_.rows();
    problem_.row_ndim = static_cast<int>(ndim);
    std::copy(shape_.row_sizes.begin(), shape_.row_sizes.end(), problem_.row_sizes);
  }

  void draw_bounds() {
    const auto rows = static_cast<size_t>(shape_.rows());
    bounds_.lengths.assign(rows, 0);
    bounds_.starts.assign(rows, 0);
    if (is_packed_) {
      return draw_packing();
    }
    const bool has_starts = bytes_.flag();
    const bool may_be_invalid = bytes_.up_to(7) == 7;
    const int64_t longest = has_starts ? std::min(shape_.cols, draw_size(shape_.cols)) : shape_.cols;
    lengths_ = draw_index(problem_.lengths, longest, may_be_invalid, bounds_.lengths);
    if (has_starts) {
      starts_ = draw_index(problem_.starts, shape_.cols - longest, may_be_invalid, bounds_.starts);
    } else {
      std::fill(problem_.starts.row_strides, problem_.starts.row_strides + kMaxRowDims, 0);
    }
  }

  // One integer for each row, from 0 to `largest` unless invalid ones are drawn.
  std::unique_ptr<Memory> draw_index(RowIndex& index, int64_t largest, bool may_be_invalid,
                                     std::vector<int64_t>& values) {
    const ElementType type = bytes_.one_of(kIndexTypes);
    std::fill(index.row_strides, index.row_strides + kMaxRowDims, 0);
    if (bytes_.up_to(15) == 15) {  // no memory: one value for all rows
      index.value = may_be_invalid ? bytes_.bits<int64_t>() : bytes_.up_to(largest);
      std::fill(values.begin(), values.end(), index.value);
      return nullptr;
    }
    auto memory = std::make_unique<Memory>(type, draw_layout(bytes_, shape_, false, true), bytes_.one_of(kPlaces));
    const Layout& layout = memory->layout();
    const int64_t kind = bytes_.up_to(3);  // lengths: any, all the same, short, empty or full
    std::mt19937 random(bytes_.bits<uint16_t>());
    for (int64_t i = 0; i < layout.elems; ++i) {
      const auto draw = static_cast<int64_t>(random());
      const int64_t value = kind == 0   ? draw % (largest + 1)
                            : kind == 1 ? largest
                            : kind == 2 ? std::min(largest, draw % 4)
                                        : draw % 2 * largest;
      store_index(*memory, i - layout.first, fitted(type, value));
    }
    for (int64_t i = 0, wrong = may_be_invalid ? bytes_.up_to(3) : 0; i < wrong && layout.elems > 0; ++i) {
      store_index(*memory, bytes_.up_to(layout.elems - 1) - layout.first, bytes_.bits<int64_t>());
    }
    take_index(*memory, index);
    read_index(*memory, index, values);
    return memory;
  }

  // Packs row_sizes[0] rows into the buffer's columns, for every index of the other dimensions.
  void draw_packing() {
    const int64_t batch = shape_.row_sizes[0];
    std::vector<int64_t> ends;
    for (int64_t row = 0; row < batch; ++row) {
      ends.push_back(row + 1 == batch ? shape_.cols : bytes_.up_to(shape_.cols));
    }
    std::sort(ends.begin(), ends.end());
    Layout layout;
    layout.row_strides.assign(shape_.row_sizes.size(), 0);
    layout.row_strides[0] = 1 + bytes_.up_to(1);
    layout.elems = batch > 0 ? (batch - 1) * layout.row_strides[0] + 1 : 0;
    lengths_ = std::make_unique<Memory>(ElementType::kInt64, layout, bytes_.one_of(kPlaces));
    starts_ = std::make_unique<Memory>(ElementType::kInt64, layout, bytes_.one_of(kPlaces));
    int64_t longest = 0;
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t start = row == 0 ? 0 : ends[static_cast<size_t>(row) - 1];
      const int64_t length = ends[static_cast<size_t>(row)] - start;
      store_index(*starts_, row * layout.row_strides[0], start);
      store_index(*lengths_, row * layout.row_strides[0], length);
      longest = std::max(longest, length);
    }
    take_index(*lengths_, problem_.lengths);
    take_index(*starts_, problem_.starts);
    read_index(*lengths_, problem_.lengths, bounds_.lengths);
    read_index(*starts_, problem_.starts, bounds_.starts);
    problem_.packing = {true, longest, batch > 0 ? shape_.rows() / batch * shape_.cols : 0};
  }

  static int64_t fitted(ElementType type, int64_t value) {
    return size_bytes(type) > 1 ? value : std::min<int64_t>(value, type == ElementType::kInt8 ? 127 : 255);
  }
  static void store_index(Memory& memory, int64_t offset, int64_t value) {
    std::memcpy(memory.at(offset), &value, static_cast<size_t>(size_bytes(memory.type())));  // little-endian
  }
  static void take_index(const Memory& memory, RowIndex& index) {
    index.data = memory.first();
    index.type = memory.type();
    std::copy(memory.layout().row_strides.begin(), memory.layout().row_strides.end(), index.row_strides);
  }
  void read_index(const Memory& memory, const RowIndex& index, std::vector<int64_t>& values) const {
    for (size_t row = 0; row < values.size(); ++row) {
      visit_element_type(memory.type(), [&](auto element) {
        using T = decltype(element);
        if constexpr (std::is_integral_v<T>) {
          T value;
          std::memcpy(&value, memory.at(shape_.offset(index.row_strides, static_cast<int64_t>(row))), sizeof(T));
          values[row] = static_cast<int64_t>(value);
        }
      });
    }
  }

  void draw_operands() {
    problem_.input_count = kernel_tests::input_count(problem_.operation);
    const ElementType type = draw_input_type();
    for (int k = 0; k < problem_.input_count; ++k) {
      const ElementType own_type = k > 0 && bytes_.up_to(7) == 7 ? draw_input_type() : type;
      inputs_.push_back(draw_operand(own_type, true));
    }
    const bool is_in_place = bytes_.up_to(7) == 7;
    if (is_in_place && is_floating(type)) {
      inputs_[0] = draw_operand(type, false);
      output_ = inputs_[0].get();
    } else {
      own_output_ = draw_operand(is_floating(type) && bytes_.up_to(3) != 3 ? type : draw_output_type(), false);
      output_ = own_output_.get();
    }
    take_operand(*output_, problem_.output);
    for (int k = 0; k < problem_.input_count; ++k) {
      take_operand(*inputs_[static_cast<size_t>(k)], problem_.inputs[k]);
    }
  }
  ElementType draw_output_type() { return bytes_.one_of(kernel_tests::kFloatingTypes); }
  ElementType draw_input_type() {
    return is_forward(problem_.operation) ? bytes_.one_of(kInputTypes) : draw_output_type();
  }
  std::unique_ptr<Memory> draw_operand(ElementType type, bool may_share) {
    Shape shape = shape_;
    if (is_packed_) {  // packed rows are ranges of columns: that dimension has no stride
      shape.row_sizes.erase(shape.row_sizes.begin());
    }
    Layout layout = draw_layout(bytes_, shape, true, may_share);
    if (is_packed_) {
      layout.row_strides.insert(layout.row_strides.begin(), 0);
    }
    return std::make_unique<Memory>(type, layout, bytes_.one_of(kPlaces));
  }
  static void take_operand(const Memory& memory, Operand& operand) {
    operand.data = memory.first();
    operand.type = memory.type();
    operand.col_stride = memory.layout().col_stride;
    std::copy(memory.layout().row_strides.begin(), memory.layout().row_strides.end(), operand.row_strides);
  }

  // Draws values into the twin and copies them to the memory; shared elements are copied back.
  void draw_values() {
    const Values kind = bytes_.one_of(kValueKinds);
    is_tame_ = kind == Values::kTame;
    if (first_invalid_row() >= 0) {
      return;
    }
    for (const auto& input : inputs_) {
      twin_inputs_.emplace_back(input->type(), shape_.rows(), twin_cols());
    }
    const uint16_t seed = bytes_.bits<uint16_t>();
    if (is_tame_) {
      kernel_tests::fill_inputs(problem_.operation, twin_inputs_, twin_bounds(), seed);
    }
    std::mt19937 random(seed);
    for (size_t k = 0; k < inputs_.size(); ++k) {
      const auto size = static_cast<size_t>(size_bytes(inputs_[k]->type()));
      for_each_valid([&](int64_t row, int64_t col, int64_t twin_col) {
        unsigned char* const element = inputs_[k]->at(element_offset(*inputs_[k], row, col));
        if (is_tame_ && is_floating(inputs_[k]->type())) {
          std::memcpy(element, twin_inputs_[k].bits(row, twin_col).data(), size);
        } else {
          draw_element(kind, inputs_[k]->type(), element, random);
        }
      });
      const Operand twin = twin_inputs_[k].operand();
      for_each_valid([&](int64_t row, int64_t col, int64_t twin_col) {
        std::memcpy(static_cast<unsigned char*>(twin.data) +
                        (row * twin.row_strides[0] + twin_col * twin.col_stride) * static_cast<int64_t>(size),
                    inputs_[k]->at(element_offset(*inputs_[k], row, col)), size);
      });
    }
  }

  // A sink for each row, memory for their weights, and a value for the padding.
  void draw_row_numbers() {
    constexpr double kPaddings[] = {0.0, -7.0, kInfinity, kNan};
    if (!is_forward(problem_.operation) || bytes_.up_to(2) != 2) {
      return;
    }
    if (bytes_.flag()) {
      problem_.padding = bytes_.one_of(kPaddings);
    }
    const ElementType type = draw_output_type();
    sinks_ = std::make_unique<Memory>(type, draw_layout(bytes_, shape_, false, true), bytes_.one_of(kPlaces));
    const Layout& layout = sinks_->layout();
    const Values kind = bytes_.one_of(kValueKinds);
    std::mt19937 random(bytes_.bits<uint16_t>());
    for (int64_t i = 0; i < layout.elems; ++i) {
      draw_element(kind, type, sinks_->at(i - layout.first), random);
    }
    problem_.row_input.data = sinks_->first();
    problem_.row_input.type = type;
    std::copy(layout.row_strides.begin(), layout.row_strides.end(), problem_.row_input.row_strides);
    for (int64_t row = 0; row < shape_.rows(); ++row) {
      sink_values_.push_back(load_row_input(problem_.row_input, shape_.offset(problem_.row_input.row_strides, row)));
    }
    Layout contiguous;
    contiguous.elems = shape_.rows();
    contiguous.row_strides.assign(shape_.row_sizes.size(), 1);
    for (size_t dim = shape_.row_sizes.size(); dim-- > 1;) {
      contiguous.row_strides[dim - 1] = contiguous.row_strides[dim] * shape_.row_sizes[dim];
    }
    const ElementType acc = accumulates_in_double(problem_) ? ElementType::kFloat64 : ElementType::kFloat32;
    sink_weights_ = std::make_unique<Memory>(acc, contiguous, bytes_.one_of(kPlaces));
    problem_.row_result = {sink_weights_->first(), acc};
  }

  void draw_element(Values kind, ElementType type, unsigned char* to, std::mt19937& random) {
    visit_element_type(type, [&](auto element) {
      using T = decltype(element);
      T value;
      if constexpr (std::is_same_v<T, bool>) {
        *to = static_cast<unsigned char>(random());  // any byte but 0 is true
        return;
      } else if constexpr (std::is_integral_v<T>) {
        const uint64_t bits = uint64_t{random()} << 32 | random();
        value = static_cast<T>(kind == Values::kTame ? bits % 16 : bits);
      } else if (kind == Values::kAnyBits) {
        const uint64_t any = uint64_t{random()} << 32 | random();
        const uint64_t bits = bytes_.bits<uint64_t>() ^ any;
        std::memcpy(&value, &bits, sizeof(T));
      } else {  // mostly few and small numbers, so that one special value decides its row
        const uint32_t draw = random();
        value = from_acc<T>(draw % 4 == 0 ? kSpecialValues[draw / 4 % 16] : static_cast<double>(draw / 4 % 8) - 3.5);
      }
      std::memcpy(to, &value, sizeof(T));
    });
  }

  int64_t element_offset(const Memory& memory, int64_t row, int64_t col) const {
    return shape_.offset(memory.layout().row_strides.data(), row) + col * memory.layout().col_stride;
  }
  template <class Visit>
  void for_each_valid(const Visit& visit) const {
    for (int64_t row = 0; row < shape_.rows(); ++row) {
      const int64_t start = bounds_.starts[static_cast<size_t>(row)];
      for (int64_t i = 0; i < bounds_.lengths[static_cast<size_t>(row)]; ++i) {
        visit(row, start + i, is_packed_ ? i : start + i);
      }
    }
  }
  template <class Visit>
  void for_each_element(bool only_valid, const Memory& memory, const Visit& visit) const {
    if (only_valid) {
      return for_each_valid(
          [&](int64_t row, int64_t col, int64_t /*twin_col*/) { visit(element_offset(memory, row, col)); });
    }
    for (int64_t row = 0; row < shape_.rows(); ++row) {
      for (int64_t col = 0; col < shape_.cols; ++col) {
        visit(element_offset(memory, row, col));
      }
    }
  }

  Bytes bytes_;
  Problem problem_;
  const CpuCapability* capability_ = nullptr;
  std::optional<StoreHint> store_hint_;
  bool is_packed_ = false;
  bool is_tame_ = false;
  Shape shape_;
  Bounds bounds_;
  std::unique_ptr<Memory> lengths_;
  std::unique_ptr<Memory> starts_;
  std::vector<std::unique_ptr<Memory>> inputs_;
  std::unique_ptr<Memory> own_output_;
  Memory* output_ = nullptr;  // its own, or the first input's
  std::vector<Matrix> twin_inputs_;
  std::unique_ptr<Memory> sinks_;
  std::unique_ptr<Memory> sink_weights_;
  std::vector<double> sink_values_;  // of each row
};

}  // namespace fuzz
