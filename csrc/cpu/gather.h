// Rows of any element type and stride, element by element: the conversions that no vector type has. A conversion to the
// accumulation type (acc_t: float or double) is exact, one from it rounds once.
#pragma once

#include <cstdint>

#include "common/numeric.h"

namespace masked_softmax {

// to[i] = row[i * stride]
template <class acc_t>
void gather(const void* row, ElementType type, int64_t stride, int64_t count, acc_t* to);

// row[i * stride] = from[i]. Precondition: a floating point type.
template <class acc_t>
void scatter(const acc_t* from, int64_t count, void* row, ElementType type, int64_t stride);

// row[i * stride] = value. Precondition: a floating point type.
void fill_strided(double value, int64_t count, void* row, ElementType type, int64_t stride);

// The address of element `offset`.
inline const void* element_at(const void* data, ElementType type, int64_t offset) {
  return static_cast<const char*>(data) + offset * size_bytes(type);
}
inline void* element_at(void* data, ElementType type, int64_t offset) {
  return static_cast<char*>(data) + offset * size_bytes(type);
}

}  // namespace masked_softmax
