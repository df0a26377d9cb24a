// Under autocast the result has the type that torch.softmax has there, unless dtype says otherwise: float32 on CUDA.
// The kernel itself converts; nothing is cast before it. On the CPU, torch's autocast leaves softmax and log_softmax
// alone, so the operators have no kernel for it: the result has the input's type.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

template <Operation kOperation>
at::Tensor forward(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                   OptionalSymInt packed) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{c10::DispatchKey::AutocastCUDA});
  const bool is_16bit = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  if (!dtype.has_value() && is_16bit) {
    dtype = at::kFloat;
  }
  return call<kOperation>(input, rows, dtype, validate, packed);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, AutocastCUDA, m) {
  for_each_operation([&](auto operation) {
    if constexpr (is_forward(operation.value)) {
      m.impl(info_of(operation.value).name, Forward::kernel<forward<operation.value>>);
    }
  });
}

}  // namespace masked_softmax
