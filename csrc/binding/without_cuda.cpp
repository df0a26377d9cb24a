// Rejects CUDA tensors in a build without CUDA, with an error that tells how to rebuild. torch's own error would list
// dispatch keys.
#include "binding/device_ops.h"

namespace masked_softmax {
namespace {

struct WithoutCuda {
  [[noreturn]] static void refuse(const at::Tensor& tensor, const CallArguments& arguments) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, arguments.name,
        "(): expected a tensor on the CPU, because masked_softmax_ext was built without CUDA, but got one on ",
        tensor.device(), "; set CUDA_HOME to the CUDA toolkit's folder and install masked_softmax_ext ",
        "again: MASKED_SOFTMAX_EXT_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .");
  }

  static at::Tensor empty(const at::Tensor& like, at::ScalarType /*dtype*/, const CallArguments& arguments) {
    refuse(like, arguments);
  }

  static void compute(Operation /*operation*/, const at::Tensor& output,
                      std::initializer_list<const at::Tensor*> /*inputs*/, const CallArguments& arguments) {
    refuse(output, arguments);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, CUDA, m) { DeviceOps<WithoutCuda>::register_all(m); }

}  // namespace masked_softmax
