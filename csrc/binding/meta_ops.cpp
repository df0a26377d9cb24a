// The operators on meta and fake tensors: the same checks, and results of the right shape, type and strides, without
// memory. torch.compile and torch.export trace through these.
#include <ATen/ops/empty.h>

#include "binding/device_ops.h"

namespace masked_softmax {
namespace {

struct Meta {
  static at::Tensor empty(const at::Tensor& like, at::ScalarType dtype, const RowArguments& /*arguments*/) {
    return at::empty_symint(like.sym_sizes(), like.options().dtype(dtype));
  }

  static void compute(Operation, const at::Tensor&, std::initializer_list<const at::Tensor*>, const RowArguments&) {}
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Meta, m) { DeviceOps<Meta>::register_all(m); }

}  // namespace masked_softmax
