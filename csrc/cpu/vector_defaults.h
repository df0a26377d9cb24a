// The interface of the vector types, and the defaults that most of them share.
//
// Every instruction set's vec_*.h defines two types, Float and Double. Kernels are templates over such a type. Their
// parameters: V a vector, T the type of an input's element, U of the output's, acc_t the accumulation type.
//
//   v                               the lanes, as the compiler's vector (vector_size, of GCC and clang)
//   V{}, V(vector), broadcast(x)    zeros; these lanes; every lane x
//   element(p)                      one element, converted
//   load(p), store(p)               kLanes elements at any address, converted from and to 16-bit types
//   store_non_temporal(p)           as store(p); p is aligned to the vector in memory; x86 only
//   Mask first_n(n, k = 0)          the lanes of vector k of a tile that hold one of the tile's first n elements;
//                                   |n| < 2^15, because AVX2 compares 16-bit numbers
//   load(p, mask), store(p, mask)   touch the elements p[0..n) only; other lanes load as zeros
//   masked(mask, fill = 0)          replaces the lanes outside of the mask
//   a + b, a - b, a * b, fma, fms   fma(a, b, c) = a * b + c and fms(a, b, c) = a * b - c round once
//   max(a, b), min(a, b)            b where either is NaN
//   exp2_of(encoded)                2^n, or with a table 2^n * 2^(k/K); exp2.h says how n and k are encoded
//   table_lookup(encoded)           2^(k/K); only where kHasScalef
//   scalef(x, n)                    x * 2^floor(n); only where kHasScalef
//   zero_where_less(n, least, x)    x, or 0 in the lanes where n < least; a NaN is not less
//   zero_where_zero(t, x), one_where_zero(t)
//   reduce_add(), reduce_max()      over the lanes; the sum is rounded once (AVX-512 float: twice)
//   reduce_add_four, reduce_max_four    the same for four vectors at once
//   transpose(vectors)              kLanes vectors as a matrix
#pragma once

#include "cpu/prelude.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// The mask of full vectors, which is known at compile time.
struct Full {};

// A bfloat16 in memory whose conversion assumes that the value is no NaN: that saves two of nine operations.
struct bfloat16_no_nan_t {
  uint16_t bits;
};

// A type has to add its constructors and fma().
template <class V, class T, int kCount>
struct VectorDefaults {
  using acc_t = T;
  static constexpr int kLanes = kCount;
  static constexpr int kTileVectors = 4;     // vectors of a tile (row_passes.h), 4 or 8
  static constexpr int kExp2TableSize = 1;   // entries of the exponential's table (exp2.h); 1: no table
  static constexpr bool kHasScalef = false;  // has scalef() and table_lookup()
  static constexpr bool kHasNonTemporalStores = false;
  // Whether 16-bit types get contiguous kernels (rows.h). false: load() goes element by element, and staging is as
  // fast.
  static constexpr bool kLoads16Bit = true;
  // Whether short rows have all kernels of contiguous_rows.h. false: blocks for tuned operations alone.
  static constexpr bool kHasShortRowKernels = true;
  // Whether a masked load of 16-bit elements is one instruction.
  static constexpr bool kHasMaskedLoads16Bit = false;

  using int_t = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T vector_t __attribute__((vector_size(sizeof(T) * kCount)));
  typedef int_t ints_t __attribute__((vector_size(sizeof(T) * kCount)));
  vector_t v;

  // Orders the non-temporal stores before it with all later stores.
  static void store_fence() {}

  // Lane i is element first + i of a tile, of which the mask has the first `count`.
  struct Mask {
    int count;
    int first;

    int size() const { return count - first; }  // may be negative, or more than kLanes
  };
  static Mask first_n(int64_t n, int k = 0) { return {static_cast<int>(n), k * kCount}; }
  // All bits of the lanes that the mask has.
  static ints_t lane_mask(Mask mask) {
    ints_t elements;
    for (int i = 0; i < kCount; ++i) {
      elements[i] = mask.first + i;
    }
    return elements < int_t{mask.count};
  }
  V masked(Mask mask, T fill = 0) const { return lane_mask(mask) ? v : V::broadcast(fill).v; }

