// Every operator, for every device: check, allocate, compute. A Device says how it allocates and how it computes:
//
//   static at::Tensor empty(const at::Tensor& like, at::ScalarType dtype, const RowArguments&);
//   static void compute(Operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
//                       const RowArguments&);
#pragma once

#include <torch/library.h>

#include "binding/checks.h"
#include "binding/operators.h"

namespace masked_softmax {

template <class Device>
struct DeviceOps {
  template <Operation kOperation>
  static at::Tensor forward(const at::Tensor& input, const at::Tensor& lengths, int64_t dim,
                            const OptionalTensor& starts, OptionalScale scale, OptionalType dtype, bool validate,
                            OptionalInt packed) {
    const RowArguments arguments{
        function_name(kOperation, packed.has_value()), lengths, dim, starts, scale, packed, validate};
    const at::ScalarType type = result_dtype(arguments.name, input.scalar_type(), dtype);
    check_row_arguments(input, arguments);
    at::Tensor output = Device::empty(input, type, arguments);
    Device::compute(kOperation, output, {&input}, arguments);
    return output;
  }

  template <Operation kOperation>
  static void forward_out(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                          OptionalScale scale, OptionalType dtype, bool validate, at::Tensor& out) {
    const RowArguments arguments{function_name(kOperation), lengths, dim, starts, scale, std::nullopt, validate};
    const at::ScalarType type = result_dtype(arguments.name, input.scalar_type(), dtype);
    check_row_arguments(input, arguments);
    check_output(out, input, type, arguments);
    Device::compute(kOperation, out, {&input}, arguments);
  }

  static void softmax_in_place(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                               OptionalScale scale, bool validate) {
    const RowArguments arguments{"masked_softmax_", lengths, dim, starts, scale, std::nullopt, validate};
    const at::ScalarType type = result_dtype(arguments.name, input.scalar_type(), std::nullopt);
    check_row_arguments(input, arguments);
    check_output(input, input, type, arguments);
    Device::compute(Operation::kSoftmax, input, {&input}, arguments);
  }

  template <Operation kOperation>
  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& lengths,
                             int64_t dim, const OptionalTensor& starts, OptionalScale scale, at::ScalarType input_dtype,
                             OptionalInt packed) {
    return derivative(kOperation, {{"grad_output", &grad_output}}, output, input_dtype,
                      {function_name(kOperation), lengths, dim, starts, scale, packed});
  }

  static at::Tensor log_softmax_jvp(const at::Tensor& tangent, const at::Tensor& output, const at::Tensor& lengths,
                                    int64_t dim, const OptionalTensor& starts, OptionalScale scale,
                                    OptionalInt packed) {
    constexpr Operation kOperation = Operation::kLogSoftmaxJvp;
    return derivative(kOperation, {{"tangent", &tangent}}, output, output.scalar_type(),
                      {function_name(kOperation), lengths, dim, starts, scale, packed});
  }

  template <Operation kOperation>
  static at::Tensor second_order(const at::Tensor& tangent, const at::Tensor& grad_output, const at::Tensor& output,
                                 const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                                 OptionalScale scale, OptionalInt packed) {
    return derivative(kOperation, {{"tangent", &tangent}, {"grad_output", &grad_output}}, output, output.scalar_type(),
                      {function_name(kOperation), lengths, dim, starts, scale, packed});
  }

  static void register_all(torch::Library& library) {
    library.impl("masked_softmax", forward<Operation::kSoftmax>);
    library.impl("masked_softmax.out", forward_out<Operation::kSoftmax>);
    library.impl("masked_softmax_", softmax_in_place);
    library.impl("masked_log_softmax", forward<Operation::kLogSoftmax>);
    library.impl("masked_log_softmax.out", forward_out<Operation::kLogSoftmax>);
    library.impl("masked_softmax_backward", backward<Operation::kSoftmaxBackward>);
    library.impl("masked_log_softmax_backward", backward<Operation::kLogSoftmaxBackward>);
    library.impl("masked_log_softmax_jvp", log_softmax_jvp);
    library.impl("masked_softmax_backward_wrt_output", second_order<Operation::kSoftmaxBackwardWrtY>);
    library.impl("masked_log_softmax_backward_wrt_output", second_order<Operation::kLogSoftmaxBackwardWrtY>);
    library.impl("masked_softmax_backward_jvp_wrt_output", second_order<Operation::kSoftmaxBackwardJvpWrtY>);
    library.impl("masked_log_softmax_jvp_jvp_wrt_output", second_order<Operation::kLogSoftmaxJvpJvpWrtY>);
  }

 private:
  struct NamedTensor {
    const char* name;
    const at::Tensor* tensor;
  };

  static at::Tensor derivative(Operation operation, std::initializer_list<NamedTensor> gradients,
                               const at::Tensor& output, at::ScalarType dtype, const RowArguments& arguments) {
    const at::ScalarType type = result_dtype(arguments.name, output.scalar_type(), dtype);
    check_row_arguments(output, arguments);
    for (const NamedTensor& gradient : gradients) {
      check_like_output(gradient.name, *gradient.tensor, output, arguments);
    }
    at::Tensor result = Device::empty(output, type, arguments);
    const NamedTensor* first = gradients.begin();
    if (gradients.size() == 1) {
      Device::compute(operation, result, {first[0].tensor, &output}, arguments);
    } else {
      Device::compute(operation, result, {first[0].tensor, first[1].tensor, &output}, arguments);
    }
    return result;
  }
};

}  // namespace masked_softmax
