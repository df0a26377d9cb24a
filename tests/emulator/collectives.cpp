// What threads do together: barriers, shuffles, shared memory.
#include "checker.h"
#include "machine.h"

namespace simt {
namespace {

bool same(const Place& a, const Place& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text_of(const Place& place) { return std::string(place.file) + ":" + std::to_string(place.line); }

template <class Meet>
void arrive(Barrier& barrier, const char* what, Place place, const Meet& meet) {
  Machine& m = machine();
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (!same(barrier.place, place)) {
    fail(std::string("threads meet at different places: some at ") + text_of(barrier.place) + ", one at " +
         text_of(place));
  }
  if (barrier.returned > 0) {
    fail(std::string("a thread waits at a ") + what + " that another one has left for good, at " + text_of(place));
  }
  if (++barrier.arrived < barrier.count) {
    wait_for(what, place);
    return;
  }
  barrier.arrived = 0;
  for (unsigned i = 0; i < barrier.count; ++i) {
    Fiber& fiber = m.fibers[barrier.first + i];
    meet(fiber.met);
    wake(fiber);
  }
  // The last one queues like the others: it has no right to go first.
  wait_for(what, place);
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

void sync_block(Place place) {
  arrive(machine().blocks[current_fiber().block].barrier, "block barrier", place, [](Meetings& met) { ++met.block; });
}

void sync_cluster(Place place) {
  arrive(machine().cluster, "cluster barrier", place, [](Meetings& met) {
    ++met.cluster;
    ++met.block;
  });
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width, Place place) {
  Machine& m = machine();
  Fiber& fiber = current_fiber();
  if (mask != 0xffffffffu || width == 0 || width > kWarpLanes || (width & (width - 1)) != 0) {
    fail("expected a shuffle of the whole warp in groups of a power of two, at " + text_of(place));
  }
  Warp& warp = m.warps[fiber.warp];
  if (warp.lanes != 0xffffffffu) {
    fail("a shuffle of the whole warp, of whose lanes some have returned or never were, at " + text_of(place));
  }
  if (warp.arrived != 0 && !same(warp.place, place)) {
    fail("lanes of a warp shuffle at different places: " + text_of(warp.place) + " and " + text_of(place));
  }
  warp.place = place;
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
      ++lanes[lane].met.warp;
      wake(lanes[lane]);
    }
  }
  wait_for("shuffle", place);
  return current_fiber().value;
}

void* shared_memory(const void* key, size_t size_bytes, size_t alignment) {
  Block& block = machine().blocks[current_fiber().block];
  for (const auto& [known, offset] : block.shared_arrays) {
    if (known == key) {
      return block.shared + offset;
    }
  }
  // A gap that belongs to nobody keeps neighbours apart.
  constexpr size_t kGap = 64;
  const size_t offset = (block.shared_used + kGap + alignment - 1) / alignment * alignment;
  if (offset + size_bytes > kSharedBytes) {
    fail("more shared memory than a block has");
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
    fail("distributed shared memory is read when threads of its block may have returned");
  }
  const char* own = m.blocks[current_fiber().block].shared;
  return m.blocks[rank].shared + (static_cast<const char*>(shared) - own);
}

}  // namespace simt
