// Tells ThreadSanitizer what OpenMP's library, which it has not compiled, does where a parallel region begins and ends:
// what was written before it is seen by its threads, and what they have written is seen behind it. Linked with
// --wrap=GOMP_parallel, so for our own regions alone.
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
