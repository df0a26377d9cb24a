// The operators on CPU tensors.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "binding/device_ops.h"
#include "binding/make_problem.h"
#include "binding/threads.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/partition.h"

namespace masked_softmax {
namespace {

// Minimum cost of a thread's share: about 10 us, below which waking the thread costs more (unit: partition.h).
constexpr int64_t kParallelCost = 1 << 18;

void run_on_threads(const Problem& problem) {
  const RunRows run_rows = cpu_capability().run_rows;
  const int64_t parts =
      std::min<int64_t>({at::get_num_threads(), max_total_cost(problem) / kParallelCost, problem.rows});
  if (parts <= 1 || at::in_parallel_region()) {
    run_rows(problem, 0, problem.rows);
    return;
  }
  const std::vector<int64_t> boundaries = partition_rows(problem, static_cast<int>(parts));
  for_each_part(parts, [&](int64_t part) { run_rows(problem, boundaries[part], boundaries[part + 1]); });
}

struct Cpu {
  static at::Tensor empty(const at::Tensor& like, at::ScalarType dtype, const CallArguments& /*arguments*/) {
    at::Tensor output = at::detail::empty_cpu(like.sizes(), dtype);  // at::empty's two dispatches take 0.1 us
    advise_huge_pages(output.data_ptr(), output.nbytes());
    return output;
  }

  static void compute(Operation operation, const at::Tensor& output, std::initializer_list<const at::Tensor*> inputs,
                      const CallArguments& arguments) {
    Problem problem = make_problem(operation, output, inputs, arguments);
    check_bounds(problem, scores_of(operation, output, inputs), arguments);
    if (problem.rows > 0 && (problem.cols > 0 || problem.row_result.data != nullptr)) {
      run_on_threads(problem);
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, CPU, m) { DeviceOps<Cpu>::register_all(m); }

}  // namespace masked_softmax
