// Under autocast the result has the type that torch.softmax has there, float32, unless dtype says otherwise. The kernel
// itself converts; nothing is cast before it.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

template <Operation kOperation, c10::DispatchKey kKey>
at::Tensor forward(const at::Tensor& input, const RowArguments& rows, OptionalType dtype, bool validate,
                   OptionalInt packed) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{kKey});
  const bool is_16bit = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  if (!dtype.has_value() && is_16bit) {
    dtype = at::kFloat;
  }
  return call<kOperation>(input, rows, dtype, validate, packed);
}

template <c10::DispatchKey kKey>
void register_all(torch::Library& library) {
  for_each_operation([&](auto operation) {
    if constexpr (is_forward(operation.value)) {
      library.impl(info_of(operation.value).name, Forward::kernel<forward<operation.value, kKey>>);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, AutocastCPU, m) { register_all<c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, AutocastCUDA, m) { register_all<c10::DispatchKey::AutocastCUDA>(m); }

}  // namespace masked_softmax
