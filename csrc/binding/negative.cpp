// Writing to a view whose elements count as negated (the imaginary part of a conjugate): computed apart, then copied.
// torch's fallback for such views does the same, but only for operators that return what they write to.
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "binding/checks.h"
#include "binding/operators.h"

namespace masked_softmax {
namespace {

template <class Compute>
void write_to(at::Tensor& written, const char* name, const Compute& compute) {
  if (written.is_neg() && !written.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    check_own_elements(written, name);  // what is computed apart has them in any case
  }
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKeySet{c10::DispatchKey::Negative});
  at::Tensor plain = written.resolve_neg();
  compute(plain);
  if (written.is_neg()) {
    written.copy_(plain);
  }
}

template <const Operators& (*operators_of)()>
void forward_out(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                 OptionalScale scale, OptionalType dtype, bool validate, at::Tensor& out) {
  write_to(out, operators_of().name, [&](at::Tensor& plain) {
    operators_of().forward_out.call(input.resolve_neg(), lengths, dim, starts, scale, dtype, validate, plain);
  });
}

void softmax_in_place(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                      OptionalScale scale, bool validate) {
  write_to(input, "masked_softmax_",
           [&](at::Tensor& plain) { masked_softmax_in_place().call(plain, lengths, dim, starts, scale, validate); });
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Negative, m) {
  m.impl("masked_softmax.out", forward_out<softmax_operators>);
  m.impl("masked_softmax_", softmax_in_place);
  m.impl("masked_log_softmax.out", forward_out<log_softmax_operators>);
}

}  // namespace masked_softmax
