// The emulator's state: the threads of the running cluster, and what they wait for.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "simt.h"

namespace simt {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMaxBlockThreads = 1024;
constexpr unsigned kMaxClusterBlocks = 16;
constexpr size_t kSharedBytes = 227 * 1024;  // per block
constexpr size_t kStackBytes = 64 * 1024;    // per thread

// How many barriers and shuffles a thread has passed. Two accesses are ordered if one of them lies between.
struct SyncCounts {
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
  Location location{"", 0};
  SyncCounts syncs;
  // The shuffle that it waits in.
  Shuffle shuffle{};
  uint64_t value = 0;
  unsigned argument = 0;
  unsigned width = 0;
  void* stack_pointer = nullptr;
};

// The barrier of a block or of a cluster.
struct Barrier {
  unsigned first = 0;  // fiber
  unsigned count = 0;
  unsigned arrived = 0;
  unsigned returned = 0;  // threads that have returned from the kernel
  Location location{"", 0};
};

struct Warp {
  unsigned lanes = 0;    // bit mask: lanes that exist and have not returned
  unsigned arrived = 0;  // bit mask: lanes that wait in a shuffle
  Location location{"", 0};
};

struct Block {
  Barrier barrier;
  char* shared = nullptr;
  size_t shared_used = 0;
  std::vector<std::pair<const void*, size_t>> shared_arrays;  // key, offset
};

struct Machine {
  std::vector<Fiber> fibers;  // of the running cluster
  std::vector<Block> blocks;
  Barrier cluster;
  std::vector<Warp> warps;
  std::vector<unsigned> runnable;
  unsigned current = 0;
  bool is_running = false;
  uint64_t launch_number = 0;
  char* stacks = nullptr;
  char* shared = nullptr;  // kMaxClusterBlocks times kSharedBytes
  void* host_stack_pointer = nullptr;
  std::string error;
  Counters counters{};
};

Machine& machine();

inline Fiber& current_fiber() { return machine().fibers[machine().current]; }

// Runs other fibers until wake() is called with this one.
void wait_for(const char* what, Location location);
void wake(Fiber& fiber);

// Ends the launch with an error, unless an earlier one is kept. Does not return when called from a kernel.
void fail(const std::string& what);

uint64_t next_random();

}  // namespace simt
