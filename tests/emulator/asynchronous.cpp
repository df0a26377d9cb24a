// Asynchronous copies, and the mbarriers and groups that tell when they are done.
#include <algorithm>

#include "checker.h"
#include "machine.h"

namespace simt {
namespace {

constexpr unsigned kAccessBytes = 16;
constexpr unsigned kMBarrierBytes = 8;
constexpr int64_t kMaxBytes = (1 << 20) - 1;  // of a phase, expected or copied

uint32_t new_source() { return ++machine().completion_sources; }

// Whether a copy is done as far as that completion goes.
void observe(Fiber& fiber, const Completion& completion) {
  if (fiber.observed.size() <= completion.source) {
    fiber.observed.resize(completion.source + 1);
  }
  fiber.observed[completion.source] = std::max(fiber.observed[completion.source], completion.count);
}

bool is_observed(const Fiber& fiber, const Completion& completion) {
  return completion.source < fiber.observed.size() && fiber.observed[completion.source] >= completion.count;
}

// Precondition: the mbarrier was initialized; check_mbarrier() tells.
MBarrier& find_mbarrier(const void* address) {
  for (MBarrier& barrier : machine().mbarriers) {
    if (barrier.address == address) {
      return barrier;
    }
  }
  fail("no mbarrier object was initialized there");
  __builtin_unreachable();
}

void complete_phase(MBarrier& barrier) {
  Machine& m = machine();
  size_t under_way = 0;
  for (unsigned number : m.unfinished_copies) {
    const Copy& copy = m.copies[number];
    under_way +=
        copy.mbarrier >= 0 && &m.mbarriers[static_cast<size_t>(copy.mbarrier)] == &barrier ? copy.size_bytes : 0;
  }
  if (under_way > 0) {
    fail("an mbarrier's phase completes while " + std::to_string(under_way) +
         " bytes are still being copied: fewer were expected than are copied; the mbarrier of " +
         text_of(barrier.location));
  }
  ++barrier.phases;
  barrier.missing_arrivals = barrier.arrivals;
  for (unsigned number : barrier.waiting) {
    wake(m.fibers[number]);
  }
  barrier.waiting.clear();
}

// Adds to what the current phase waits for, and completes it if that is nothing.
void update_phase(MBarrier& barrier, unsigned arrivals, int64_t missing_bytes) {
  if (arrivals > barrier.missing_arrivals) {
    fail("more arrivals in a phase than the mbarrier of " + text_of(barrier.location) + " was initialized for");
  }
  barrier.missing_arrivals -= arrivals;
  barrier.missing_bytes += missing_bytes;
  if (std::abs(barrier.missing_bytes) > kMaxBytes) {
    fail("more than " + std::to_string(kMaxBytes) + " bytes in a phase of the mbarrier of " +
         text_of(barrier.location));
  }
  if (barrier.missing_arrivals == 0 && barrier.missing_bytes == 0) {
    complete_phase(barrier);
  }
}

// Lets a copy take place up to a state.
void advance(Copy& copy, CopyState to) {
  Machine& m = machine();
  if (copy.state == CopyState::kIssued) {
    copy.data.assign(copy.from, copy.from + copy.size_bytes);
    copy.state = CopyState::kRead;
  }
  if (to == CopyState::kRead || copy.state == CopyState::kWritten) {
    return;
  }
  std::memcpy(copy.to, copy.data.data(), copy.size_bytes);
  copy.state = CopyState::kWritten;
  copy.data = {};
  const auto number = static_cast<unsigned>(&copy - m.copies.data());
  m.unfinished_copies.erase(std::find(m.unfinished_copies.begin(), m.unfinished_copies.end(), number));
  if (copy.mbarrier >= 0) {
    update_phase(m.mbarriers[static_cast<size_t>(copy.mbarrier)], 0, -static_cast<int64_t>(copy.size_bytes));
  }
}

void advance_any(const std::vector<unsigned>& numbers) {
  Copy& copy = machine().copies[numbers[next_random() % numbers.size()]];
  // A copy to shared memory has read and written when its mbarrier says so: the two are one step.
  const bool is_one_step = copy.mbarrier >= 0 || copy.state == CopyState::kRead;
  advance(copy, is_one_step ? CopyState::kWritten : CopyState::kRead);
}

bool is_in_shared_memory(const void* p, size_t size_bytes, unsigned block) {
  const char* const begin = machine().blocks[block].shared;
  const char* const first = static_cast<const char*>(p);
  return first >= begin && first + size_bytes <= begin + kSharedStride;
}

std::string name_of(const Copy& copy) {
  return std::string(copy.is_bulk ? "bulk " : "") + "copy of " + std::to_string(copy.size_bytes) + " bytes at " +
         text_of(copy.location);
}

void issue(Copy copy) {
  Machine& m = machine();
  Fiber& fiber = current_fiber();
  copy.cluster = m.cluster_number;
  copy.block = fiber.block;
  const auto is_multiple = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kAccessBytes == 0; };
  if (!is_multiple(copy.from) || !is_multiple(copy.to)) {
    fail("misaligned: expected addresses that are multiples of 16, but got " +
         std::to_string(reinterpret_cast<uintptr_t>(copy.from) % kAccessBytes) + " and " +
         std::to_string(reinterpret_cast<uintptr_t>(copy.to) % kAccessBytes) + " bytes more in a " + name_of(copy));
  }
  if (copy.size_bytes == 0 || copy.size_bytes % kAccessBytes != 0) {
    fail("expected a size that is a multiple of 16, and not 0, but got a " + name_of(copy));
  }
  const bool is_to_shared = is_in_shared_memory(copy.to, copy.size_bytes, fiber.block);
  const bool is_from_shared = is_in_shared_memory(copy.from, copy.size_bytes, fiber.block);
  const bool is_store = copy.is_bulk && copy.mbarrier < 0;
  if (is_to_shared == is_store || is_from_shared != is_store) {
    fail(std::string("expected a copy ") + (is_store ? "from" : "to") + " the block's shared memory: a " +
         name_of(copy));
  }
  m.copies.push_back(copy);
  const auto number = static_cast<unsigned>(m.copies.size()) - 1;
  check_copy(copy, number + 1);
  m.unfinished_copies.push_back(number);
  if (current_order() == Order::kForwards) {
    advance(m.copies[number], CopyState::kWritten);
  } else {
    std::memset(copy.to, 0xff, copy.size_bytes);  // NaN, in case that a value is used before the copy has taken place
  }
}

Groups& groups_of(Fiber& fiber, CopyGroups kind) {
  Groups& groups = fiber.groups[static_cast<size_t>(kind)];
  if (groups.read_source == 0) {
    groups.read_source = new_source();
    groups.written_source = new_source();
  }
  return groups;
}

void issue_in_group(Copy copy, CopyGroups kind) {
  const Groups& groups = groups_of(current_fiber(), kind);
  copy.read = {groups.read_source, groups.committed + 1};
  copy.written = {groups.written_source, groups.committed + 1};
  issue(copy);
}

Copy make_copy(void* to, const void* from, unsigned size_bytes, bool is_bulk, Location location) {
  Copy copy;
  copy.from = static_cast<const char*>(from);
  copy.to = static_cast<char*>(to);
  copy.size_bytes = size_bytes;
  copy.is_bulk = is_bulk;
  copy.location = location;
  return copy;
}

}  // namespace

