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
// part by a shuffle. No byte outside of the elements is read or written: where an access would reach into other memory,
// elements go one by one, but for the loads of a tail, which take an access for each power of two.
//
// Loads come in two steps. begin_loads() issues a thread's whole aligned accesses without a branch between them, so
// that all are in flight together; finish_loads() reads the elements at the ends, and everything else that is not
// aligned.
#pragma once

#include "cuda/device.cuh"

namespace masked_softmax::cuda {

// In words, so that 16-bit elements are converted in pairs.
template <class T, int kElems>
struct alignas(sizeof(T) * kElems) Vector {
  static constexpr int kWords = sizeof(T) * kElems / 4;
  static_assert(kWords == 2 || kWords == 4, "one access");
  uint32_t words[kWords];

  // All elements have one value.
  MASKED_SOFTMAX_DEVICE static Vector filled(T value) {
    Vector vector = {};
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < kElems; ++i) {
      vector.set_elem(i, value);
    }
    return vector;
  }
  MASKED_SOFTMAX_DEVICE static Vector narrowed(const float (&values)[kElems]) {
    Vector vector;
    MASKED_SOFTMAX_UNROLL
    for (int word = 0; word < kWords; ++word) {
      if constexpr (sizeof(T) == 2) {
        vector.words[word] = pack<T>(values[2 * word], values[2 * word + 1]);
      } else {
        vector.words[word] = float_bits(values[word]);
      }
    }
    return vector;
  }

  MASKED_SOFTMAX_DEVICE float widened(int i) const {
    return unpack<T>(words[i * static_cast<int>(sizeof(T)) / 4], sizeof(T) == 2 ? i % 2 : 0);
  }
  MASKED_SOFTMAX_DEVICE T elem(int i) const {
    T value;
    if constexpr (sizeof(T) == 2) {
      const auto half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      memcpy(&value, &half, 2);
    } else {
      memcpy(&value, words + i * sizeof(T) / 4, sizeof(T));
    }
    return value;
  }
  MASKED_SOFTMAX_DEVICE void set_elem(int i, T value) {
    if constexpr (sizeof(T) == 2) {
      uint16_t half;
      memcpy(&half, &value, 2);
      const int shift = i % 2 * 16;
      words[i / 2] = (words[i / 2] & ~(0xffffu << shift)) | uint32_t{half} << shift;
    } else {
      memcpy(words + i * sizeof(T) / 4, &value, sizeof(T));
    }
  }
};

// Elements between the last multiple of a vector's size and p.
template <int kElems, class T>
MASKED_SOFTMAX_DEVICE int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kElems);
}

// The vector that begins `skipped` elements into low:high; 0 <= skipped < kElems.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE Vector<T, kElems> join(const Vector<T, kElems>& low, const Vector<T, kElems>& high, int skipped) {
  constexpr int kWords = Vector<T, kElems>::kWords;
  const unsigned skipped_bytes = static_cast<unsigned>(skipped) * sizeof(T);
  uint32_t words[2 * kWords];
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kWords; ++i) {
    words[i] = low.words[i];
    words[kWords + i] = high.words[i];
  }
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
  Vector<T, kElems> joined;
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kWords; ++i) {
    joined.words[i] = sizeof(T) < 4 ? funnel_shift_right(words[i], words[i + 1], skipped_bytes % 4 * 8) : words[i];
  }
  return joined;
}

