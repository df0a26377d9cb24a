// Rows that no kernel reads directly: any element type with any stride, brought tile by tile into a small contiguous
// buffer of the computing type, and back. Conversions are exact or rounded once, so a staged row has the same bits as
// a directly read one.
#pragma once

#include <cstdint>

#include "common/numeric.h"

namespace masked_softmax {

// buffer[i] = row[i * stride]
void gather(const void* row, ElementType type, int64_t stride, int64_t count, float* buffer);
void gather(const void* row, ElementType type, int64_t stride, int64_t count, double* buffer);

// row[i * stride] = buffer[i]; the row's type is floating point.
void scatter(const float* buffer, int64_t count, void* row, ElementType type, int64_t stride);
void scatter(const double* buffer, int64_t count, void* row, ElementType type, int64_t stride);

// row[i * stride] = value
void scatter_value(double value, int64_t count, void* row, ElementType type, int64_t stride);

// The address of element `offset`.
const void* element_at(const void* data, ElementType type, int64_t offset);
void* element_at(void* data, ElementType type, int64_t offset);

}  // namespace masked_softmax