void mbarrier_init(void* barrier, unsigned arrivals, Location location) {
  Machine& m = machine();
  const unsigned block = current_fiber().block;
  if (!is_in_shared_memory(barrier, kMBarrierBytes, block)) {
    fail("expected an mbarrier in the block's shared memory, at " + text_of(location));
  }
  if (arrivals == 0 || arrivals > kMaxBytes) {
    fail("expected an mbarrier of 1 to 2^20 - 1 arrivals, but got " + std::to_string(arrivals) + ", at " +
         text_of(location));
  }
  check_mbarrier(barrier, MBarrierUse::kInit, location);
  MBarrier object;
  object.address = barrier;
  object.block = block;
  object.source = new_source();
  object.arrivals = object.missing_arrivals = arrivals;
  object.location = location;
  m.mbarriers.push_back(object);
}

void mbarrier_arrive_expect_tx(void* barrier, unsigned size_bytes, Location location) {
  check_mbarrier(barrier, MBarrierUse::kByThread, location);
  update_phase(find_mbarrier(barrier), 1, size_bytes);
}

void mbarrier_wait_parity(void* barrier, unsigned parity, Location location) {
  check_mbarrier(barrier, MBarrierUse::kByThread, location);
  Fiber& fiber = current_fiber();
  // A thread that runs only after the next phase has completed too goes on waiting, as on a GPU.
  while (find_mbarrier(barrier).phases % 2 == parity % 2) {
    find_mbarrier(barrier).waiting.push_back(fiber.number);
    wait_for("mbarrier", location);
  }
  const MBarrier& object = find_mbarrier(barrier);
  observe(fiber, {object.source, object.phases});
}

