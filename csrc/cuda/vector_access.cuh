// Vectors of contiguous elements: a thread's loads and stores of up to 16 bytes, wherever they begin.
//
// Vector v of a row is its elements [v * kElems, v * kElems + kElems), counted from the first valid column, not from an
// aligned address. So the thread that holds an element depends on the element's number alone, and with it the order of
// a row's sums. If the first element is aligned, a vector is one access. Otherwise it is joined from the two aligned
// accesses that it straddles:
//
//   accesses     |.......0........|.......1........|.......2........|
//   elements           |- vector 0 ----|- vector 1 ----|- vector 2
//
// A load reads both; the neighbouring lane reads one of them too, from cache. For a store, the previous lane passes its
// part by a shuffle. Accesses at the ends, which reach into other memory, go element by element: no byte outside of the
// elements is read or written.
//
// Loads come in two steps. begin_loads() issues a thread's whole accesses without a branch between them, so that all
// are in flight together; finish_loads() reads the elements at the ends.
#pragma once

#include "cuda/device.cuh"

namespace masked_softmax::cuda {

template <class T, int kElems>
struct alignas(sizeof(T) * kElems) Vector {
  static_assert(sizeof(T) * kElems == 8 || sizeof(T) * kElems == 16, "one access");
  T elems[kElems];
};

// Elements between the last multiple of a vector's size and p.
template <int kElems, class T>
MASKED_SOFTMAX_DEVICE int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kElems);
}

// The vector that begins `skipped` elements into low:high; 0 <= skipped < kElems.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE Vector<T, kElems> join(const Vector<T, kElems>& low, const Vector<T, kElems>& high, int skipped) {
  constexpr int kWords = sizeof(low) / 4;
  const unsigned skipped_bytes = static_cast<unsigned>(skipped) * sizeof(T);
  uint32_t words[2 * kWords];
  memcpy(words, &low, sizeof(low));
  memcpy(words + kWords, &high, sizeof(high));
  // By 8, by 4 and by fewer bytes: all indices are constants, so the words stay in registers.
  if (kWords == 4 && (skipped_bytes & 8) != 0) {
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < 2 * kWords - 2; ++i) {
      words[i] = words[i + 2];
    }
  }
  if ((skipped_bytes & 4) != 0) {
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kWords + 1; ++i) {
      words[i] = words[i + 1];
    }
  }
  if constexpr (sizeof(T) < 4) {
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kWords; ++i) {
      words[i] = funnel_shift_right(words[i], words[i + 1], skipped_bytes % 4 * 8);
    }
  }
  Vector<T, kElems> joined;
  memcpy(&joined, words, sizeof(joined));
  return joined;
}

// A vector of one value.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE Vector<T, kElems> filled(T value) {
  Vector<T, kElems> vector;
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    vector.elems[i] = value;
  }
  return vector;
}

// Stores elements [from, to) of a vector one by one.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE void store_elems(T* p, const Vector<T, kElems>& vector, int from, int to) {
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    if (from <= i && i < to) {
      in_device_memory(p)[i] = vector.elems[i];
    }
  }
}

// A thread's share of the vectors of a row, or of a chunk of one: vector `thread` and every `threads`-th after it.
struct VectorShare {
  int begin;   // the first element
  int stride;  // elements from a vector to the next

  template <int kElems>
  MASKED_SOFTMAX_DEVICE static VectorShare of(int thread, int threads) {
    return {thread * kElems, threads * kElems};
  }
};

// A thread's loads from the `count` elements that begin at `first`. Elements from `count` on are `absent`. A negative
// count is that of an empty row.
template <class T, int kElems, int kVectors, bool kIsAligned>
class VectorLoads {
 public:
  using VectorType = Vector<T, kElems>;

