// Every operator, for every device: check, allocate, compute. Derivatives call the saved result of the forward pass
// `output`, and the tensor that they return `result`. A Device says how it allocates and computes:
//
//   // Contiguous, whatever the strides of `like`.
//   static at::Tensor empty(const at::Tensor& like, at::ScalarType dtype, const CallArguments&);
//   static void compute(Operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
//                       const CallArguments&);
#pragma once

#include <torch/library.h>

#include "binding/checks.h"
#include "binding/operators.h"

namespace masked_softmax {

template <class Device>
struct DeviceOps {
  template <Operation kOperation>
  static at::Tensor forward(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                            OptionalSymInt packed) {
    constexpr OperationInfo kInfo = info_of(kOperation);
    const CallArguments arguments{rows, packed.has_value() ? kInfo.packed_name : kInfo.name, packed, validate};
    const at::ScalarType type = result_dtype(arguments.name, input.scalar_type(), dtype);
    check_row_arguments(input, arguments);
    at::Tensor output = Device::empty(input, type, arguments);
    Device::compute(kOperation, output, {&input}, arguments);
    return output;
  }

  template <Operation kOperation>
  static void forward_out(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                          at::Tensor& out) {
    compute_into(kOperation, out, input, dtype, {rows, info_of(kOperation).name, std::nullopt, validate});
  }

  static void softmax_in_place(at::Tensor& input, const RowArguments& rows, bool validate) {
    compute_into(Operation::kSoftmax, input, input, std::nullopt,
                 {rows, SoftmaxInPlaceOperator::kName, std::nullopt, validate});
  }

  template <Operation kOperation>
  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, const RowArguments& rows,
                             at::ScalarType input_dtype, OptionalSymInt packed) {
    return derivative<kOperation>({{"grad_output", &grad_output}}, output, rows, input_dtype, packed);
  }

  template <Operation kOperation>
  static at::Tensor jvp(const at::Tensor& tangent, const at::Tensor& output, const RowArguments& rows,
                        OptionalSymInt packed) {
    return derivative<kOperation>({{"tangent", &tangent}}, output, rows, output.scalar_type(), packed);
  }

  template <Operation kOperation>
  static at::Tensor second_order(const at::Tensor& tangent, const at::Tensor& grad_output, const at::Tensor& output,
                                 const RowArguments& rows, OptionalSymInt packed) {
    return derivative<kOperation>({{"tangent", &tangent}, {"grad_output", &grad_output}}, output, rows,
                                  output.scalar_type(), packed);
  }

  static void register_all(torch::Library& library) {
    for_each_operation([&](auto operation) {
      constexpr Operation kOperation = operation.value;
      constexpr OperationInfo kInfo = info_of(kOperation);
      if constexpr (kInfo.signature == Signature::kForward) {
        library.impl(kInfo.name, Forward::kernel<forward<kOperation>>);
        library.impl(full_name(OutOperator<kOperation>()).c_str(), ForwardOut::kernel<forward_out<kOperation>>);
      } else if constexpr (kInfo.signature == Signature::kBackward) {
        library.impl(kInfo.name, Backward::kernel<backward<kOperation>>);
      } else if constexpr (kInfo.signature == Signature::kJvp) {
        library.impl(kInfo.name, Jvp::kernel<jvp<kOperation>>);
      } else {
        static_assert(kInfo.signature == Signature::kSecondOrder);
        library.impl(kInfo.name, SecondOrder::kernel<second_order<kOperation>>);
      }
    });
    library.impl(SoftmaxInPlaceOperator::kName, InPlace::kernel<softmax_in_place>);
  }

 private:
  struct NamedTensor {
    const char* name;
    const at::Tensor* tensor;
  };

  static void compute_into(Operation operation, at::Tensor& output, const at::Tensor& input, OptionalType dtype,
                           const CallArguments& arguments) {
    const at::ScalarType type = result_dtype(arguments.name, input.scalar_type(), dtype);
    check_row_arguments(input, arguments);
    check_output(output, input, type, arguments);
    Device::compute(operation, output, {&input}, arguments);
  }

  template <Operation kOperation>
  static at::Tensor derivative(std::initializer_list<NamedTensor> gradients, const at::Tensor& output,
                               const RowArguments& rows, at::ScalarType dtype, OptionalSymInt packed) {
    const CallArguments arguments{rows, info_of(kOperation).name, packed, /*validate=*/false};
    const at::ScalarType type = result_dtype(arguments.name, output.scalar_type(), dtype);
    check_row_arguments(output, arguments);
    for (const NamedTensor& gradient : gradients) {
      check_like_output(gradient.name, *gradient.tensor, output, arguments);
    }
    at::Tensor result = Device::empty(output, type, arguments);
    const NamedTensor* const first = gradients.begin();
    if constexpr (input_count(kOperation) == 2) {
      Device::compute(kOperation, result, {first[0].tensor, &output}, arguments);
    } else {
      Device::compute(kOperation, result, {first[0].tensor, first[1].tensor, &output}, arguments);
    }
    return result;
  }
};

}  // namespace masked_softmax
