// Draws choices from a fuzzer's input, one after another. Behind its end they are 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fuzz {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : next_(data), left_(size) {}

  template <class T>
  T bits() {
    unsigned char taken[sizeof(T)] = {};
    for (size_t i = 0; i < sizeof(T) && left_ > 0; ++i, --left_) {
      taken[i] = *next_++;
    }
    T value;
    std::memcpy(&value, taken, sizeof(T));
    return value;
  }

  bool flag() { return (bits<uint8_t>() & 1) != 0; }

  // From 0 to largest.
  int64_t up_to(int64_t largest) {
    const uint64_t bits_taken = largest < 256 ? bits<uint8_t>() : bits<uint16_t>();
    return static_cast<int64_t>(bits_taken % (static_cast<uint64_t>(largest) + 1));
  }

  template <class T, size_t kCount>
  T one_of(const T (&options)[kCount]) {
    return options[up_to(kCount - 1)];
  }

 private:
  const uint8_t* next_;
  size_t left_;
};

}  // namespace fuzz
