#include "cpu/gather.h"

#include <cstring>

namespace masked_softmax {
namespace {

template <class acc_t>
void gather_any(const void* row, ElementType type, int64_t stride, int64_t count, acc_t* to) {
  visit_element_type(type, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(row);
    if (stride == 1) {  // a loop of its own, which the compiler vectorizes
      for (int64_t i = 0; i < count; ++i) {
        to[i] = to_acc<acc_t>(read_element(from + i));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = to_acc<acc_t>(read_element(from + i * stride));
      }
    }
  });
}

template <class acc_t>
void scatter_any(const acc_t* from, int64_t count, void* row, ElementType type, int64_t stride) {
  visit_element_type_of<ElementKind::kFloating>(type, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(row);
    for (int64_t i = 0; i < count; ++i) {
      write_element(to + i * stride, from_acc<T>(from[i]));
    }
  });
}

}  // namespace

void gather(const void* row, ElementType type, int64_t stride, int64_t count, float* to) {
  gather_any(row, type, stride, count, to);
}

void gather(const void* row, ElementType type, int64_t stride, int64_t count, double* to) {
  gather_any(row, type, stride, count, to);
}

void scatter(const float* from, int64_t count, void* row, ElementType type, int64_t stride) {
  scatter_any(from, count, row, type, stride);
}

void scatter(const double* from, int64_t count, void* row, ElementType type, int64_t stride) {
  scatter_any(from, count, row, type, stride);
}

void fill_strided(double value, int64_t count, void* row, ElementType type, int64_t stride) {
  visit_element_type_of<ElementKind::kFloating>(type, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(row);
    if (stride == 1 && value == 0.0) {
      std::memset(to, 0, static_cast<size_t>(count) * sizeof(T));
      return;
    }
    const T converted = from_acc<T>(value);
    for (int64_t i = 0; i < count; ++i) {
      write_element(to + i * stride, converted);
    }
  });
}

}  // namespace masked_softmax
