#include "cpu/dispatch.h"
#include "cpu/prelude.h"
#include "cpu/rows.h"
#include "cpu/vec_scalar.h"

namespace masked_softmax {

struct Scalar {
  static constexpr bool kLoads16Bit = false;  // they would convert element by element: staging does that in one place
  using Float = ScalarVec<float, 4>;
  using Double = ScalarVec<double, 2>;
};

void run_Scalar(const Problem& problem, int64_t begin, int64_t end) { run<Scalar>(problem, begin, end); }

}  // namespace masked_softmax
