// Fibers, and the launch of a grid: one cluster after another.
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <map>

#include "checker.h"
#include "machine.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

// Pushes the callee-saved registers onto the old stack and pops them from the new one.
asm(R"(
.text
.globl simt_switch_stacks
.type simt_switch_stacks, @function
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stacks, .-simt_switch_stacks
)");
extern "C" void simt_switch_stacks(void** old_stack_pointer, void* new_stack_pointer);

namespace simt {
namespace {

void (*running_body)(const void*);
const void* running_context;
Order order = Order::kRandom;
uint64_t random_state = 0x9e3779b97f4a7c15ull;

size_t next_position() {
  const size_t count = machine().runnable.size();
  switch (order) {
    case Order::kForwards: return 0;
    case Order::kBackwards: return count - 1;
    default: return next_random() % count;
  }
}

unsigned take_runnable() {
  std::vector<unsigned>& runnable = machine().runnable;
  const size_t position = next_position();
  const unsigned number = runnable[position];
  if (order == Order::kRandom) {
    runnable[position] = runnable.back();
    runnable.pop_back();
  } else {
    runnable.erase(runnable.begin() + static_cast<std::ptrdiff_t>(position));
  }
  return number;
}

void return_to_host() {
  Machine& m = machine();
  simt_switch_stacks(&current_fiber().stack_pointer, m.host_stack_pointer);
}

void report_deadlock() {
  std::map<std::string, int> waiting;
  int done = 0;
  for (const Fiber& fiber : machine().fibers) {
    if (fiber.is_done) {
      ++done;
    } else {
      ++waiting[std::string(fiber.waits_for) + " at " + fiber.location.file + ":" +
                std::to_string(fiber.location.line)];
    }
  }
  std::string text = "deadlock:";
  for (const auto& [where, count] : waiting) {
    text += " " + std::to_string(count) + " threads wait for " + where + ";";
  }
  fail(text + describe_mbarriers() + " " + std::to_string(done) + " have returned");
}

void run_next() {
  Machine& m = machine();
  if (!m.unfinished_copies.empty()) {
    advance_copies();
  }
  if (m.runnable.empty()) {
    report_deadlock();
  }
  Fiber& old = current_fiber();
  m.current = take_runnable();
  if (&current_fiber() != &old) {
    ++m.counters.switches;
    simt_switch_stacks(&old.stack_pointer, current_fiber().stack_pointer);
  }
}

// The outermost function of a fiber.
void fiber_main() {
  running_body(running_context);
  Machine& m = machine();
  Fiber& fiber = current_fiber();
  fiber.is_done = true;
  Barrier& block = m.blocks[fiber.block].barrier;
  Warp& warp = m.warps[fiber.warp];
  ++block.returned;
  ++m.cluster.returned;
  warp.lanes &= ~(1u << fiber.lane);
  if (fiber.syncs.cluster_arrivals != fiber.syncs.cluster_waits) {
    fail("a thread returns that has arrived at the cluster barrier but not waited");
  }
  if (warp.arrived != 0) {
    fail("a lane returns while other lanes of its warp wait in a shuffle");
  }
  if (block.arrived != 0) {
    fail("a thread returns while other threads of its block wait at a barrier");
  }
  if (m.cluster.arrived != 0) {
    fail("a thread returns while other threads of its cluster wait at a barrier");
  }
  if (block.returned == block.count) {
    check_returning_block(fiber.block);
  }
  if (m.cluster.returned == m.cluster.count) {
    return_to_host();
  }
  run_next();
}

char* reserve(size_t size_bytes) {
  return static_cast<char*>(
      mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void prepare_fiber(const Grid& grid, unsigned first_block, unsigned number) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[number];
  fiber = Fiber();
  fiber.number = number;
  fiber.block = number / grid.threads;
  const unsigned thread = number % grid.threads;
  fiber.warp = fiber.block * ((grid.threads + kWarpLanes - 1) / kWarpLanes) + thread / kWarpLanes;
  fiber.lane = thread % kWarpLanes;
  fiber.index = {thread, grid.threads, first_block + fiber.block, grid.blocks, fiber.block, grid.cluster_size};
  // A fiber never returns, so it leaves AddressSanitizer's marks of its last frames behind.
  ASAN_UNPOISON_MEMORY_REGION(m.stacks + size_t{number} * kStackBytes, kStackBytes);
  // simt_switch_stacks() pops six registers and returns to fiber_main. Stacks begin at different offsets of a page, or
  // they would compete for the same cache sets.
  char* top = m.stacks + (size_t{number} + 1) * kStackBytes - 256 - number % 32 * 128;
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;
  *--stack = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) {
    *--stack = nullptr;
  }
  fiber.stack_pointer = stack;
}

void run_cluster(const Grid& grid, unsigned first_block) {
  Machine& m = machine();
  const unsigned count = grid.threads * grid.cluster_size;
  m.fibers.resize(count);
  m.blocks.assign(grid.cluster_size, Block());
  m.cluster = ClusterBarrier();
  m.cluster.count = count;
  m.warps.assign(size_t{grid.cluster_size} * ((grid.threads + kWarpLanes - 1) / kWarpLanes), Warp());
  m.runnable.clear();
  m.mbarriers.clear();
  m.completion_sources = 0;
  m.first_copy_of_cluster = m.copies.size();
  for (unsigned b = 0; b < grid.cluster_size; ++b) {
    Block& block = m.blocks[b];
    block.barrier.first = b * grid.threads;
    block.barrier.count = grid.threads;
    block.shared = m.shared + b * kSharedStride;
  }
  for (unsigned number = 0; number < count; ++number) {
    prepare_fiber(grid, first_block, number);
    m.warps[m.fibers[number].warp].lanes |= 1u << m.fibers[number].lane;
    m.runnable.push_back(number);
  }
  m.counters.threads += count;
  m.current = take_runnable();
  m.is_running = true;
  simt_switch_stacks(&m.host_stack_pointer, current_fiber().stack_pointer);
  m.is_running = false;
}

}  // namespace

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

uint64_t next_random() {  // xorshift64 (Marsaglia, Journal of Statistical Software 8, 2003)
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void wait_for(const char* what, Location location) {
  Fiber& fiber = current_fiber();
  fiber.waits_for = what;
  fiber.location = location;
  run_next();
}

void wake(Fiber& fiber) { machine().runnable.push_back(fiber.number); }

void fail(const std::string& what) {
  Machine& m = machine();
  if (m.error.empty()) {
    m.error = what;
    if (m.is_running) {
      const ThreadIndex& index = current_fiber().index;
      m.error += " [block " + std::to_string(index.block) + ", thread " + std::to_string(index.thread) + "]";
    }
  }
  if (m.is_running) {
    return_to_host();
  }
}

ThreadIndex this_thread() { return current_fiber().index; }

int launch_threads(const Grid& grid, void (*body)(const void*), const void* context) {
  Machine& m = machine();
  if (grid.blocks == 0 || grid.threads == 0 || grid.threads > kMaxBlockThreads || grid.cluster_size == 0 ||
      grid.cluster_size > kMaxClusterBlocks || grid.blocks % grid.cluster_size != 0 ||
      grid.shared_bytes > kMaxSharedBytes) {
    fail("invalid launch: " + std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) +
         " threads and " + std::to_string(grid.shared_bytes) + " bytes of shared memory in clusters of " +
         std::to_string(grid.cluster_size));
    return kInvalidConfiguration;
  }
  if (!m.error.empty()) {
    return kLaunchFailed;  // like a GPU whose context is lost
  }
  if (m.stacks == nullptr) {
    m.stacks = reserve(size_t{kMaxBlockThreads} * kMaxClusterBlocks * kStackBytes);
    m.shared = reserve(kMaxClusterBlocks * kSharedStride);
  }
  running_body = body;
  running_context = context;
  ++m.launch_number;
  m.shared_bytes = grid.shared_bytes;
  m.copies.clear();
  m.unfinished_copies.clear();
  remember_host_stack();
  std::vector<unsigned> clusters(grid.blocks / grid.cluster_size);
  for (unsigned i = 0; i < clusters.size(); ++i) {
    clusters[i] = order == Order::kBackwards ? static_cast<unsigned>(clusters.size()) - 1 - i : i;
  }
  for (size_t i = clusters.size(); order == Order::kRandom && i > 1; --i) {
    std::swap(clusters[i - 1], clusters[next_random() % i]);
  }
  for (unsigned cluster : clusters) {
    ++m.cluster_number;
    begin_checked_cluster(grid.cluster_size);
    run_cluster(grid, cluster * grid.cluster_size);
    if (!m.error.empty()) {
      return kLaunchFailed;
    }
  }
  finish_copies();
  return kSuccess;
}

Order current_order() { return order; }

void set_order(Order new_order, uint64_t seed) {
  order = new_order;
  random_state = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
}

const std::string& error() { return machine().error; }
void clear_error() { machine().error.clear(); }
const Counters& counters() { return machine().counters; }

}  // namespace simt
