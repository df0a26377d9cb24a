// What a call computes: the table of operations as an enumeration, and what follows from a row of it.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/inline.h"

namespace masked_softmax {

enum class Operation : uint8_t {
#define MASKED_SOFTMAX_OPERATION(Name, name, Signature, Kernels) k##Name,
#include "common/operations.inc"
#include "common/row_operations.inc"
#undef MASKED_SOFTMAX_OPERATION
};

enum class Signature : uint8_t { kForward, kBackward, kJvp, kSecondOrder, kReduction, kRowDot, kRowScale };
enum class Kernels : uint8_t { kTuned, kGeneric };

struct OperationInfo {
  const char* name;         // of the operator
  const char* packed_name;  // of the Python function for packed rows; forward operations only
  const char* sink_name;    // of the operator with a sink; softmax, log_softmax and logsumexp only
  Signature signature;
  Kernels kernels;
};

// Those of operations.inc.
constexpr Operation kOperations[] = {
#define MASKED_SOFTMAX_OPERATION(Name, name, Signature, Kernels) Operation::k##Name,
#include "common/operations.inc"
#undef MASKED_SOFTMAX_OPERATION
};

constexpr OperationInfo info_of(Operation operation) {
  switch (operation) {
#define MASKED_SOFTMAX_OPERATION(Name, name, Signature_, Kernels_)                                    \
  case Operation::k##Name:                                                                            \
    return {"masked_" #name, "packed_" #name, "masked_" #name "_with_sink", Signature::k##Signature_, \
            Kernels::Kernels_};
#include "common/operations.inc"
#include "common/row_operations.inc"
#undef MASKED_SOFTMAX_OPERATION
  }
  return {};
}

constexpr int input_count(Signature signature) {
  switch (signature) {
    case Signature::kForward: return 1;
    case Signature::kBackward: return 2;
    case Signature::kJvp: return 2;
    case Signature::kSecondOrder: return 3;
    case Signature::kReduction: return 1;
    case Signature::kRowDot: return 2;
    case Signature::kRowScale: return 1;
  }
  return 0;
}
constexpr int input_count(Operation operation) { return input_count(info_of(operation).signature); }

// Whether it takes x, and so its exponentials; the others are derivatives, or parts of them.
constexpr bool is_forward(Signature signature) {
  return signature == Signature::kForward || signature == Signature::kReduction;
}
constexpr bool is_forward(Operation operation) { return is_forward(info_of(operation).signature); }

// Whether it returns one number a row, Problem::row_result, and no elements.
constexpr bool is_reduction(Signature signature) {
  return signature == Signature::kReduction || signature == Signature::kRowDot;
}
constexpr bool returns_or_takes_row_numbers(Signature signature) {
  return is_reduction(signature) || signature == Signature::kRowScale;
}
constexpr bool is_reduction(Operation operation) { return is_reduction(info_of(operation).signature); }

constexpr bool is_tuned(Operation operation) { return info_of(operation).kernels == Kernels::kTuned; }

// What padding holds in the result, unless the caller says otherwise. In a gradient it is 0.
constexpr double padding_value(Operation operation) {
  return operation == Operation::kLogSoftmax ? -std::numeric_limits<double>::infinity() : 0.0;
}

template <Operation kOperation>
using OperationConstant = std::integral_constant<Operation, kOperation>;

// Calls visit(OperationConstant<operation>()), and returns what it returns.
template <class Visitor>
MASKED_SOFTMAX_HOST_DEVICE auto visit_operation(Operation operation, const Visitor& visit) {
  switch (operation) {
#define MASKED_SOFTMAX_OPERATION(Name, name, Signature, Kernels) \
  case Operation::k##Name: return visit(OperationConstant<Operation::k##Name>());
#include "common/operations.inc"
#include "common/row_operations.inc"
#undef MASKED_SOFTMAX_OPERATION
  }
  __builtin_unreachable();  // every enumerator has a case
}

// Calls visit(OperationConstant<operation>()) for every operation.
template <class Visitor>
inline void for_each_operation(const Visitor& visit) {
#define MASKED_SOFTMAX_OPERATION(Name, name, Signature, Kernels) visit(OperationConstant<Operation::k##Name>());
#include "common/operations.inc"
#include "common/row_operations.inc"
#undef MASKED_SOFTMAX_OPERATION
}

}  // namespace masked_softmax