  MASKED_SOFTMAX_DEVICE void begin_loads(const T* first, int count, const VectorShare& share, T absent) {
    skipped_ = kIsAligned ? 0 : misalignment<kElems>(first);
    first_access_ = in_device_memory(first) - skipped_;
    end_ = count > 0 ? count + skipped_ : 0;
    share_ = share;
    absent_ = absent;
    const T* const p = first_access_ + share.begin;
    const auto otherwise = filled<T, kElems>(absent);
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      low_[k] = load_vector_if(is_whole(begin(k)), p + k * share.stride, otherwise);
      if constexpr (!kIsAligned) {
        high_[k] = load_vector_if(skipped_ > 0 && is_whole(begin(k) + kElems), p + k * share.stride + kElems, otherwise);
      }
    }
  }

  MASKED_SOFTMAX_DEVICE void finish_loads() {
    const int tail = end_ % kElems;
    if (tail != 0) {
      finish_access(end_ - tail, tail);
    }
    if constexpr (!kIsAligned) {
      if (skipped_ > 0) {
        if (end_ >= kElems) {
          finish_access(0, kElems);
        }
        MASKED_SOFTMAX_UNROLL
        for (int k = 0; k < kVectors; ++k) {
          low_[k] = join(low_[k], high_[k], skipped_);
        }
      }
    }
  }

  MASKED_SOFTMAX_DEVICE const VectorType& vector(int k) const { return low_[k]; }

 private:
  // Offsets are in elements from first_access_. Vector k's first access begins at:
  MASKED_SOFTMAX_DEVICE int begin(int k) const { return share_.begin + k * share_.stride; }
  // Whether the access that begins there reads nothing but elements.
  MASKED_SOFTMAX_DEVICE bool is_whole(int begin) const { return begin >= skipped_ && begin + kElems <= end_; }

  // Loads the elements of an access that reads other memory too. All threads load them, and those that hold a vector
  // with a part of it keep them.
  MASKED_SOFTMAX_DEVICE void finish_access(int access_begin, int access_end) {
    auto access = filled<T, kElems>(absent_);
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kElems; ++i) {
      if (access_begin + i >= skipped_ && i < access_end) {
        access.elems[i] = in_device_memory(first_access_)[access_begin + i];
      }
    }
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      low_[k] = begin(k) == access_begin ? access : low_[k];
      if constexpr (!kIsAligned) {
        high_[k] = begin(k) + kElems == access_begin ? access : high_[k];
      }
    }
  }

  const T* first_access_;
  int skipped_;  // elements of the first access before the first one
  int end_;
  VectorShare share_;
  T absent_;
  VectorType low_[kVectors];
  VectorType high_[kIsAligned ? 1 : kVectors];
};

// The vector of the previous lane.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE Vector<T, kElems> previous_vector(const Vector<T, kElems>& vector) {
  constexpr int kWords = sizeof(vector) / 4;
  uint32_t words[kWords];
  memcpy(words, &vector, sizeof(vector));
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kWords; ++i) {
    words[i] = shuffle_up(words[i], 1);
  }
  Vector<T, kElems> previous;
  memcpy(&previous, words, sizeof(previous));
  return previous;
}

// Stores a vector, the one that begins at element `begin` of the `count` from `first` on. All lanes of a warp call
// together. Those of a group hold consecutive vectors; `previous` is the previous lane's.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE void store_vector(T* first, int count, int begin, const Vector<T, kElems>& vector,
                                        const Vector<T, kElems>& previous, bool is_first_lane, bool is_last_lane) {
  const int skipped = misalignment<kElems>(first);
  T* const p = first + begin;
  if (skipped == 0) {
    if (begin + kElems <= count) {
      store_vector_if(true, p, vector);
    } else {
      store_elems(p, vector, 0, count - begin);
    }
    return;
  }
  // Each lane stores the aligned access that begins within the previous vector and ends within this one:
  //
  //   access       |.......16.......|
  //   elements     - previous -|---- vector ----|
  //                            ^ first + begin, `skipped` elements into the access
  if (is_first_lane || begin - skipped + kElems > count) {
    if (!is_first_lane) {
      store_elems(p - kElems, previous, kElems - skipped, count - (begin - kElems));
    }
    store_elems(p, vector, 0, count - begin < kElems - skipped ? count - begin : kElems - skipped);
  } else {
    store_vector_if(true, p - skipped, join(previous, vector, kElems - skipped));
  }
  if (is_last_lane) {  // no next lane stores the rest
    store_elems(p, vector, kElems - skipped, count - begin);
  }
}

// Sets columns [begin, end) of a row. `threads` threads call together; `thread` is this one's number.
template <int kElems, class T>
MASKED_SOFTMAX_DEVICE void fill_columns(T* row, int64_t begin, int64_t end, T value, int64_t thread, int64_t threads) {
  const auto vector = filled<T, kElems>(value);
  const int skipped = misalignment<kElems>(row + begin);
  MASKED_SOFTMAX_NO_UNROLL
  for (int64_t at = begin - skipped + thread * kElems; at < end; at += threads * kElems) {
    const auto from = static_cast<int>(at < begin ? begin - at : 0);
    const auto to = static_cast<int>(end - at < kElems ? end - at : kElems);
    if (to - from == kElems) {
      store_vector_if(true, row + at, vector);
    } else {
      store_elems(row + at, vector, from, to);
    }
  }
}

}  // namespace masked_softmax::cuda
