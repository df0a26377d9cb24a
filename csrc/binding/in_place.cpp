// Operators that write to an argument, out= or in place: bumps its version counter. That happens below autograd,
// because inference mode skips autograd, and a tensor that it overwrites may have been saved for a backward pass
// outside.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/variable.h>

#include "binding/checks.h"
#include "binding/writes.h"

namespace masked_softmax {
namespace {

struct BumpVersion {
  template <class Call, class... Arguments>
  static void write(const char* name, at::Tensor& written, const Call& call, Arguments&... arguments) {
    check_not_inference(written, name);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      call(arguments...);
    }
    torch::autograd::impl::bump_version(written);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, ADInplaceOrView, m) { register_write_kernels<BumpVersion>(m); }

}  // namespace masked_softmax
