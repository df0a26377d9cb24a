// Under autocast the result has the type that torch.softmax has there, float32, unless dtype says otherwise. The
// conversion is the kernel's own: no cast comes before it.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

template <const Operators& (*operators_of)(), c10::DispatchKey kKey>
at::Tensor forward(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                   OptionalScale scale, OptionalType dtype, bool validate, OptionalInt packed) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{kKey});
  const bool is_16bit = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  if (!dtype.has_value() && is_16bit) {
    dtype = at::kFloat;
  }
  return operators_of().forward.call(input, lengths, dim, starts, scale, dtype, validate, packed);
}

template <c10::DispatchKey kKey>
void register_all(torch::Library& library) {
  library.impl("masked_softmax", forward<softmax_operators, kKey>);
  library.impl("masked_log_softmax", forward<log_softmax_operators, kKey>);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, AutocastCPU, m) { register_all<c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(masked_softmax_ext, AutocastCUDA, m) { register_all<c10::DispatchKey::AutocastCUDA>(m); }

}  // namespace masked_softmax
