// Barriers, shuffles and shared memory.
#include <algorithm>

#include "checker.h"
#include "machine.h"

namespace simt {
namespace {

bool same(const Location& a, const Location& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Checks that threads synchronize at one place, and that all are there.
void check_arrival(Barrier& barrier, const char* what, Location location) {
  if (barrier.arrived == 0) {
    barrier.location = location;
  } else if (!same(barrier.location, location)) {
    fail(std::string("threads synchronize at different places: some at ") + text_of(barrier.location) + ", one at " +
         text_of(location));
  }
  if (barrier.returned > 0) {
    fail(std::string("a thread waits at a ") + what + " after another thread has returned, at " + text_of(location));
  }
}

unsigned source_lane(const Fiber& fiber) {
  const unsigned base = fiber.lane / fiber.width * fiber.width;
  if (fiber.shuffle == Shuffle::kXor) {
    const unsigned source = fiber.lane ^ fiber.argument;
    return source < base + fiber.width ? source : fiber.lane;
  }
  return fiber.lane >= base + fiber.argument ? fiber.lane - fiber.argument : fiber.lane;
}

}  // namespace

std::string text_of(const Location& location) {
  return std::string(location.file) + ":" + std::to_string(location.line);
}

void merge(Observed& observed, const Observed& others) {
  if (observed.size() < others.size()) {
    observed.resize(others.size());
  }
  for (size_t i = 0; i < others.size(); ++i) {
    observed[i] = std::max(observed[i], others[i]);
  }
}

void sync_block(Location location) {
  Machine& m = machine();
  Barrier& barrier = m.blocks[current_fiber().block].barrier;
  check_arrival(barrier, "block barrier", location);
  if (++barrier.arrived == barrier.count) {
    barrier.arrived = 0;
    Fiber* const threads = &m.fibers[barrier.first];
    Observed observed;
    for (unsigned i = 0; i < barrier.count && m.completion_sources > 0; ++i) {
      merge(observed, threads[i].observed);
    }
    for (unsigned i = 0; i < barrier.count; ++i) {
      ++threads[i].syncs.block;
      threads[i].observed = observed;
      wake(threads[i]);
    }
  }
  // The last thread to arrive does not run first: it queues like the others.
  wait_for("block barrier", location);
}

void arrive_at_cluster(Arrive semantics, Location location) {
  Machine& m = machine();
  ClusterBarrier& barrier = m.cluster;
  Fiber& fiber = current_fiber();
  if (fiber.syncs.cluster_arrivals != fiber.syncs.cluster_waits) {
    fail("a thread arrives at the cluster barrier again before it has waited, at " + text_of(location));
  }
  check_arrival(barrier, "cluster barrier", location);
  Observed& observed = barrier.observed[fiber.syncs.cluster_arrivals % 2];
  if (barrier.arrived == 0) {
    observed.clear();
    barrier.is_release = true;
  }
  if (semantics == Arrive::kRelease) {
    merge(observed, fiber.observed);
  }
  barrier.is_release = barrier.is_release && semantics == Arrive::kRelease;
  ++fiber.syncs.cluster_arrivals;
  if (++barrier.arrived == barrier.count) {
    barrier.arrived = 0;
    barrier.was_release.push_back(barrier.is_release);
    for (unsigned number : barrier.waiting) {
      wake(m.fibers[number]);
    }
    barrier.waiting.clear();
  }
}

void wait_for_cluster(Location location) {
  Machine& m = machine();
  ClusterBarrier& barrier = m.cluster;
  Fiber& fiber = current_fiber();
  const uint32_t phase = fiber.syncs.cluster_waits;
  if (fiber.syncs.cluster_arrivals != phase + 1) {
    fail("a thread waits at the cluster barrier without having arrived, at " + text_of(location));
  }
  if (barrier.was_release.size() > phase) {
    wake(fiber);  // it queues like the others
  } else {
    barrier.waiting.push_back(fiber.number);
  }
  wait_for("cluster barrier", location);
  ++fiber.syncs.cluster_waits;
  merge(fiber.observed, barrier.observed[phase % 2]);
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width, Location location) {
  Machine& m = machine();
  Fiber& fiber = current_fiber();
  if (mask != 0xffffffffu || width == 0 || width > kWarpLanes || (width & (width - 1)) != 0) {
    fail("expected a shuffle of the whole warp in groups of a power of two, at " + text_of(location));
  }
  Warp& warp = m.warps[fiber.warp];
  if (warp.lanes != 0xffffffffu) {
    fail("a shuffle in a warp with lanes that have returned or do not exist, at " + text_of(location));
  }
  if (warp.arrived != 0 && !same(warp.location, location)) {
    fail("lanes of a warp shuffle at different places: " + text_of(warp.location) + " and " + text_of(location));
  }
  warp.location = location;
  fiber.shuffle = kind;
  fiber.value = value;
  fiber.argument = argument;
  fiber.width = width;
  warp.arrived |= 1u << fiber.lane;
  if (warp.arrived == 0xffffffffu) {
    warp.arrived = 0;
    Fiber* lanes = &fiber - fiber.lane;
    uint64_t results[kWarpLanes];
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      results[lane] = lanes[source_lane(lanes[lane])].value;
    }
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      lanes[lane].value = results[lane];
      ++lanes[lane].syncs.warp;
      wake(lanes[lane]);
    }
  }
  wait_for("shuffle", location);
  return current_fiber().value;
}

void* shared_memory(const void* key, size_t size_bytes, size_t alignment) {
  Machine& m = machine();
  Block& block = m.blocks[current_fiber().block];
  for (const auto& [known, offset] : block.shared_arrays) {
    if (known == key) {
      return block.shared + offset;
    }
  }
  // A gap that no array covers, so that an access past an array's end is out of bounds.
  constexpr size_t kGap = 64;
  const size_t offset = (block.shared_used + kGap + alignment - 1) / alignment * alignment;
  block.shared_needed += (size_bytes + alignment - 1) / alignment * alignment;
  if (block.shared_needed + m.shared_bytes > kMaxSharedBytes) {
    fail("out of shared memory: " + std::to_string(block.shared_needed) + " static and " +
         std::to_string(m.shared_bytes) + " dynamic bytes, where a block has " + std::to_string(kMaxSharedBytes));
  }
  block.shared_used = offset + size_bytes;
  block.shared_arrays.emplace_back(key, offset);
  add_shared_array(block.shared + offset, size_bytes);
  return block.shared + offset;
}

// Ends where the block's part of the emulator's memory ends, far from the static arrays.
void* dynamic_shared_memory() {
  Machine& m = machine();
  Block& block = m.blocks[current_fiber().block];
  constexpr size_t kAlignment = 128;
  char* const memory = block.shared + (kSharedStride - kAlignment - m.shared_bytes) / kAlignment * kAlignment;
  if (!block.has_dynamic_array) {
    block.has_dynamic_array = true;
    add_shared_array(memory, m.shared_bytes);
  }
  return memory;
}

const void* shared_of_block(const void* shared, unsigned rank) {
  Machine& m = machine();
  if (rank >= m.blocks.size()) {
    fail("distributed shared memory of block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(m.blocks.size()));
  }
  if (m.blocks[rank].barrier.returned > 0) {
    fail("distributed shared memory is read while threads of its block may have returned");
  }
  const char* own = m.blocks[current_fiber().block].shared;
  return m.blocks[rank].shared + (static_cast<const char*>(shared) - own);
}

}  // namespace simt
