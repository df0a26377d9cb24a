// Every operator, for every device: check, allocate, compute. Derivatives call the saved result of the forward pass
// `output`, and the tensor that they return `result`. A Device says how it allocates and computes:
//
//   // Contiguous, whatever the strides of `like`.
//   static at::Tensor empty(const at::Tensor& like, at::ScalarType dtype, const CallArguments&);
//   static void compute(Operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
//                       const CallArguments&);
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include <tuple>

#include "binding/checks.h"
#include "binding/operators.h"

namespace masked_softmax {

template <class Device>
struct DeviceOps {
  template <Operation kOperation>
  static at::Tensor forward(const at::Tensor& input, const RowArguments& rows, OptionalDouble padding_value,
                            OptionalType dtype, bool validate, OptionalSymInt packed) {
    const CallArguments arguments{rows, name_of(kOperation, packed), packed, validate, padding_value};
    const at::ScalarType type = result_dtype(input.scalar_type(), dtype, arguments);
    check_row_arguments(input, arguments);
    at::Tensor output = Device::empty(input, type, arguments);
    Device::compute(kOperation, output, {&input}, arguments);
    return output;
  }

  template <Operation kOperation>
  static std::tuple<at::Tensor, at::Tensor> forward_with_sink(const at::Tensor& input, const at::Tensor& sink,
                                                              const RowArguments& rows, OptionalDouble padding_value,
                                                              OptionalType dtype, bool validate,
                                                              OptionalSymInt packed) {
    CallArguments arguments{rows, name_of(kOperation, packed), packed, validate, padding_value, &sink};
    const at::ScalarType type = result_dtype(input.scalar_type(), dtype, arguments);
    check_row_arguments(input, arguments);
    check_row_input("sink", input, arguments);
    at::Tensor output = Device::empty(input, type, arguments);
    at::Tensor sink_weight = empty_rows(input, c10::promoteTypes(type, at::kFloat), arguments);
    arguments.row_result = &sink_weight;
    Device::compute(kOperation, output, {&input}, arguments);
    return {output, sink_weight};
  }

  template <Operation kOperation>
  static void forward_out(const at::Tensor& input, const RowArguments& rows, const OptionalTensor& sink,
                          OptionalDouble padding_value, OptionalType dtype, bool validate, at::Tensor& out) {
    compute_into(kOperation, out, input, dtype,
                 {rows, info_of(kOperation).name, std::nullopt, validate, padding_value, pointer_to(sink)});
  }

  static void softmax_in_place(at::Tensor& input, const RowArguments& rows, bool validate) {
    compute_in_place(input, {rows, SoftmaxInPlaceOperator::kName, std::nullopt, validate});
  }

  static void softmax_with_sink_in_place(at::Tensor& input, const at::Tensor& sink, const OptionalTensor& sink_weight,
                                         const RowArguments& rows, bool validate) {
    CallArguments arguments{rows, SoftmaxInPlaceOperator::kName, std::nullopt, validate, std::nullopt, &sink};
    at::Tensor weight;
    if (sink_weight.has_value()) {
      weight = empty_rows(input, sink_weight->scalar_type(), arguments);
      check_sink_weight(*sink_weight, weight, input, arguments);
      arguments.row_result = &weight;
    }
    compute_in_place(input, arguments);
    if (sink_weight.has_value()) {
      sink_weight->copy_(weight);
      if (!sink_weight->is_inference()) {
        sink_weight->unsafeGetTensorImpl()->bump_version();  // copy_() below autograd does not
      }
    }
  }

  template <Operation kOperation>
  static at::Tensor reduction(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                              OptionalSymInt packed) {
    const CallArguments arguments{rows, info_of(kOperation).name, packed, validate};
    const at::ScalarType type = result_dtype(input.scalar_type(), dtype, arguments);
    check_row_arguments(input, arguments);
    at::Tensor result = empty_rows(input, type, arguments);
    Device::compute(kOperation, result, {&input}, arguments);
    return result;
  }

  // The kernel's logsumexp, in the accumulation type, to which the sink is added: one number a row.
  static at::Tensor logsumexp_with_sink(const at::Tensor& input, const at::Tensor& sink, const RowArguments& rows,
                                        OptionalType dtype, bool validate, OptionalSymInt packed) {
    CallArguments arguments{rows, info_of(Operation::kLogSumExp).name, packed, validate, std::nullopt, &sink};
    const at::ScalarType type = result_dtype(input.scalar_type(), dtype, arguments);
    check_row_arguments(input, arguments);
    check_row_input("sink", input, arguments);
    arguments.row_input = nullptr;  // not the kernel's
    const at::ScalarType acc_type = c10::promoteTypes(type, at::kFloat);
    at::Tensor result = empty_rows(input, acc_type, arguments);
    Device::compute(Operation::kLogSumExp, result, {&input}, arguments);
    return at::logaddexp(result, align_to_rows(sink, result.dim()).to(acc_type)).to(type);
  }

