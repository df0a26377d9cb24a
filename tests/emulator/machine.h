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
constexpr size_t kSharedStride = 256 * 1024;  // from one block's shared memory to the next one's; the rest is unused
constexpr size_t kStackBytes = 64 * 1024;     // per thread

// How many barriers and shuffles a thread has passed. Two accesses are ordered if one of them lies between.
struct SyncCounts {
  uint32_t cluster_arrivals = 0;
  uint32_t cluster_waits = 0;
  uint32_t block = 0;
  uint32_t warp = 0;
};

// What a thread waits for before it may use the memory of an asynchronous copy: the completion of `count` phases of an
// mbarrier, or of `count` groups of one thread. `source` numbers the mbarriers and the threads' groups of a cluster.
struct Completion {
  uint32_t source = 0;
  uint32_t count = 0;
};

// The completions that a thread knows of, by source: it has waited for them itself, or has met a thread at a barrier
// that had.
using Observed = std::vector<uint32_t>;
void merge(Observed& observed, const Observed& others);

enum class CopyState { kIssued, kRead, kWritten };

struct Copy {
  const char* from = nullptr;
  char* to = nullptr;
  size_t size_bytes = 0;
  Completion read;     // when `from` may be overwritten
  Completion written;  // when `to` may be read
  int mbarrier = -1;   // index; -1: the copy belongs to a group
  bool is_bulk = false;
  uint32_t cluster = 0;  // machine().cluster_number
  unsigned block = 0;    // in the cluster
  Location location{"", 0};
  CopyState state = CopyState::kIssued;
  std::vector<char> data;  // between kRead and kWritten
};

struct MBarrier {
  void* address = nullptr;
  unsigned block = 0;  // in the cluster
  uint32_t source = 0;
  unsigned arrivals = 0;  // per phase
  unsigned missing_arrivals = 0;
  int64_t missing_bytes = 0;  // negative: copied, but not yet expected
  uint32_t phases = 0;        // completed
  std::vector<unsigned> waiting;
  Location location{"", 0};  // of its initialization
};

// A thread's groups of copies of one kind. Groups are numbered from 1; copies that are not committed belong to the next
// one.
struct Groups {
  uint32_t read_source = 0;  // 0: none yet
  uint32_t written_source = 0;
  uint32_t committed = 0;
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
  Observed observed;
  Groups groups[2];                    // by CopyGroups
  std::vector<uint32_t> proxy_fences;  // the block barriers passed before each fence.proxy.async
  void* stack_pointer = nullptr;
};

struct Barrier {
  unsigned first = 0;  // fiber
  unsigned count = 0;
  unsigned arrived = 0;
  unsigned returned = 0;  // threads that have returned from the kernel
  Location location{"", 0};
};

// Phases are numbered by their arrivals: a thread that has arrived and waited n times arrives at phase n.
struct ClusterBarrier : Barrier {
  bool is_release = true;         // of the current phase
  std::vector<bool> was_release;  // of completed phases: whether no thread's arrive was relaxed
  std::vector<unsigned> waiting;  // fibers
  Observed observed[2];           // by the threads that have arrived at a phase, for the last two
};

struct Warp {
  unsigned lanes = 0;    // bit mask: lanes that exist and have not returned
  unsigned arrived = 0;  // bit mask: lanes that wait in a shuffle
  Location location{"", 0};
};

struct Block {
  Barrier barrier;
  char* shared = nullptr;
  size_t shared_used = 0;    // with gaps
  size_t shared_needed = 0;  // without
  bool has_dynamic_array = false;
  std::vector<std::pair<const void*, size_t>> shared_arrays;  // key, offset
};

struct Machine {
  std::vector<Fiber> fibers;  // of the running cluster
  std::vector<Block> blocks;
  ClusterBarrier cluster;
  std::vector<Warp> warps;
  std::vector<unsigned> runnable;
  unsigned current = 0;
  bool is_running = false;
  uint64_t launch_number = 0;
  uint32_t cluster_number = 0;  // counts all that have run
  unsigned shared_bytes = 0;    // dynamic, per block
  std::vector<MBarrier> mbarriers;
  uint32_t completion_sources = 0;
  std::vector<Copy> copies;  // of the launch
  size_t first_copy_of_cluster = 0;
  std::vector<unsigned> unfinished_copies;
  char* stacks = nullptr;
  char* shared = nullptr;  // kMaxClusterBlocks times kSharedStride
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
Order current_order();

std::string text_of(const Location& location);

// asynchronous.cpp

// Whether the thread knows that a copy has read its source, or written its destination.
bool may_overwrite_source(const Copy& copy, const Fiber& fiber);
bool may_use_destination(const Copy& copy, const Fiber& fiber);
// Called before another thread runs: copies may take place, and must if no thread can run.
void advance_copies();
// Called when a block's last thread returns: nothing may copy from or to its shared memory any more.
void check_returning_block(unsigned block);
// Called after the last block: copies to device memory take place before the launch ends.
void finish_copies();
// What the mbarriers wait for that threads wait for, for the report of a deadlock.
std::string describe_mbarriers();

}  // namespace simt
