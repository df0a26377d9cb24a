// A vector group: vectors that take the same operations one after another, so that the latencies of one overlap those
// of the next. It has the interface of a vector, and its vectors hold adjacent elements.
#pragma once

#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class V, int kCount>
struct VectorGroup {
  using acc_t = typename V::acc_t;
  using Mask = typename V::Mask;
  static constexpr int kLanes = kCount * V::kLanes;
  static constexpr int kExp2TableSize = V::kExp2TableSize;
  static constexpr bool kHasScalef = V::kHasScalef;
  static constexpr int kVectors = kCount;
  V v[kCount];

  MASKED_SOFTMAX_INLINE V vector(int i) const { return v[i]; }

  template <class F>
  static MASKED_SOFTMAX_INLINE VectorGroup each(const F& vector) {
    VectorGroup result;
    for (int i = 0; i < kCount; ++i) {
      result.v[i] = vector(i);
    }
    return result;
  }

  static MASKED_SOFTMAX_INLINE VectorGroup broadcast(acc_t value) {
    return each([&](int) MASKED_SOFTMAX_LAMBDA_INLINE { return V::broadcast(value); });
  }
  template <class T>
  static MASKED_SOFTMAX_INLINE VectorGroup load(const T* p) {
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return V::load(p + i * V::kLanes); });
  }
  template <class T>
  static MASKED_SOFTMAX_INLINE VectorGroup load(const T* p, Mask mask) {
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return V::load(p + i * V::kLanes, mask.part(i)); });
  }
  template <class T>
  MASKED_SOFTMAX_INLINE void store(T* p) const {
    for (int i = 0; i < kCount; ++i) {
      v[i].store(p + i * V::kLanes);
    }
  }
  template <class T>
  MASKED_SOFTMAX_INLINE void store(T* p, Mask mask) const {
    for (int i = 0; i < kCount; ++i) {
      v[i].store(p + i * V::kLanes, mask.part(i));
    }
  }
  template <class T>
  MASKED_SOFTMAX_INLINE void store_non_temporal(T* p) const {
    for (int i = 0; i < kCount; ++i) {
      v[i].store_non_temporal(p + i * V::kLanes);
    }
  }

  static MASKED_SOFTMAX_INLINE Mask first_n(int64_t n) { return V::first_n(n); }
  MASKED_SOFTMAX_INLINE VectorGroup masked(Mask mask) const {
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return v[i].masked(mask.part(i)); });
  }
  MASKED_SOFTMAX_INLINE VectorGroup masked(Mask mask, acc_t fill) const {
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return v[i].masked(mask.part(i), fill); });
  }

#define MASKED_SOFTMAX_EACH(signature, expression)                               \
  signature {                                                                    \
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return expression; }); \
  }
#define MASKED_SOFTMAX_OPERATOR(op) \
  MASKED_SOFTMAX_EACH(MASKED_SOFTMAX_INLINE VectorGroup operator op(const VectorGroup& b) const, v[i] op b.v[i])
#define MASKED_SOFTMAX_UNARY(name) \
  MASKED_SOFTMAX_EACH(static MASKED_SOFTMAX_INLINE VectorGroup name(const VectorGroup& a), V::name(a.v[i]))
#define MASKED_SOFTMAX_BINARY(name)                                                                              \
  MASKED_SOFTMAX_EACH(static MASKED_SOFTMAX_INLINE VectorGroup name(const VectorGroup& a, const VectorGroup& b), \
                      V::name(a.v[i], b.v[i]))
#define MASKED_SOFTMAX_TERNARY(name)                                                                                   \
  MASKED_SOFTMAX_EACH(                                                                                                 \
      static MASKED_SOFTMAX_INLINE VectorGroup name(const VectorGroup& a, const VectorGroup& b, const VectorGroup& c), \
      V::name(a.v[i], b.v[i], c.v[i]))
  MASKED_SOFTMAX_OPERATOR(+)
  MASKED_SOFTMAX_OPERATOR(-)
  MASKED_SOFTMAX_OPERATOR(*)
  MASKED_SOFTMAX_UNARY(exp2_of)
  MASKED_SOFTMAX_UNARY(table_lookup)
  MASKED_SOFTMAX_UNARY(one_where_zero)
  MASKED_SOFTMAX_BINARY(max)
  MASKED_SOFTMAX_BINARY(min)
  MASKED_SOFTMAX_BINARY(scalef)
  MASKED_SOFTMAX_BINARY(zero_where_zero)
  MASKED_SOFTMAX_TERNARY(fma)
  MASKED_SOFTMAX_TERNARY(fms)
  MASKED_SOFTMAX_TERNARY(zero_where_less)
#undef MASKED_SOFTMAX_EACH
#undef MASKED_SOFTMAX_OPERATOR
#undef MASKED_SOFTMAX_UNARY
#undef MASKED_SOFTMAX_BINARY
#undef MASKED_SOFTMAX_TERNARY
};

// For loops over vectors and groups alike: W is a vector or a group, `mask` is Full or W's Mask.
template <class W, class T>
MASKED_SOFTMAX_INLINE W load(const T* p, Full) {
  return W::load(p);
}
template <class W, class T>
MASKED_SOFTMAX_INLINE W load(const T* p, typename W::Mask mask) {
  return W::load(p, mask);
}
template <class W, class T>
MASKED_SOFTMAX_INLINE void store(T* p, const W& value, Full) {
  value.store(p);
}
template <class W, class T>
MASKED_SOFTMAX_INLINE void store(T* p, const W& value, typename W::Mask mask) {
  value.store(p, mask);
}
template <class W, class... Fill>
MASKED_SOFTMAX_INLINE W masked(const W& value, Full, Fill...) {
  return value;
}
template <class W, class... Fill>
MASKED_SOFTMAX_INLINE W masked(const W& value, typename W::Mask mask, Fill... fill) {
  return value.masked(mask, fill...);
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