  static at::Tensor row_dot(const at::Tensor& a, const at::Tensor& b, const RowArguments& rows, OptionalSymInt packed) {
    const CallArguments arguments{rows, info_of(Operation::kRowDot).name, packed, /*validate=*/false};
    check_floating("b", b.scalar_type(), arguments);
    check_row_arguments(b, arguments);
    check_like_output("a", a, b, arguments);
    at::Tensor result = empty_rows(b, c10::promoteTypes(b.scalar_type(), at::kFloat), arguments);
    Device::compute(Operation::kRowDot, result, {&a, &b}, arguments);
    return result;
  }

  static at::Tensor row_scale(const at::Tensor& a, const at::Tensor& factor, const RowArguments& rows,
                              OptionalSymInt packed) {
    const CallArguments arguments{rows,   info_of(Operation::kRowScale).name, packed, /*validate=*/false, std::nullopt,
                                  &factor};
    check_floating("a", a.scalar_type(), arguments);
    check_row_arguments(a, arguments);
    check_row_input("factor", a, arguments);
    at::Tensor result = Device::empty(a, a.scalar_type(), arguments);
    Device::compute(Operation::kRowScale, result, {&a}, arguments);
    return result;
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
        library.impl(kInfo.sink_name, ForwardWithSink::kernel<forward_with_sink<kOperation>>);
        library.impl(full_name(OutOperator<kOperation>()).c_str(), ForwardOut::kernel<forward_out<kOperation>>);
      } else if constexpr (kInfo.signature == Signature::kBackward) {
        library.impl(kInfo.name, Backward::kernel<backward<kOperation>>);
      } else if constexpr (kInfo.signature == Signature::kJvp) {
        library.impl(kInfo.name, Jvp::kernel<jvp<kOperation>>);
      } else if constexpr (kInfo.signature == Signature::kReduction) {
        library.impl(kInfo.name, Reduction::kernel<reduction<kOperation>>);
        library.impl(kInfo.sink_name, ReductionWithSink::kernel<logsumexp_with_sink>);
      } else if constexpr (kInfo.signature == Signature::kRowDot) {
        library.impl(kInfo.name, RowDot::kernel<row_dot>);
      } else if constexpr (kInfo.signature == Signature::kRowScale) {
        library.impl(kInfo.name, RowScale::kernel<row_scale>);
      } else {
        static_assert(kInfo.signature == Signature::kSecondOrder);
        library.impl(kInfo.name, SecondOrder::kernel<second_order<kOperation>>);
      }
    });
    library.impl(SoftmaxInPlaceOperator::kName, InPlace::kernel<softmax_in_place>);
    library.impl(SinkInPlaceOperator::kName, InPlaceWithSink::kernel<softmax_with_sink_in_place>);
  }

 private:
  static const char* name_of(Operation operation, const OptionalSymInt& packed) {
    return packed.has_value() ? info_of(operation).packed_name : info_of(operation).name;
  }

  static const at::Tensor* pointer_to(const OptionalTensor& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

  static at::Tensor empty_rows(const at::Tensor& input, at::ScalarType dtype, const CallArguments& arguments) {
    return at::empty_symint(row_shape(input, arguments), input.options().dtype(dtype));
  }

  struct NamedTensor {
    const char* name;
    const at::Tensor* tensor;
  };

  static void compute_into(Operation operation, at::Tensor& output, const at::Tensor& input, OptionalType dtype,
                           const CallArguments& arguments) {
    const at::ScalarType type = result_dtype(input.scalar_type(), dtype, arguments);
    check_row_arguments(input, arguments);
    if (arguments.row_input != nullptr) {
      check_row_input("sink", input, arguments);
    }
    check_output(output, input, type, arguments);
    Device::compute(operation, output, {&input}, arguments);
  }

  static void compute_in_place(at::Tensor& input, const CallArguments& arguments) {
    check_floating("input", input.scalar_type(), arguments);
    compute_into(Operation::kSoftmax, input, input, std::nullopt, arguments);
  }

  template <Operation kOperation>
  static at::Tensor derivative(std::initializer_list<NamedTensor> gradients, const at::Tensor& output,
                               const RowArguments& rows, at::ScalarType dtype, OptionalSymInt packed) {
    const CallArguments arguments{rows, info_of(kOperation).name, packed, /*validate=*/false};
    check_floating("output", output.scalar_type(), arguments);
    const at::ScalarType type = result_dtype(output.scalar_type(), dtype, arguments);
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
