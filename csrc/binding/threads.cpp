// at::parallel_for is an inline function around an OpenMP pragma: its threads are those of whatever OpenMP library the
// compiler that compiles us brings. Those of torch are wanted, whatever the compiler: with g++ they would come of
// themselves, clang would load a library of its own beside torch's, and without -fopenmp there is one thread, without a
// word. So the pragma's work is asked for by name: GOMP_parallel is what g++ makes of it (the libgomp manual, "The
// libgomp ABI"), and libgomp, libomp and libiomp5, one of which torch has loaded, all have it.
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

// On every thread of the team, which may be smaller than asked for.
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
  // 0: as many as torch set. A number here makes libgomp build its pool anew whenever it changes (pytorch#32008).
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
