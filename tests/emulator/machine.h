// The emulator's inside: the threads of the cluster that runs, and who waits for whom.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "simt.h"

namespace simt {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMostBlockThreads = 1024;
constexpr unsigned kMostClusterBlocks = 16;
constexpr size_t kSharedBytes = 227 * 1024;  // of a block
constexpr size_t kStackBytes = 64 * 1024;    // of a thread

// How often a thread has met others: two accesses are ordered where a meeting lies between them.
struct Meetings {
  uint32_t cluster = 0;
  uint32_t block = 0;
  uint32_t warp = 0;
};

struct Fiber {
  ThreadIndex index;
  unsigned number = 0;  // in the cluster
  unsigned block = 0;   // in the cluster
  unsigned warp = 0;    // in the cluster
  unsigned lane = 0;
  bool is_done = false;
  const char* waits_for = nullptr;
  Place place{"", 0};
  Meetings met;
  // The shuffle that the thread takes part in.
  Shuffle shuffle{};
  uint64_t value = 0;
  unsigned argument = 0;
  unsigned width = 0;
  void* stack_pointer = nullptr;
};

// Threads that meet: those of a block or of a cluster.
struct Barrier {
  unsigned first = 0;  // fiber
  unsigned count = 0;
  unsigned arrived = 0;
  unsigned returned = 0;  // threads that will not come any more
  Place place{"", 0};
};

struct Warp {
  unsigned lanes = 0;    // as bits: those that there are
  unsigned arrived = 0;  // those that wait in a shuffle
  Place place{"", 0};
};

struct Block {
  Barrier barrier;
  char* shared = nullptr;
  size_t shared_used = 0;
  std::vector<std::pair<const void*, size_t>> shared_arrays;  // key, offset
};

struct Machine {
  std::vector<Fiber> fibers;  // of the cluster that runs
  std::vector<Block> blocks;
  Barrier cluster;
  std::vector<Warp> warps;
  std::vector<unsigned> runnable;
  unsigned current = 0;
  bool is_running = false;
  uint64_t launch_number = 0;
  char* stacks = nullptr;
  char* shared = nullptr;  // kMostClusterBlocks times kSharedBytes
  void* host_stack_pointer = nullptr;
  std::string error;
  Counters counters{};
};

Machine& machine();

// The fiber that runs.
inline Fiber& current_fiber() { return machine().fibers[machine().current]; }

// Lets others run until somebody wakes this fiber.
void wait_for(const char* what, Place place);
void wake(Fiber& fiber);

// Ends the launch: the error is kept, no fiber runs again. Does not return inside of a kernel.
void fail(const std::string& what);

uint64_t next_random();

}  // namespace simt
