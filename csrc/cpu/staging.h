// Staging: packs one row of any type and stride into contiguous memory of the accumulation type, and unpacks it.
#pragma once

#include "cpu/row_passes.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// Whether V has load(const T*).
template <class V, class T, class = void>
constexpr bool is_loadable = false;
template <class V, class T>
constexpr bool is_loadable<V, T, std::void_t<decltype(V::load(static_cast<const T*>(nullptr)))>> = true;

// Calls visit(T{}) where V itself loads and stores elements of this type, T. Returns whether it does.
template <class V, class Visitor>
inline bool visit_loadable_type(ElementType type, const Visitor& visit) {
  return visit_element_type(type, [&](auto element) {
    using T = decltype(element);
    if constexpr (is_loadable<V, T>) {
      visit(element);
    }
    return is_loadable<V, T>;
  });
}

template <class V, class T, class U>
MASKED_SOFTMAX_NOINLINE void convert(const T* from, int64_t count, U* to) {
  for_each_vector<V>(
      count, [&](int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE { store(to + i, load<V>(from + i, mask), mask); });
}

template <class V>
MASKED_SOFTMAX_NOINLINE void multiply(typename V::acc_t* elements, int64_t count, typename V::acc_t factor) {
  for_each_vector<V>(count, [&](int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    store(elements + i, load<V>(elements + i, mask) * V::broadcast(factor), mask);
  });
}

// to[i] = row[i * stride] * factor
template <class V>
void pack_row(const void* row, ElementType type, int64_t stride, int64_t count, typename V::acc_t factor,
              typename V::acc_t* to) {
  const bool is_converted = stride == 1 && visit_loadable_type<V>(type, [&](auto element) {
                              convert<V>(static_cast<const decltype(element)*>(row), count, to);
                            });
  if (!is_converted) {
    gather(row, type, stride, count, to);
  }
  if (factor != 1) {
    multiply<V>(to, count, factor);
  }
}

// row[i * stride] = from[i]
template <class V>
void unpack_row(const typename V::acc_t* from, int64_t count, void* row, ElementType type, int64_t stride) {
  const bool is_converted = stride == 1 && visit_loadable_type<V>(type, [&](auto element) {
                              convert<V>(from, count, static_cast<decltype(element)*>(row));
                            });
  if (!is_converted) {
    scatter(from, count, row, type, stride);
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
