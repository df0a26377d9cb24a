// Under autocast the result has the type that torch.softmax has there, unless dtype says otherwise: float32 on CUDA.
// The kernel itself converts; nothing is cast before it. On the CPU, torch's autocast leaves softmax and log_softmax
// alone, so the operators have no kernel for it: the result has the input's type.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

constexpr c10::DispatchKeySet kAutocast{c10::DispatchKey::AutocastCUDA};

OptionalType autocast_type(const at::Tensor& input, OptionalType dtype) {
  const bool is_16bit = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  return !dtype.has_value() && is_16bit ? at::kFloat : dtype;
}

template <Operation kOperation>
at::Tensor autocast_forward(const at::Tensor& input, const RowArguments& rows, OptionalDouble padding_value,
                            OptionalType dtype, bool validate, OptionalSymInt packed) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  return call<kOperation>(input, rows, padding_value, autocast_type(input, dtype), validate, packed);
}

template <Operation kOperation>
std::tuple<at::Tensor, at::Tensor> autocast_forward_with_sink(const at::Tensor& input, const at::Tensor& sink,
                                                              const RowArguments& rows, OptionalDouble padding_value,
                                                              OptionalType dtype, bool validate,
                                                              OptionalSymInt packed) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  return call_with_sink<kOperation>(input, sink, rows, padding_value, autocast_type(input, dtype), validate, packed);
}

template <Operation kOperation>
at::Tensor autocast_reduction(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                              OptionalSymInt packed) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  return call<kOperation>(input, rows, autocast_type(input, dtype), validate, packed);
}

at::Tensor autocast_reduction_with_sink(const at::Tensor& input, const at::Tensor& sink, const RowArguments& rows,
                                        OptionalType dtype, bool validate, OptionalSymInt packed) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  return call_with_sink<Operation::kLogSumExp>(input, sink, rows, autocast_type(input, dtype), validate, packed);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, AutocastCUDA, m) {
  for_each_operation([&](auto operation) {
    constexpr OperationInfo kInfo = info_of(operation.value);
    if constexpr (kInfo.signature == Signature::kForward) {
      m.impl(kInfo.name, Forward::kernel<autocast_forward<operation.value>>);
      m.impl(kInfo.sink_name, ForwardWithSink::kernel<autocast_forward_with_sink<operation.value>>);
    } else if constexpr (kInfo.signature == Signature::kReduction) {
      m.impl(kInfo.name, Reduction::kernel<autocast_reduction<operation.value>>);
      m.impl(kInfo.sink_name, ReductionWithSink::kernel<autocast_reduction_with_sink>);
    }
  });
}

}  // namespace masked_softmax
