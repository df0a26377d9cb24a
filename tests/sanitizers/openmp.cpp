// Tells ThreadSanitizer how OpenMP's runtime, which is not instrumented, synchronizes a parallel region: writes before
// the region are visible to its threads, and their writes are visible after it. Linked with --wrap=GOMP_parallel, so
// it covers this extension's regions only.
extern "C" {

void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __real_GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);

struct Region {
  void (*run)(void*);
  void* data;
};

static void run_on_thread(void* region) {
  __tsan_acquire(region);
  static_cast<Region*>(region)->run(static_cast<Region*>(region)->data);
  __tsan_release(region);
}

void __wrap_GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags) {
  Region region{run, data};
  __tsan_release(&region);
  __real_GOMP_parallel(run_on_thread, &region, threads, flags);
  __tsan_acquire(&region);
}
}
