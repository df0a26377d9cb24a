#include "cpu/staging.h"

#include <cstring>

namespace masked_softmax {
namespace {

template <class acc_t>
void gather_any(const void* row, ElementType type, int64_t stride, int64_t count, acc_t* buffer) {
  visit_element_type(type, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(row);
    if (stride == 1) {  // said apart so that the compiler vectorises it
      for (int64_t i = 0; i < count; ++i) {
        buffer[i] = to_acc<acc_t>(read_element(from + i));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        buffer[i] = to_acc<acc_t>(read_element(from + i * stride));
      }
    }
  });
}

template <class acc_t>
void scatter_any(const acc_t* buffer, int64_t count, void* row, ElementType type, int64_t stride) {
  visit_element_type_of<ElementKind::kFloating>(type, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(row);
    for (int64_t i = 0; i < count; ++i) {
      write_element(to + i * stride, from_acc<T>(buffer[i]));
    }
  });
}

}  // namespace

void gather(const void* row, ElementType type, int64_t stride, int64_t count, float* buffer) {
  gather_any(row, type, stride, count, buffer);
}

void gather(const void* row, ElementType type, int64_t stride, int64_t count, double* buffer) {
  gather_any(row, type, stride, count, buffer);
}

void scatter(const float* buffer, int64_t count, void* row, ElementType type, int64_t stride) {
  scatter_any(buffer, count, row, type, stride);
}

void scatter(const double* buffer, int64_t count, void* row, ElementType type, int64_t stride) {
  scatter_any(buffer, count, row, type, stride);
}

void scatter_value(double value, int64_t count, void* row, ElementType type, int64_t stride) {
  visit_element_type_of<ElementKind::kFloating>(type, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(row);
    const T converted = from_acc<T>(value);
    if (stride == 1 && value == 0.0) {
      std::memset(to, 0, static_cast<size_t>(count) * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      write_element(to + i * stride, converted);
    }
  });
}

const void* element_at(const void* data, ElementType type, int64_t offset) {
  return static_cast<const char*>(data) + offset * size_bytes(type);
}

void* element_at(void* data, ElementType type, int64_t offset) {
  return static_cast<char*>(data) + offset * size_bytes(type);
}

}  // namespace masked_softmax
