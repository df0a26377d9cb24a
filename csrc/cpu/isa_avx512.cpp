#include "cpu/dispatch.h"
#include "cpu/prelude.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
// GCC 12 warns about its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "cpu/vec_avx512.h"

#include "cpu/rows.h"

namespace masked_softmax {

struct Avx512 {
  static constexpr bool kLoads16Bit = true;
  using Float = Avx512Float;
  using Double = Avx512Double;
};

void run_Avx512(const Problem& problem, int64_t begin, int64_t end) { run<Avx512>(problem, begin, end); }

}  // namespace masked_softmax

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
