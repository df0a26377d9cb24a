// The GPU that csrc/cuda/device.cuh sees when no CUDA compiler reads it: its threads, their barriers, their memory.
//
// Every CUDA thread is a fiber; all run on one operating-system thread, one at a time, until they wait for each other.
// Which fiber goes next is drawn from a seeded generator, so an order that exposes a mistake is found, and found again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace simt {

// Where in a kernel an operation stands, for messages.
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a CUDA thread knows about itself. By value: a reference would be a load from the emulator's own memory.
struct ThreadIndex {
  unsigned thread;
  unsigned block_threads;
  unsigned block;
  unsigned grid_blocks;
  unsigned cluster_rank;
  unsigned cluster_size;
};
ThreadIndex this_thread();

void sync_block(Place place);
void sync_cluster(Place place);

// Every lane of the warp takes part, at the same place; the result is what lane `source` of them passed. Groups of
// `width` lanes see each other only: a source outside of the group is the lane itself.
enum class Shuffle { kXor, kUp };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width, Place place);

template <class T>
T shuffle_as(Shuffle kind, unsigned mask, T value, unsigned argument, unsigned width, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "one register, or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle_xor(unsigned mask, T value, unsigned lane_mask, unsigned width, Place place) {
  return shuffle_as(Shuffle::kXor, mask, value, lane_mask, width, place);
}
template <class T>
T shuffle_up(unsigned mask, T value, unsigned distance, unsigned width, Place place) {
  return shuffle_as(Shuffle::kUp, mask, value, distance, width, place);
}

// Accesses wider than the compiler's own, which it therefore does not announce: see checker.h.
void check_load(const void* p, size_t size_bytes);
void check_store(const void* p, size_t size_bytes);

// A block's static shared memory: one array for each key, the same for all of the block's threads.
void* shared_memory(const void* key, size_t size_bytes, size_t alignment);
template <class Key>
void* shared_array(Key, size_t size_bytes, size_t alignment) {
  static const char key = 0;  // one for each type of Key
  return shared_memory(&key, size_bytes, alignment);
}
// The same variable in the cluster's block number `rank`.
const void* shared_of_block(const void* shared, unsigned rank);

struct Grid {
  unsigned blocks;
  unsigned threads;  // of a block
  unsigned cluster_size;
};

constexpr int kSuccess = 0;
constexpr int kInvalidConfiguration = 9;
constexpr int kLaunchFailed = 719;

// Runs body() as every thread of the grid; error() says what went wrong.
int launch_threads(const Grid& grid, void (*body)(const void* context), const void* context);
template <class Body>
int launch(const Grid& grid, const Body& body) {
  return launch_threads(grid, [](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
}

// The order in which fibers run.
enum class Order { kRandom, kForwards, kBackwards };
void set_order(Order order, uint64_t seed);

// What the first faulty launch since clear_error() did wrong, or an empty text.
const std::string& error();
void clear_error();

struct Counters {
  uint64_t threads;
  uint64_t switches;
  uint64_t accesses;  // to device and shared memory that were checked
  uint64_t wide_accesses;
};
const Counters& counters();

}  // namespace simt
