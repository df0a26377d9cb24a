// Element types, and their conversion to and from the accumulation type, which sums and exponentials run in.
//
// float16 and bfloat16 are carried as their bits: this layer compiles with any C++17 compiler, for any processor and
// under sanitizers, without a framework's half types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/inline.h"

namespace masked_softmax {

enum class ElementType : uint8_t {
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) k##Name,
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
};

enum class ElementKind : uint8_t { kFloating, kInteger, kBool };

struct bfloat16_t {
  uint16_t bits;
};

struct float16_t {
  uint16_t bits;
};

// A bool in memory: any byte but 0 is true. Reading a byte other than 0 and 1 as a C++ bool is undefined behaviour, and
// a tensor may be a view of such bytes.
struct bool8_t {
  uint8_t byte;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// One element in memory at any address: tensors that wrap other libraries' memory may be unaligned. A packed struct
// keeps the element's type visible to alias analysis; memcpy would force the compiler to reload unrelated values.
template <class T>
struct __attribute__((packed)) Unaligned {
  T value;
};

template <class T>
inline T read_element(const T* p) {
  return reinterpret_cast<const Unaligned<T>*>(p)->value;
}
template <class T>
inline void write_element(T* p, T value) {
  reinterpret_cast<Unaligned<T>*>(p)->value = value;
}

inline float bfloat16_to_float(bfloat16_t value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

// To nearest, ties to even. Every NaN becomes the same one, as it does where vectors convert.
inline bfloat16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {0x7fc0};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline float float16_to_float(float16_t value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN: the exponent becomes all ones, the payload moves up
    return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x03ffu) << 13);
  }
  if (magnitude < 0x0400u) {  // subnormal: an integer multiple of 2^-24
    const float scaled = static_cast<float>(magnitude) * 0x1p-24f;
    return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
  }
  return bit_cast<float>(sign | ((magnitude << 13) + (uint32_t{127 - 15} << 23)));
}

// To nearest, ties to even; overflow gives infinity, results below 2^-14 are subnormal.
inline float16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x03ffu))};
  }
  if (magnitude >= 0x477ff000u) {  // 65520, the first value that rounds to infinity
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24, rounded by the addition
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (uint32_t{127 - 15} << 23)) >> 13))};
}

// One element to the accumulation type and back. The vector types convert whole registers themselves.
template <class acc_t, class T>
inline acc_t to_acc(T value) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return bfloat16_to_float(value);
  } else if constexpr (std::is_same_v<T, float16_t>) {
    return float16_to_float(value);
  } else if constexpr (std::is_same_v<T, bool8_t>) {
    return value.byte != 0 ? acc_t{1} : acc_t{0};
  } else {
    static_assert(std::is_arithmetic_v<T>, "an element type without a conversion");
    return static_cast<acc_t>(value);
  }
}

// double -> 16 bits rounds once, not twice: the double is first rounded to odd at float's precision, which leaves
// the decision of the second rounding intact (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums",
// IEEE Transactions on Computers, 2008).
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value ||
      !(std::fabs(value) <= static_cast<double>(std::numeric_limits<float>::max()))) {
    return nearest;
  }
  uint32_t bits = bit_cast<uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) {
    bits -= 1;  // towards zero
  }
  return bit_cast<float>(bits | 1u);
}

template <class T, class acc_t>
inline T from_acc(acc_t value) {
  if constexpr (std::is_same_v<T, bfloat16_t> || std::is_same_v<T, float16_t>) {
    float narrowed;
    if constexpr (std::is_same_v<acc_t, double>) {
      narrowed = round_to_odd(value);
    } else {
      narrowed = value;
    }
    if constexpr (std::is_same_v<T, bfloat16_t>) {
      return float_to_bfloat16(narrowed);
    } else {
      return float_to_float16(narrowed);
    }
  } else if constexpr (std::is_same_v<T, bool8_t>) {
    return {static_cast<uint8_t>(value != 0)};
  } else {
    static_assert(std::is_arithmetic_v<T>, "an element type without a conversion");
    return static_cast<T>(value);
  }
}

// What the table says about a type in memory.
template <class T>
struct ElementTraits;
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) \
  template <>                                                         \
  struct ElementTraits<type_t> {                                      \
    static constexpr ElementType kType = ElementType::k##Name;        \
    static constexpr ElementKind kKind = ElementKind::kind;           \
  };
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE

// Calls visit(T{}) with the C++ type of `type`, and returns what it returns.
template <class Visitor>
MASKED_SOFTMAX_HOST_DEVICE auto visit_element_type(ElementType type, const Visitor& visit) {
  switch (type) {
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) \
  case ElementType::k##Name: return visit(type_t{});
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
  }
  __builtin_unreachable();  // every enumerator has a case
}

// The same for types of one kind only. Precondition: `type` is of that kind.
template <ElementKind kKind, class Visitor>
MASKED_SOFTMAX_HOST_DEVICE void visit_element_type_of(ElementType type, const Visitor& visit) {
  visit_element_type(type, [&](auto element) {
    if constexpr (ElementTraits<decltype(element)>::kKind == kKind) {
      visit(element);
    }
  });
}

constexpr const char* element_type_name(ElementType type) {
  switch (type) {
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) \
  case ElementType::k##Name: return #name;
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
  }
  return "";
}

inline int64_t size_bytes(ElementType type) {
  return visit_element_type(type, [](auto element) { return static_cast<int64_t>(sizeof(element)); });
}

}  // namespace masked_softmax
