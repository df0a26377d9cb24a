// The GPU that include/cuda/device.cuh is written over: threads, barriers, shuffles, shared memory.
//
// Every CUDA thread is a fiber. All run on one operating-system thread, one at a time, each until it waits for others.
// A seeded generator draws which fiber runs next, so an order that exposes a mistake can be reproduced.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace simt {

// The place in a kernel's source that calls, for messages.
struct Location {
  const char* file;
  int line;

  static constexpr Location current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Returned by value: through a reference, the kernel would load from the emulator's own memory.
struct ThreadIndex {
  unsigned thread;
  unsigned block_threads;
  unsigned block;
  unsigned grid_blocks;
  unsigned cluster_rank;
  unsigned cluster_size;
};
ThreadIndex this_thread();

void sync_block(Location location);

// A cluster's barrier in two steps. Each thread of the cluster arrives, and later waits for all others to arrive. What
// a thread accessed before a relaxed arrive is not ordered before what others access after their wait.
enum class Arrive { kRelaxed, kRelease };
void arrive_at_cluster(Arrive semantics, Location location);
void wait_for_cluster(Location location);
inline void sync_cluster(Location location) {
  arrive_at_cluster(Arrive::kRelease, location);
  wait_for_cluster(location);
}

// Precondition: every lane of the warp calls, at the same location. Returns the value that the source lane passed.
// Values move within groups of `width` lanes: a source outside of the group is the lane itself.
enum class Shuffle { kXor, kUp };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width, Location location);

template <class T>
T shuffle_as(Shuffle kind, unsigned mask, T value, unsigned argument, unsigned width, Location location) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "a value of one or two registers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width, location);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle_xor(unsigned mask, T value, unsigned lane_mask, unsigned width, Location location) {
  return shuffle_as(Shuffle::kXor, mask, value, lane_mask, width, location);
}
template <class T>
T shuffle_up(unsigned mask, T value, unsigned distance, unsigned width, Location location) {
  return shuffle_as(Shuffle::kUp, mask, value, distance, width, location);
}

// For the 16-byte accesses, which the compiler does not announce: see checker.h.
void check_load(const void* p, size_t size_bytes);
void check_store(const void* p, size_t size_bytes);

// A block's static shared memory: one array for each key, shared by the block's threads.
void* shared_memory(const void* key, size_t size_bytes, size_t alignment);
template <class Key>
void* shared_array(Key, size_t size_bytes, size_t alignment) {
  static const char key = 0;  // one for each type of Key
  return shared_memory(&key, size_bytes, alignment);
}
// The same variable in the cluster's block number `rank`.
const void* shared_of_block(const void* shared, unsigned rank);

// The block's dynamic shared memory, of Grid::shared_bytes.
void* dynamic_shared_memory();

// An mbarrier object of 8 bytes in shared memory. A phase completes when all arrivals are in, and as many bytes have
// been copied as were expected.
void mbarrier_init(void* barrier, unsigned arrivals, Location location);
void mbarrier_arrive_expect_tx(void* barrier, unsigned size_bytes, Location location);
// Waits while the current phase's number has this parity.
void mbarrier_wait_parity(void* barrier, unsigned parity, Location location);

// Asynchronous copies, which take place at some time between their call and the wait for them: set_order().
//
// Bulk copies. Both addresses and the size are multiples of 16 bytes.
void bulk_copy_to_shared(void* to, const void* from, unsigned size_bytes, void* barrier, Location location);
void bulk_copy_to_global(void* to, const void* from, unsigned size_bytes, Location location);
// Orders a thread's earlier accesses to shared memory before later bulk copies.
void fence_proxy_async();
// Copies of 16 bytes from global to shared memory (cp.async).
void copy_16_bytes(void* to, const void* from, Location location);

// A thread commits its copies in groups, bulk copies to global memory apart from those of 16 bytes.
enum class CopyGroups { kBulk, k16Bytes };
void commit_copies(CopyGroups groups);
// Waits until at most the latest `pending` groups are under way: until the others have read their sources, or have
// written their destinations too.
enum class CopyStage { kRead, kWritten };
void wait_for_copies(CopyGroups groups, unsigned pending, CopyStage stage);

constexpr unsigned kMaxSharedBytes = 227 * 1024;  // per block, static and dynamic: compute capability 9.0

struct Grid {
  unsigned blocks;
  unsigned threads;  // per block
  unsigned cluster_size;
  unsigned shared_bytes = 0;  // of dynamic shared memory, per block
};

constexpr int kSuccess = 0;
constexpr int kInvalidConfiguration = 9;
constexpr int kLaunchFailed = 719;

// Runs body() in every thread of the grid.
int launch_threads(const Grid& grid, void (*body)(const void* context), const void* context);
template <class Body>
int launch(const Grid& grid, const Body& body) {
  return launch_threads(grid, [](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
}

// The order in which fibers run. Asynchronous copies take place as soon as they can (kForwards), as late as they can
// (kBackwards) or at a random time.
enum class Order { kRandom, kForwards, kBackwards };
void set_order(Order order, uint64_t seed);

// The first error since clear_error(), or an empty string.
const std::string& error();
void clear_error();

struct Counters {
  uint64_t threads;
  uint64_t switches;
  uint64_t accesses;  // checked, to device and shared memory
  uint64_t wide_accesses;
};
const Counters& counters();

}  // namespace simt
