#include "cpu/dispatch.h"
#include "cpu/prelude.h"

#if defined(__aarch64__)

#include "cpu/rows.h"
#include "cpu/vec_neon.h"

namespace masked_softmax {

struct Neon {
  static constexpr bool kLoads16Bit = true;
  using Float = NeonFloat;
  using Double = NeonDouble;
};

void run_Neon(const Problem& problem, int64_t begin, int64_t end) { run<Neon>(problem, begin, end); }

}  // namespace masked_softmax

#endif