// Stores elements [from, to) of a vector one by one.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE void store_elems(T* p, const Vector<T, kElems>& vector, int from, int to) {
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    if (from <= i && i < to) {
      in_device_memory(p)[i] = vector.elem(i);
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

// Elements of which the whole pieces of 16 bytes are in shared memory, and the others, in each thread, in a vector.
template <class T>
struct StagedElems {
  static constexpr int kElems = 16 / sizeof(T);

  // How many of `count` elements are in whole pieces; none for a negative count.
  MASKED_SOFTMAX_DEVICE static int whole(int count) { return count > 0 ? count & ~(kElems - 1) : 0; }

  const T* elems;
  Vector<T, kElems> tail;
};

// A thread's loads from the `count` elements that begin at `first`. Elements from `count` on are `absent`. A negative
// count is that of an empty row.
template <class T, int kElems, int kVectors, bool kIsAligned>
class VectorLoads {
 public:
  using VectorType = Vector<T, kElems>;

  MASKED_SOFTMAX_DEVICE void begin_loads(const T* first, int count, const VectorShare& share, T absent) {
    skipped_ = kIsAligned ? 0 : misalignment<kElems>(first);
    first_access_ = computed_once(in_device_memory(first) - skipped_);
    end_ = count > 0 ? count + skipped_ : 0;
    share_ = share;
    absent_ = absent;
    if constexpr (kIsAligned) {
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        vectors_[k] = load_whole(k * share_.stride);
      }
    }
  }

  MASKED_SOFTMAX_DEVICE void finish_loads() {
    const int tail = end_ % kElems;
    const bool has_head = skipped_ > 0 && end_ > 0;
    const bool has_tail = tail != 0 && !(has_head && end_ < kElems);
    const int tail_begin = end_ - tail;
    if constexpr (kIsAligned) {
      if (has_tail) {
        const auto vector = load_tail(first_access_ + tail_begin, tail);
        MASKED_SOFTMAX_UNROLL
        for (int k = 0; k < kVectors; ++k) {
          vectors_[k] = begin(k) == tail_begin ? vector : vectors_[k];
        }
      }
    } else {
      auto head_vector = VectorType::filled(absent_);
      auto tail_vector = head_vector;
      if (has_tail) {
        tail_vector = load_tail(first_access_ + tail_begin, tail);
      }
      if (has_head) {
        MASKED_SOFTMAX_UNROLL
        for (int i = 0; i < kElems; ++i) {
          if (i >= skipped_ && i < end_) {
            head_vector.set_elem(i, in_device_memory(first_access_)[i]);
          }
        }
      }
      // The vector that begins there, whether or not an access reads it as a whole.
      const auto load = [&](int offset) MASKED_SOFTMAX_DEVICE_LAMBDA {
        const auto vector = load_whole(offset);
        const int access = share_.begin + offset;
        return has_tail && access == tail_begin ? tail_vector : has_head && access == 0 ? head_vector : vector;
      };
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        vectors_[k] = load(k * share_.stride);
        if (skipped_ > 0) {
          vectors_[k] = join(vectors_[k], load(k * share_.stride + kElems), skipped_);
        }
      }
    }
  }

  // Instead of begin_loads() and finish_loads(): takes the elements from shared memory.
  MASKED_SOFTMAX_DEVICE void take_staged(const StagedElems<T>& staged, int count, const VectorShare& share, T absent) {
    static_assert(kIsAligned, "elements in shared memory begin at a multiple of 16 bytes");
    const auto otherwise = VectorType::filled(absent);
    const int whole = StagedElems<T>::whole(count);
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int begin = share.begin + k * share.stride;
      vectors_[k] = load_shared_vector_if(begin < whole, staged.elems + begin, otherwise);
    }
    if (whole < count) {
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        const int begin = share.begin + k * share.stride;
        MASKED_SOFTMAX_UNROLL
        for (int part = 0; part < StagedElems<T>::kElems / kElems; ++part) {
          if (begin == whole + part * kElems) {
            MASKED_SOFTMAX_UNROLL
            for (int word = 0; word < VectorType::kWords; ++word) {
              vectors_[k].words[word] = staged.tail.words[part * VectorType::kWords + word];
            }
          }
        }
      }
    }
  }

  MASKED_SOFTMAX_DEVICE const VectorType& vector(int k) const { return vectors_[k]; }

 private:
  // Offsets are in elements from first_access_. Vector k's first access begins at:
  MASKED_SOFTMAX_DEVICE int begin(int k) const { return share_.begin + k * share_.stride; }
  // The access `offset` elements behind the thread's first one, if it reads nothing but elements.
  MASKED_SOFTMAX_DEVICE VectorType load_whole(int offset) const {
    const int begin = share_.begin + offset;
    const bool is_whole = (kIsAligned || begin >= skipped_) && begin + kElems <= end_;
    return load_vector_if(is_whole, first_access_ + share_.begin + offset, VectorType::filled(absent_));
  }

  // The `count` elements at p, fewer than a vector has, in one access for each power of two.
  MASKED_SOFTMAX_DEVICE VectorType load_tail(const T* p, int count) const {
    constexpr int kWords = VectorType::kWords;
    const auto absent = VectorType::filled(absent_);
    const int bytes = count * static_cast<int>(sizeof(T));
    const char* const memory = reinterpret_cast<const char*>(in_device_memory(p));
    uint32_t last = absent.words[0];
    if (sizeof(T) == 2 && (bytes & 2) != 0) {
      last = (last & 0xffff0000u) | *reinterpret_cast<const uint16_t*>(memory + (bytes & 12));
    }
    VectorType vector = absent;
    vector.words[0] = last;
    if ((bytes & 4) != 0) {
      vector.words[0] = *reinterpret_cast<const uint32_t*>(memory + (bytes & 8));
      vector.words[1] = last;
    }
    if constexpr (kWords == 4) {
      if ((bytes & 8) != 0) {
        vector.words[2] = vector.words[0];
        vector.words[3] = vector.words[1];
        vector.words[0] = reinterpret_cast<const uint32_t*>(memory)[0];
        vector.words[1] = reinterpret_cast<const uint32_t*>(memory)[1];
      }
    }
    return vector;
  }

  const T* first_access_;
  int skipped_;  // elements of the first access before the first one
  int end_;
  VectorShare share_;
  T absent_;
  VectorType vectors_[kVectors];
};

// The vector of the previous lane.
template <class T, int kElems>
MASKED_SOFTMAX_DEVICE Vector<T, kElems> previous_vector(const Vector<T, kElems>& vector) {
  Vector<T, kElems> previous;
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < previous.kWords; ++i) {
    previous.words[i] = shuffle_up(vector.words[i], 1);
  }
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
  const auto vector = Vector<T, kElems>::filled(value);
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
