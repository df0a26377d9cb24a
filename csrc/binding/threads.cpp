// at::parallel_for is an inline function with an OpenMP pragma, so its threads belong to the OpenMP library of the
// compiler that compiles this file. With g++ that is torch's; clang would load a second library beside torch's, and
// without -fopenmp there would silently be one thread. Calling GOMP_parallel, which g++ emits for the pragma (the
// libgomp manual, "The libgomp ABI"), always uses torch's: libgomp, libomp and libiomp5 all export it.
#include "binding/threads.h"

#include <ATen/Config.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <exception>

#if AT_PARALLEL_OPENMP
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace masked_softmax {

#if AT_PARALLEL_OPENMP

namespace {

struct Team {
  int64_t parts;
  const std::function<void(int64_t)>& body;
  std::atomic_flag has_failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error{};
};

// Runs on every thread of the team, which may be smaller than requested.
void run_share(void* data) {
  Team& team = *static_cast<Team*>(data);
  try {
    for (int64_t part = omp_get_thread_num(); part < team.parts; part += omp_get_num_threads()) {
      team.body(part);
    }
  } catch (...) {
    if (!team.has_failed.test_and_set()) {
      team.error = std::current_exception();
    }
  }
}

}  // namespace

void for_each_part(int64_t parts, const std::function<void(int64_t)>& body) {
  Team team{parts, body};
  // 0: the number that torch has set. With an explicit number, libgomp rebuilds its pool whenever it changes
  // (pytorch#32008).
  GOMP_parallel(run_share, &team, 0, 0);
  if (team.error) {
    std::rethrow_exception(team.error);
  }
}

#else

void for_each_part(int64_t parts, const std::function<void(int64_t)>& body) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      body(part);
    }
  });
}

#endif

}  // namespace masked_softmax
