#include "cpu/dispatch.h"
#include "cpu/prelude.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/vec_avx2.h"

#include "cpu/rows.h"

namespace masked_softmax {

struct Avx2 {
  static constexpr bool kLoads16Bit = true;
  using Float = Avx2Float;
  using Double = Avx2Double;
};

void run_Avx2(const Problem& problem, int64_t begin, int64_t end) { run<Avx2>(problem, begin, end); }

}  // namespace masked_softmax

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
