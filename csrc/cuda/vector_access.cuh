// Contiguous elements in units of 16 bytes, wherever they begin.
//
// A chunk is as many elements as 16 bytes hold, counted from the first one (not from an aligned address): chunk c of
// `count` elements is [c * kElems, c * kElems + kElems). Which thread has which element then depends on nothing but the
// element's number, and neither does the order in which a row is summed. Where the first element is aligned, a chunk is
// one 16-byte access. Where it is not, a chunk is put together from the two aligned vectors that it lies across:
//
//   address      |.......16.......|.......16.......|.......16.......|
//   elements           |- chunk 0 -----|- chunk 1 -----|- chunk 2
//
// A load reads both (its neighbour reads one of them too: from cache). For a store, the lane before gives its part of
// the vector by a shuffle. The vectors at the ends, which other memory shares, go element by element: no byte outside
// of the elements is read or written.
#pragma once

#include "cuda/device.cuh"

namespace masked_softmax {
namespace cuda {

template <class T>
struct Chunk {
  static constexpr int kElems = 16 / sizeof(T);
  T elems[kElems];
};

// How many elements lie between the last multiple of 16 bytes and p.
template <class T>
MASKED_SOFTMAX_DEVICE int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// The 16 bytes that begin `skipped` bytes into low:high; 0 <= skipped < 16.
MASKED_SOFTMAX_DEVICE Vector16 join(const Vector16& low, const Vector16& high, unsigned skipped) {
  uint32_t words[8];
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < 4; ++i) {
    words[i] = low.words[i];
    words[4 + i] = high.words[i];
  }
  // By 8, 4 and fewer bytes: indices stay constants, so the words stay in registers.
  if (skipped & 8) {
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < 6; ++i) {
      words[i] = words[i + 2];
    }
  }
  if (skipped & 4) {
    MASKED_SOFTMAX_UNROLL
    for (int i = 0; i < 5; ++i) {
      words[i] = words[i + 1];
    }
  }
  Vector16 joined;
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < 4; ++i) {
    joined.words[i] = funnel_shift_right(words[i], words[i + 1], skipped % 4 * 8);
  }
  return joined;
}

template <class T>
MASKED_SOFTMAX_DEVICE Chunk<T> chunk_of(const Vector16& v) {
  Chunk<T> chunk;
  memcpy(&chunk, &v, 16);
  return chunk;
}
template <class T>
MASKED_SOFTMAX_DEVICE Vector16 vector_of(const Chunk<T>& chunk) {
  Vector16 v;
  memcpy(&v, &chunk, 16);
  return v;
}

// Chunk number `index` of the `count` elements from `first` on; elements from `count` on are zeros.
template <class T>
MASKED_SOFTMAX_DEVICE Chunk<T> load_chunk(const T* first, int64_t count, int64_t index) {
  constexpr int kElems = Chunk<T>::kElems;
  const int64_t begin = index * kElems;
  const int skipped = misalignment(first);
  // Of the two aligned vectors, the first begins before the chunk and the second ends behind it.
  const bool is_inside = begin >= skipped && begin - skipped + (skipped > 0 ? 2 : 1) * kElems <= count;
  if (is_inside) {
    const T* aligned = first + begin - skipped;
    const Vector16 low = load16(aligned);
    if (skipped == 0) {
      return chunk_of<T>(low);
    }
    return chunk_of<T>(join(low, load16(aligned + kElems), static_cast<unsigned>(skipped * sizeof(T))));
  }
  Chunk<T> chunk = {};
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    if (begin + i < count) {
      chunk.elems[i] = first[begin + i];
    }
  }
  return chunk;
}

// Elements [from, to) of a chunk, one by one.
template <class T>
MASKED_SOFTMAX_DEVICE void store_elems(T* to_memory, const Chunk<T>& chunk, int64_t from, int64_t to) {
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < Chunk<T>::kElems; ++i) {
    if (from <= i && i < to) {
      to_memory[i] = chunk.elems[i];
    }
  }
}

// Stores chunk number `index` of the `count` elements from `first` on, where those are aligned.
template <class T>
MASKED_SOFTMAX_DEVICE void store_chunk(T* first, int64_t count, int64_t index, const Chunk<T>& chunk) {
  constexpr int kElems = Chunk<T>::kElems;
  T* to = first + index * kElems;
  const int64_t rest = count - index * kElems;
  if (rest >= kElems) {
    store16(to, vector_of(chunk));
  } else {
    store_elems(to, chunk, 0, rest);
  }
}

// The same wherever they begin. Lanes of a group of `width` call together, each with the chunk behind its neighbour's,
// and `previous` is the neighbour's (what the first lane gets does not matter).
template <class T>
MASKED_SOFTMAX_DEVICE void store_chunk_anywhere(T* first, int64_t count, int64_t index, const Chunk<T>& chunk,
                                                const Chunk<T>& previous, bool is_first_lane, bool is_last_lane) {
  constexpr int kElems = Chunk<T>::kElems;
  const int skipped = misalignment(first);
  if (skipped == 0) {
    store_chunk(first, count, index, chunk);
    return;
  }
  // The aligned vector that begins within the previous chunk and ends within this one.
  const int64_t begin = index * kElems;
  T* const aligned = first + begin - skipped;
  if (is_first_lane || begin - skipped + kElems > count) {
    if (!is_first_lane) {
      store_elems(first + begin - kElems, previous, kElems - skipped, count - (begin - kElems));
    }
    store_elems(first + begin, chunk, 0, count - begin < kElems - skipped ? count - begin : kElems - skipped);
  } else {
    store16(aligned,
            join(vector_of(previous), vector_of(chunk), static_cast<unsigned>((kElems - skipped) * sizeof(T))));
  }
  if (is_last_lane) {  // what no lane behind takes along
    store_elems(first + begin, chunk, kElems - skipped, count - begin);
  }
}

// The chunk of the lane before in a group of `width` lanes.
template <class T>
MASKED_SOFTMAX_DEVICE Chunk<T> chunk_before(const Chunk<T>& chunk, unsigned width) {
  Vector16 v = vector_of(chunk);
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < 4; ++i) {
    v.words[i] = shuffle_up(v.words[i], 1, width);
  }
  return chunk_of<T>(v);
}

// Sets the columns [begin, end) of a row: thread `thread` of `threads`, all of them together.
template <class T>
MASKED_SOFTMAX_DEVICE void fill_columns(T* row, int64_t begin, int64_t end, T value, int64_t thread, int64_t threads) {
  constexpr int kElems = Chunk<T>::kElems;
  if (begin >= end) {
    return;
  }
  Chunk<T> filling;
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    filling.elems[i] = value;
  }
  const int skipped = misalignment(row + begin);
  for (int64_t at = begin - skipped + thread * kElems; at < end; at += threads * kElems) {
    if (at >= begin && at + kElems <= end) {
      store16(row + at, vector_of(filling));
    } else {
      store_elems(row + at, filling, begin - at, end - at);
    }
  }
}

}  // namespace cuda
}  // namespace masked_softmax