void bulk_copy_to_shared(void* to, const void* from, unsigned size_bytes, void* barrier, Location location) {
  Copy copy = make_copy(to, from, size_bytes, true, location);
  check_mbarrier(barrier, MBarrierUse::kByCopy, location);
  const MBarrier& object = find_mbarrier(barrier);
  copy.mbarrier = static_cast<int>(&object - machine().mbarriers.data());
  copy.read = copy.written = {object.source, object.phases + 1};
  issue(copy);
}

void bulk_copy_to_global(void* to, const void* from, unsigned size_bytes, Location location) {
  issue_in_group(make_copy(to, from, size_bytes, true, location), CopyGroups::kBulk);
}

void copy_16_bytes(void* to, const void* from, Location location) {
  issue_in_group(make_copy(to, from, kAccessBytes, false, location), CopyGroups::k16Bytes);
}

void fence_proxy_async() {
  Fiber& fiber = current_fiber();
  fiber.proxy_fences.push_back(fiber.syncs.block);
}

void commit_copies(CopyGroups kind) { ++groups_of(current_fiber(), kind).committed; }

void wait_for_copies(CopyGroups kind, unsigned pending, CopyStage stage) {
  Machine& m = machine();
  Fiber& fiber = current_fiber();
  const Groups& groups = groups_of(fiber, kind);
  const uint32_t count = groups.committed > pending ? groups.committed - pending : 0;
  const std::vector<unsigned> unfinished = m.unfinished_copies;
  for (unsigned number : unfinished) {
    Copy& copy = m.copies[number];
    if (copy.cluster == m.cluster_number && copy.read.source == groups.read_source && copy.read.count <= count) {
      advance(copy, stage == CopyStage::kRead ? CopyState::kRead : CopyState::kWritten);
    }
  }
  observe(fiber, {groups.read_source, count});
  if (stage == CopyStage::kWritten) {
    observe(fiber, {groups.written_source, count});
  }
}

bool may_overwrite_source(const Copy& copy, const Fiber& fiber) {
  return copy.cluster == machine().cluster_number && is_observed(fiber, copy.read);
}
bool may_use_destination(const Copy& copy, const Fiber& fiber) {
  return copy.cluster == machine().cluster_number && is_observed(fiber, copy.written);
}

void advance_copies() {
  Machine& m = machine();
  if (current_order() == Order::kRandom && !m.unfinished_copies.empty() && next_random() % 2 == 0) {
    advance_any(m.unfinished_copies);
  }
  while (m.runnable.empty()) {  // all wait; only an mbarrier can wake them
    std::vector<unsigned> with_mbarrier;
    for (unsigned number : m.unfinished_copies) {
      if (m.copies[number].mbarrier >= 0) {
        with_mbarrier.push_back(number);
      }
    }
    if (with_mbarrier.empty()) {
      return;
    }
    advance_any(with_mbarrier);
  }
}

void check_returning_block(unsigned block) {
  Machine& m = machine();
  for (size_t i = m.first_copy_of_cluster; i < m.copies.size(); ++i) {
    const Copy& copy = m.copies[i];
    if (copy.block != block) {
      continue;
    }
    // Nobody needs to wait until device memory is written.
    const Completion& needed = is_in_shared_memory(copy.to, copy.size_bytes, block) ? copy.written : copy.read;
    const bool was_waited_for = std::any_of(m.fibers.begin(), m.fibers.end(), [&](const Fiber& fiber) {
      return fiber.block == block && is_observed(fiber, needed);
    });
    if (!was_waited_for) {
      fail("a block returns that has not waited for its " + name_of(copy));
    }
  }
}

void finish_copies() {
  Machine& m = machine();
  while (!m.unfinished_copies.empty()) {
    advance(m.copies[m.unfinished_copies.back()], CopyState::kWritten);
  }
}

std::string describe_mbarriers() {
  std::string text;
  for (const MBarrier& barrier : machine().mbarriers) {
    if (!barrier.waiting.empty()) {
      text += " an mbarrier of " + text_of(barrier.location) + " still waits for " +
              std::to_string(barrier.missing_arrivals) + " arrivals and " + std::to_string(barrier.missing_bytes) +
              " bytes;";
    }
  }
  return text;
}

}  // namespace simt