  static V broadcast(T value) { return value - vector_t{}; }

  template <class E>
  static T element(const E* p) {
    return to_acc<T>(read_element(p));
  }
  template <class E>
  static constexpr bool is_element =
      std::is_same_v<E, T> ||
      (std::is_same_v<T, float> && (std::is_same_v<E, bfloat16_t> || std::is_same_v<E, float16_t>));

  template <class E, class = std::enable_if_t<is_element<E>>>
  static V load(const E* p) {
    return V::load(p, V::first_n(kCount));
  }
  template <class E>
  static V load(const E* p, Mask mask) {
    V result{};
    for (int i = 0; i < kCount && i < mask.size(); ++i) {
      result.v[i] = V::element(p + i);
    }
    return result;
  }
  template <class E>
  void store(E* p) const {
    store(p, first_n(kCount));
  }
  template <class E>
  void store(E* p, Mask mask) const {
    for (int i = 0; i < kCount && i < mask.size(); ++i) {
      write_element(p + i, from_acc<E>(v[i]));
    }
  }

  V operator+(V b) const { return v + b.v; }
  V operator-(V b) const { return v - b.v; }
  V operator*(V b) const { return v * b.v; }
  static V fms(V a, V b, V c) { return V::fma(a, b, -c.v); }
  // Compare and choose: NEON's vmaxq would return a NaN of either argument, vmaxnmq the number.
  static V max(V a, V b) { return a.v > b.v ? a.v : b.v; }
  static V min(V a, V b) { return a.v < b.v ? a.v : b.v; }

  static V exp2_of(V encoded) { return (vector_t)((ints_t)encoded.v << (std::numeric_limits<T>::digits - 1)); }
  static V zero_where_less(V n, V least, V value) { return n.v < least.v ? vector_t{} : value.v; }
  // Bitwise: for a choice between `value` and zeros, GCC 12 copies a register of zeros first.
  static V zero_where_zero(V t, V value) { return (vector_t)((t.v != 0) & (ints_t)value.v); }
  static V one_where_zero(V t) { return t.v == 0 ? 1 - vector_t{} : vector_t{}; }

  T reduce_max() const {
    T result = v[0];
    for (int i = 1; i < kCount; ++i) {
      result = v[i] > result ? v[i] : result;
    }
    return result;
  }
  T reduce_add() const {
    T elements[kCount];
    static_cast<const V*>(this)->store(elements);
    return compensated_sum(elements, kCount);
  }

  // Lane k of vector i becomes lane i of vector k.
  static void transpose(V* vectors) {
    V result[kCount];
    for (int i = 0; i < kCount; ++i) {
      for (int k = 0; k < kCount; ++k) {
        result[k].v[i] = vectors[i].v[k];
      }
    }
    std::memcpy(vectors, result, sizeof(result));
  }

  static void reduce_add_four(const V* vectors, T* sums) {
    for (int i = 0; i < 4; ++i) {
      sums[i] = vectors[i].reduce_add();
    }
  }
  static void reduce_max_four(const V* vectors, T* maxima) {
    for (int i = 0; i < 4; ++i) {
      maxima[i] = vectors[i].reduce_max();
    }
  }
};

// For loops that treat full vectors and the tail alike: `mask` is Full or V's Mask.
template <class V, class T>
MASKED_SOFTMAX_INLINE V load(const T* p, Full) {
  return V::load(p);
}
template <class V, class T>
MASKED_SOFTMAX_INLINE V load(const T* p, typename V::Mask mask) {
  return V::load(p, mask);
}
template <class V, class T>
MASKED_SOFTMAX_INLINE void store(T* p, const V& value, Full) {
  value.store(p);
}
template <class V, class T>
MASKED_SOFTMAX_INLINE void store(T* p, const V& value, typename V::Mask mask) {
  value.store(p, mask);
}
template <class V, class... Fill>
MASKED_SOFTMAX_INLINE V masked(const V& value, Full, Fill...) {
  return value;
}
template <class V, class... Fill>
MASKED_SOFTMAX_INLINE V masked(const V& value, typename V::Mask mask, Fill... fill) {
  return value.masked(mask, fill...);
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
