// Writes are counted here, a level below autograd: inference mode passes autograd by, and what it overwrites may have
// been saved for a backward pass outside of it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "binding/operators.h"

namespace masked_softmax {
namespace {

template <class Compute>
void write_to(const at::Tensor& written, const char* name, const Compute& compute) {
  // torch's own check comes with the count, when the values are gone.
  TORCH_CHECK(
      !written.is_inference() || c10::InferenceMode::is_enabled(), name,
      "(): Inplace update to inference tensor outside InferenceMode is not allowed. You can make a clone to get "
      "a normal tensor before doing inplace update.");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    compute();
  }
  torch::autograd::impl::bump_version(written);
}

template <const Operators& (*operators_of)()>
void forward_out(const at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                 OptionalScale scale, OptionalType dtype, bool validate, at::Tensor& out) {
  write_to(out, operators_of().name,
           [&] { operators_of().forward_out.call(input, lengths, dim, starts, scale, dtype, validate, out); });
}

void softmax_in_place(at::Tensor& input, const at::Tensor& lengths, int64_t dim, const OptionalTensor& starts,
                      OptionalScale scale, bool validate) {
  write_to(input, "masked_softmax_",
           [&] { masked_softmax_in_place().call(input, lengths, dim, starts, scale, validate); });
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, ADInplaceOrView, m) {
  m.impl("masked_softmax.out", forward_out<softmax_operators>);
  m.impl("masked_softmax_", softmax_in_place);
  m.impl("masked_log_softmax.out", forward_out<log_softmax_operators>);
}

}  // namespace masked_softmax
