#include "cpu/gather.h"

#include <cmath>
#include <cstring>

namespace masked_softmax {

template <class acc_t>
void gather(const void* row, ElementType type, int64_t stride, int64_t count, acc_t* to) {
  visit_element_type(type, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(row);
    if (stride == 1) {  // a separate loop, which the compiler vectorizes
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
void scatter(const acc_t* from, int64_t count, void* row, ElementType type, int64_t stride) {
  visit_element_type_of<ElementKind::kFloating>(type, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(row);
    for (int64_t i = 0; i < count; ++i) {
      write_element(to + i * stride, from_acc<T>(from[i]));
    }
  });
}

template void gather(const void*, ElementType, int64_t, int64_t, float*);
template void gather(const void*, ElementType, int64_t, int64_t, double*);
template void scatter(const float*, int64_t, void*, ElementType, int64_t);
template void scatter(const double*, int64_t, void*, ElementType, int64_t);

void fill_strided(double value, int64_t count, void* row, ElementType type, int64_t stride) {
  visit_element_type_of<ElementKind::kFloating>(type, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(row);
    if (stride == 1 && value == 0.0 && !std::signbit(value)) {
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
