#include "cuda/launch_registers.cuh"

namespace masked_softmax {
namespace cuda {

template Status launch_registers<float16_t, float16_t>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace cuda
}  // namespace masked_softmax
