// Barriers, shuffles and shared memory.
#include "checker.h"
#include "machine.h"

namespace simt {
namespace {

bool same(const Location& a, const Location& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text_of(const Location& location) {
  return std::string(location.file) + ":" + std::to_string(location.line);
}

template <class Count>
void arrive(Barrier& barrier, const char* what, Location location, const Count& count) {
  Machine& m = machine();
  if (barrier.arrived == 0) {
    barrier.location = location;
  } else if (!same(barrier.location, location)) {
    fail(std::string("threads synchronize at different places: some at ") + text_of(barrier.location) + ", one at " +
         text_of(location));
  }
  if (barrier.returned > 0) {
    fail(std::string("a thread waits at a ") + what + " after another thread has returned, at " + text_of(location));
  }
  if (++barrier.arrived < barrier.count) {
    wait_for(what, location);
    return;
  }
  barrier.arrived = 0;
  for (unsigned i = 0; i < barrier.count; ++i) {
    Fiber& fiber = m.fibers[barrier.first + i];
    count(fiber.syncs);
    wake(fiber);
  }
  // The last thread to arrive does not run first: it queues like the others.
  wait_for(what, location);
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

void sync_block(Location location) {
  arrive(machine().blocks[current_fiber().block].barrier, "block barrier", location,
         [](SyncCounts& syncs) { ++syncs.block; });
}

void sync_cluster(Location location) {
  arrive(machine().cluster, "cluster barrier", location, [](SyncCounts& syncs) {
    ++syncs.cluster;
    ++syncs.block;
  });
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
  Block& block = machine().blocks[current_fiber().block];
  for (const auto& [known, offset] : block.shared_arrays) {
    if (known == key) {
      return block.shared + offset;
    }
  }
  // A gap that no array covers, so that an access past an array's end is out of bounds.
  constexpr size_t kGap = 64;
  const size_t offset = (block.shared_used + kGap + alignment - 1) / alignment * alignment;
  if (offset + size_bytes > kSharedBytes) {
    fail("out of shared memory");
  }
  block.shared_used = offset + size_bytes;
  block.shared_arrays.emplace_back(key, offset);
  add_shared_array(block.shared + offset, size_bytes, current_fiber().block);
  return block.shared + offset;
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
