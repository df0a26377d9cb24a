// Contiguous elements in packets of 16 bytes, wherever they begin.
//
// A packet is of one operand. A vector (held_rows.cuh) has the same columns in every operand: one packet of the
// narrowest operand, several of a wider one.
//
// A packet is as many elements as 16 bytes hold, counted from the first element, not from an aligned address: packet p
// of `count` elements is [p * kElems, p * kElems + kElems). So the thread that holds an element depends on the
// element's number alone, and with it the order of a row's sums. If the first element is aligned, a packet is one
// 16-byte access. Otherwise it is joined from the two aligned accesses that it straddles:
//
//   address      |.......16.......|.......16.......|.......16.......|
//   elements           |- packet 0 ----|- packet 1 ----|- packet 2
//
// A load reads both; the neighbouring lane reads one of them too, from cache. For a store, the previous lane passes its
// part by a shuffle. Accesses at the ends, which reach into other memory, go element by element: no byte outside of the
// elements is read or written.
#pragma once

#include "cuda/device.cuh"

namespace masked_softmax::cuda {

template <class T>
struct Packet {
  static constexpr int kElems = 16 / sizeof(T);
  T elems[kElems];
};

// Elements between the last multiple of 16 bytes and p.
template <class T>
MASKED_SOFTMAX_DEVICE int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// The packet that begins `skipped` bytes into low:high; 0 <= skipped < 16.
template <class T>
MASKED_SOFTMAX_DEVICE Packet<T> join(const Packet<T>& low, const Packet<T>& high, unsigned skipped) {
  uint32_t words[8];
  memcpy(words, &low, 16);
  memcpy(words + 4, &high, 16);
  // By 8, by 4 and by fewer bytes: all indices are constants, so the words stay in registers.
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
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < 4; ++i) {
    words[i] = funnel_shift_right(words[i], words[i + 1], skipped % 4 * 8);
  }
  Packet<T> joined;
  memcpy(&joined, words, 16);
  return joined;
}

// Loads packet `index` of the `count` elements from `first` on; elements from `count` on are zeros.
template <class T>
MASKED_SOFTMAX_DEVICE Packet<T> load_packet(const T* first, int64_t count, int64_t index) {
  constexpr int kElems = Packet<T>::kElems;
  const int64_t begin = index * kElems;
  const int skipped = misalignment(first);
  const bool is_inside = begin >= skipped && begin - skipped + (skipped > 0 ? 2 : 1) * kElems <= count;
  if (is_inside) {
    const T* aligned = first + begin - skipped;
    const auto low = load16<Packet<T>>(aligned);
    if (skipped == 0) {
      return low;
    }
    return join(low, load16<Packet<T>>(aligned + kElems), static_cast<unsigned>(skipped * sizeof(T)));
  }
  Packet<T> packet = {};
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    if (begin + i < count) {
      packet.elems[i] = first[begin + i];
    }
  }
  return packet;
}

// Stores elements [from, to) of a packet one by one.
template <class T>
MASKED_SOFTMAX_DEVICE void store_elems(T* p, const Packet<T>& packet, int64_t from, int64_t to) {
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < Packet<T>::kElems; ++i) {
    if (from <= i && i < to) {
      p[i] = packet.elems[i];
    }
  }
}

// Stores packet `index` of the `count` elements from `first` on. Precondition: `first` is aligned.
template <class T>
MASKED_SOFTMAX_DEVICE void store_aligned_packet(T* first, int64_t count, int64_t index, const Packet<T>& packet) {
  constexpr int kElems = Packet<T>::kElems;
  T* to = first + index * kElems;
  const int64_t rest = count - index * kElems;
  if (rest >= kElems) {
    store16(to, packet);
  } else {
    store_elems(to, packet, 0, rest);
  }
}

// The same at any address. Lanes of a group call together, each with the packet after the previous lane's. `previous`
// is that one; the first lane's is not used.
template <class T>
MASKED_SOFTMAX_DEVICE void store_packet(T* first, int64_t count, int64_t index, const Packet<T>& packet,
                                        const Packet<T>& previous, bool is_first_lane, bool is_last_lane) {
  constexpr int kElems = Packet<T>::kElems;
  const int skipped = misalignment(first);
  if (skipped == 0) {
    store_aligned_packet(first, count, index, packet);
    return;
  }
  // Each lane stores the aligned access that begins within the previous packet and ends within this one:
  //
  //   access       |.......16.......|
  //   elements     - previous -|---- packet ----|
  //                            ^ first + begin, `skipped` elements into the access
  const int64_t begin = index * kElems;
  T* const aligned = first + begin - skipped;
  if (is_first_lane || begin - skipped + kElems > count) {
    if (!is_first_lane) {
      store_elems(first + begin - kElems, previous, kElems - skipped, count - (begin - kElems));
    }
    store_elems(first + begin, packet, 0, count - begin < kElems - skipped ? count - begin : kElems - skipped);
  } else {
    store16(aligned, join(previous, packet, static_cast<unsigned>((kElems - skipped) * sizeof(T))));
  }
  if (is_last_lane) {  // no next lane stores the rest
    store_elems(first + begin, packet, kElems - skipped, count - begin);
  }
}

// The packet of the previous lane in a group of `width` lanes.
template <class T>
MASKED_SOFTMAX_DEVICE Packet<T> previous_packet(const Packet<T>& packet, unsigned width) {
  uint32_t words[4];
  memcpy(words, &packet, 16);
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < 4; ++i) {
    words[i] = shuffle_up(words[i], 1, width);
  }
  Packet<T> previous;
  memcpy(&previous, words, 16);
  return previous;
}

// Sets columns [begin, end) of a row. `threads` threads call together; `thread` is this one's number.
template <class T>
MASKED_SOFTMAX_DEVICE void fill_columns(T* row, int64_t begin, int64_t end, T value, int64_t thread, int64_t threads) {
  constexpr int kElems = Packet<T>::kElems;
  if (begin >= end) {
    return;
  }
  Packet<T> packet;
  MASKED_SOFTMAX_UNROLL
  for (int i = 0; i < kElems; ++i) {
    packet.elems[i] = value;
  }
  const int skipped = misalignment(row + begin);
  for (int64_t at = begin - skipped + thread * kElems; at < end; at += threads * kElems) {
    if (at >= begin && at + kElems <= end) {
      store16(row + at, packet);
    } else {
      store_elems(row + at, packet, begin - at, end - at);
    }
  }
}

}  // namespace masked_softmax::cuda
