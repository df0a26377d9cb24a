#include "cuda/launch_registers.cuh"

namespace masked_softmax {
namespace cuda {

template Status launch_registers<bfloat16_t, bfloat16_t>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace cuda
}  // namespace masked_softmax
