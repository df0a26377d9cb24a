// The operators on meta and fake tensors: the same checks, and results with shape, type and strides but no memory.
// torch.compile and torch.export trace through these.
#include <ATen/ops/empty.h>

#include "binding/device_ops.h"

namespace masked_softmax {
namespace {

struct Meta {
  static at::Tensor empty(const at::Tensor& like, at::ScalarType dtype, const CallArguments& /*arguments*/) {
    return at::empty_symint(like.sym_sizes(), like.options().dtype(dtype));
  }

  static void compute(Operation, const at::Tensor&, std::initializer_list<const at::Tensor*>, const CallArguments&) {}
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Meta, m) { DeviceOps<Meta>::register_all(m); }

}  // namespace masked_softmax
