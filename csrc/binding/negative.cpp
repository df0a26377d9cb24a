// Writing to a view with the negative bit (the imaginary part of a conjugate): computed into a tensor without it, then
// copied. torch's fallback does the same, but only for operators that return what they write to.
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "binding/checks.h"
#include "binding/writes.h"

namespace masked_softmax {
namespace {

struct ResolveNegative {
  template <class Call, class... Arguments>
  static void write(const char* name, at::Tensor& written, const Call& call, Arguments&... arguments) {
    if (written.is_neg() && !written.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
      check_no_internal_overlap(written, name);  // a tensor without the bit would hide it
    }
    const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKeySet{c10::DispatchKey::Negative});
    at::Tensor plain = written.resolve_neg();
    call(resolved(arguments, plain)...);
    if (written.is_neg()) {
      written.copy_(plain);
    }
  }

 private:
  // Tensors without the negative bit; `plain` in place of the one that is written to.
  static at::Tensor& resolved(at::Tensor& /*written*/, at::Tensor& plain) { return plain; }
  static at::Tensor resolved(const at::Tensor& tensor, at::Tensor& /*plain*/) { return tensor.resolve_neg(); }
  static OptionalTensor resolved(const OptionalTensor& tensor, at::Tensor& /*plain*/) {
    return tensor.has_value() ? OptionalTensor(tensor->resolve_neg()) : std::nullopt;
  }
  template <class Other>
  static const Other& resolved(const Other& argument, at::Tensor& /*plain*/) {
    return argument;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Negative, m) { register_write_kernels<ResolveNegative>(m); }

}  // namespace masked_softmax
