// Strided memory of exactly the size that it needs, which notices accesses to anything that does not belong to it.
//
// On the heap AddressSanitizer sees the loads and stores that the compiler instruments. Between unreadable pages the
// processor sees all of them, AVX2's masked ones too, but only beyond the ends. So a case draws one of the two.
// Elements in between that must not be touched are poisoned for AddressSanitizer, and hold canaries.
#pragma once

#include <sanitizer/asan_interface.h>

#include <memory>
#include <vector>

#include "bytes.h"
#include "cases.h"
#include "guard.h"

namespace fuzz {

using namespace masked_softmax;

enum class Place { kHeap, kPageBehind, kPageBefore };
constexpr Place kPlaces[] = {Place::kHeap, Place::kHeap, Place::kPageBehind, Place::kPageBefore};

// Row sizes, the outermost first.
struct Shape {
  std::vector<int64_t> row_sizes;
  int64_t cols = 1;

  int64_t rows() const {
    int64_t product = 1;
    for (int64_t size : row_sizes) {
      product *= size;
    }
    return product;
  }
  // The offset of a row's first element.
  int64_t offset(const int64_t* row_strides, int64_t row) const {
    int64_t result = 0;
    for (size_t dim = row_sizes.size(); dim-- > 0;) {
      result += row % row_sizes[dim] * row_strides[dim];
      row /= row_sizes[dim];
    }
    return result;
  }
};

// The strides of an array with the shape's rows, and its columns if it has any.
struct Layout {
  int64_t elems = 0;
  int64_t first = 0;  // the index of column 0 of row 0
  int64_t col_stride = 1;
  std::vector<int64_t> row_strides;
};

// Draws dimensions in any order, in either direction, with gaps; if elements may be shared, also strides of 0.
inline Layout draw_layout(Bytes& bytes, const Shape& shape, bool has_columns, bool may_share) {
  const size_t ndim = shape.row_sizes.size();
  Layout layout;
  layout.row_strides.assign(ndim, 0);
  std::vector<size_t> order;  // the innermost first; ndim stands for the columns
  if (has_columns) {
    order.push_back(ndim);
  }
  for (size_t dim = ndim; dim-- > 0;) {
    order.push_back(dim);
  }
  const bool is_contiguous = !bytes.flag();
  int64_t step = 1;
  int64_t last = 0;
  bool is_empty = false;
  for (size_t i = 0; i < order.size(); ++i) {
    int64_t kind = 0;
    int64_t gap = 0;
    if (!is_contiguous) {
      std::swap(order[i], order[i + static_cast<size_t>(bytes.up_to(static_cast<int64_t>(order.size() - i) - 1))]);
      kind = bytes.up_to(7);
      gap = bytes.up_to(15) / 4;
    }
    const size_t dim = order[i];
    const int64_t size = dim == ndim ? shape.cols : shape.row_sizes[dim];
    int64_t& stride = dim == ndim ? layout.col_stride : layout.row_strides[dim];
    is_empty = is_empty || size == 0;
    if (kind == 1 && may_share) {
      stride = 0;
      continue;
    }
    stride = kind == 2 ? -step : step;
    const int64_t span = step * (size > 0 ? size - 1 : 0);
    layout.first += kind == 2 ? span : 0;
    last += span;
    step *= size + gap;
    step = step > 0 ? step : 1;
  }
  layout.elems = is_empty ? 0 : last + 1;
  return layout;
}

class Memory {
 public:
  Memory(ElementType type, const Layout& layout, Place place) : type_(type), layout_(layout) {
    const int64_t size = layout.elems * size_bytes(type);
    if (place == Place::kHeap) {
      heap_.reset(new unsigned char[static_cast<size_t>(size)]);
      data_ = heap_.get();
    } else {
      guarded_ = std::make_unique<kernel_tests::GuardedBuffer>(size, place == Place::kPageBehind);
      data_ = reinterpret_cast<unsigned char*>(guarded_->data());
    }
    std::memset(data_, kCanary, static_cast<size_t>(size));
    is_ours_.assign(static_cast<size_t>(layout.elems), false);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { unpoison(); }

  ElementType type() const { return type_; }
  const Layout& layout() const { return layout_; }
  void* first() const { return at(0); }

  // offset: from column 0 of row 0.
  unsigned char* at(int64_t offset) const { return data_ + (layout_.first + offset) * size_bytes(type_); }

  // The elements that may be touched.
  void admit(int64_t offset) { is_ours_[static_cast<size_t>(layout_.first + offset)] = true; }

  void poison_others() const {
    for_each_other([&](unsigned char* element, size_t bytes) { ASAN_POISON_MEMORY_REGION(element, bytes); });
  }
  void unpoison() const { ASAN_UNPOISON_MEMORY_REGION(data_, is_ours_.size() * size_bytes(type_)); }

  bool others_are_untouched() const {
    bool untouched = true;
    for_each_other([&](const unsigned char* element, size_t bytes) {
      for (size_t i = 0; i < bytes; ++i) {
        untouched = untouched && element[i] == kCanary;
      }
    });
    return untouched;
  }

 private:
  static constexpr unsigned char kCanary = 0xff;  // as an element of any floating type: NaN

  // Calls visit(from, bytes) for every run of elements that are not to be touched.
  template <class Visit>
  void for_each_other(const Visit& visit) const {
    const auto elem_bytes = static_cast<size_t>(size_bytes(type_));
    for (size_t i = 0; i < is_ours_.size();) {
      size_t end = i;
      while (end < is_ours_.size() && !is_ours_[end]) {
        ++end;
      }
      if (end > i) {
        visit(data_ + i * elem_bytes, (end - i) * elem_bytes);
      }
      i = end + 1;
    }
  }

  ElementType type_;
  Layout layout_;
  std::unique_ptr<unsigned char[]> heap_;
  std::unique_ptr<kernel_tests::GuardedBuffer> guarded_;
  unsigned char* data_;
  std::vector<bool> is_ours_;
};

}  // namespace fuzz
