#include "checker.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <unordered_map>

#include "machine.h"

namespace simt {
namespace {

// The smallest unit that contains all threads that have read a byte since they last synchronized.
enum class Spread : uint8_t { kNone, kThread, kWarp, kBlock, kCluster, kGrid };

// The last access of a kind, with the thread's synchronizations before it. Two of them are kept for every byte, so the
// counts are short. A count that wraps around may equal an older one, and a false race is reported; this is rare.
struct Access {
  Access() : thread(0), cluster_arrivals(0), block_syncs(0), warp_syncs(0), spread(0) {}
  Access(uint32_t in_thread, const SyncCounts& syncs, Spread distance)
      : thread(in_thread & 0xffffff),
        cluster_arrivals(syncs.cluster_arrivals & 0xff),
        block_syncs(syncs.block & 0xffff),
        warp_syncs(syncs.warp & 0x1fff),
        spread(static_cast<uint64_t>(distance)) {}

  uint64_t thread : 24;  // in the grid
  uint64_t cluster_arrivals : 8;
  uint64_t block_syncs : 16;
  uint64_t warp_syncs : 13;
  uint64_t spread : 3;

  Spread distance() const { return static_cast<Spread>(spread); }
  // Whether the thread of this access has since arrived with release semantics at a phase of the cluster barrier that
  // the other one has waited for.
  bool before_cluster_sync(const SyncCounts& syncs) const {
    const auto passed = static_cast<uint8_t>(syncs.cluster_waits - cluster_arrivals);
    const std::vector<bool>& was_release = machine().cluster.was_release;
    for (uint32_t i = 1; i <= passed && passed < 0x80; ++i) {
      if (was_release[syncs.cluster_waits - i]) {
        return true;
      }
    }
    return false;
  }
  bool before_block_sync(const SyncCounts& syncs) const { return block_syncs != (syncs.block & 0xffff); }
  bool before_warp_sync(const SyncCounts& syncs) const { return warp_syncs != (syncs.warp & 0x1fff); }
};

// Numbers of machine().copies, counted from 1; 0 is none. With kSeveral, other copies that are not known to be done
// load the same byte.
constexpr uint32_t kSeveral = 0x80000000u;

struct Cell {
  Access load;
  Access store;
  uint32_t copy_load = 0;
  uint32_t copy_store = 0;
  uint32_t era = 0;         // of the accesses: the launch's number; for shared memory, the cluster's
  uint32_t allowed_in = 0;  // of the permission: the generation of buffers
  uint16_t fences = 0;      // that the thread of `store` had executed before it
  uint8_t permission = 0;
  bool was_written = false;
};

constexpr size_t kPageBytes = 4096;
using Page = std::array<Cell, kPageBytes>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
// A direct-mapped cache of pages: fibers alternate, each with pages of its own.
struct KnownPage {
  uintptr_t number = 0;
  Page* page = nullptr;
};
std::array<KnownPage, 256> known_pages;
// forget_buffers() begins a new generation. Pages are kept, and cells of older generations are ignored.
uint32_t generation = 1;
bool has_buffers = false;
size_t unwritten = 0;
size_t rewritten = 0;

struct SharedCell {
  Cell cell;
  uint32_t cluster = 0;  // the last one in which an array covered it
  bool is_mbarrier = false;
};
std::vector<SharedCell> shared_cells;  // as machine().shared

Page* find_page(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  KnownPage& known = known_pages[number % known_pages.size()];
  if (known.page == nullptr || known.number != number) {
    const auto found = pages.find(number);
    if (found == pages.end()) {
      return nullptr;
    }
    known = {number, found->second.get()};
  }
  return known.page;
}

uint32_t thread_number(const Fiber& fiber) {
  return fiber.index.block * fiber.index.block_threads + fiber.index.thread;
}

Spread spread_between(uint32_t thread, const Fiber& fiber) {
  const uint32_t own = thread_number(fiber);
  const uint32_t threads = fiber.index.block_threads;
  const uint32_t cluster_threads = threads * fiber.index.cluster_size;
  if (thread == own) {
    return Spread::kThread;
  }
  if (thread / cluster_threads != own / cluster_threads) {
    return Spread::kGrid;
  }
  if (thread / threads != own / threads) {
    return Spread::kCluster;
  }
  return thread % threads / kWarpLanes != own % threads / kWarpLanes ? Spread::kBlock : Spread::kWarp;
}

// Whether an earlier access happens before the fiber's current one in every order in which threads may run.
bool is_ordered(const Access& earlier, const Fiber& fiber, bool a_shuffle_orders) {
  if (earlier.distance() == Spread::kNone) {
    return true;
  }
  const Spread apart = std::max(earlier.distance(), spread_between(earlier.thread, fiber));
  switch (apart) {
    case Spread::kGrid: return false;
    case Spread::kCluster: return earlier.before_cluster_sync(fiber.syncs);
    case Spread::kBlock: return earlier.before_block_sync(fiber.syncs) || earlier.before_cluster_sync(fiber.syncs);
    case Spread::kWarp:
      return earlier.before_block_sync(fiber.syncs) || earlier.before_cluster_sync(fiber.syncs) ||
             (a_shuffle_orders && earlier.before_warp_sync(fiber.syncs));
    default: return true;
  }
}

const Copy& copy_of(uint32_t number) { return machine().copies[(number & ~kSeveral) - 1]; }

bool stored_copy_is_done(const Cell& cell, const Fiber& fiber) {
  return cell.copy_store == 0 || may_use_destination(copy_of(cell.copy_store), fiber);
}

// Whether all copies that load the byte are known to be done.
bool loading_copies_are_done(const Cell& cell, uintptr_t address, const Fiber& fiber) {
  if ((cell.copy_load & kSeveral) == 0) {
    return cell.copy_load == 0 || may_overwrite_source(copy_of(cell.copy_load), fiber);
  }
  const std::vector<Copy>& copies = machine().copies;
  return std::all_of(copies.begin(), copies.end(), [&](const Copy& copy) {
    const auto begin = reinterpret_cast<uintptr_t>(copy.from);
    return address < begin || address >= begin + copy.size_bytes || may_overwrite_source(copy, fiber);
  });
}

// Whether the thread that last stored the byte has executed fence.proxy.async since, and the fiber knows of it.
bool is_fenced(const Cell& cell, const Fiber& fiber) {
  if (cell.store.distance() == Spread::kNone) {
    return true;
  }
  const unsigned first_of_cluster = (fiber.index.block - fiber.block) * fiber.index.block_threads;
  const Fiber& storing = machine().fibers[cell.store.thread - first_of_cluster];
  return storing.proxy_fences.size() > cell.fences &&
         (&storing == &fiber || storing.block != fiber.block || storing.proxy_fences[cell.fences] != fiber.syncs.block);
}

Access access_of(const Fiber& fiber, Spread spread) { return {thread_number(fiber), fiber.syncs, spread}; }

// The place in the kernel's source of the current access.
std::string source_of(const void* return_address) {
  Dl_info info;
  if (return_address == nullptr || dladdr(return_address, &info) == 0 || info.dli_fname == nullptr) {
    return "";
  }
  const auto offset =
      static_cast<size_t>(static_cast<const char*>(return_address) - static_cast<const char*>(info.dli_fbase)) - 1;
  char command[1024];
  std::snprintf(command, sizeof(command), "addr2line -ie '%s' %#zx 2>/dev/null | head -3 | tr '\\n' ' '",
                info.dli_fname, offset);
  std::string found = ", at ";
  if (FILE* pipe = popen(command, "r")) {
    char line[1024] = "";
    if (std::fgets(line, sizeof(line), pipe) != nullptr) {
      found += line;
    }
    pclose(pipe);
  }
  return found;
}

bool is_within(uintptr_t address, const void* begin, size_t size_bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  return address >= first && address < first + size_bytes;
}

struct Range {
  uintptr_t begin;
  uintptr_t end;

  bool holds(uintptr_t address) const { return begin <= address && address < end; }
};
Range host_stack{0, 0};

// Whether the program's own segments, with its constants, hold the address.
bool belongs_to_program(uintptr_t address) {
  static const std::vector<Range> segments = [] {
    std::vector<Range> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* argument) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            if (info->dlpi_phdr[i].p_type == PT_LOAD) {
              static_cast<std::vector<Range>*>(argument)->push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
            }
          }
          return 0;
        },
        &found);
    return found;
  }();
  return std::any_of(segments.begin(), segments.end(), [&](const Range& segment) { return segment.holds(address); });
}

// What accesses memory, for messages and checks.
struct Accessor {
  const void* return_address = nullptr;  // of the call that announces a thread's access
  uint32_t copy = 0;                     // number of an asynchronous copy; 0: the current thread
};

void report(const char* what, size_t size_bytes, bool is_store, const char* memory, const Accessor& by) {
  const std::string of = std::to_string(size_bytes) + " bytes of " + memory + " memory";
  if (by.copy != 0) {
    const Copy& copy = copy_of(by.copy);
    fail(std::string(what) + ": a " + (copy.is_bulk ? "bulk " : "") + "copy " + (is_store ? "to " : "from ") + of +
         ", at " + text_of(copy.location));
  } else {
    fail(std::string(what) + ": a " + (is_store ? "store" : "load") + " of " + of + source_of(by.return_address));
  }
}

// Records an access to one byte. Returns the mistake, or null.
const char* update(Cell& cell, uintptr_t address, const Fiber& fiber, uint32_t era, bool is_store, const Accessor& by) {
  if (cell.era != era) {
    cell.era = era;
    cell.load = cell.store = Access();
    cell.copy_load = cell.copy_store = 0;
  }
  if (!is_ordered(cell.store, fiber, false)) {
    return "race with another thread's store";
  }
  if (!stored_copy_is_done(cell, fiber)) {
    return is_store ? "written before a copy to it was waited for" : "read before the copy to it was waited for";
  }
  const bool is_copy = by.copy != 0;
  if (is_copy && copy_of(by.copy).is_bulk && !is_fenced(cell, fiber)) {
    return "no fence.proxy.async between a thread's store and a bulk copy";
  }
  if (!is_store && is_copy) {
    const bool is_first = loading_copies_are_done(cell, address, fiber);
    cell.copy_load = is_first ? by.copy : by.copy | kSeveral;
    return nullptr;
  }
  if (!is_store) {
    const bool replaces = is_ordered(cell.load, fiber, true);
    const Spread spread =
        replaces ? Spread::kThread : std::max(cell.load.distance(), spread_between(cell.load.thread, fiber));
    cell.load = access_of(fiber, spread);
    return nullptr;
  }
  // The lanes of a warp may have loaded a value without having used it when one of them issues a copy.
  const bool a_shuffle_orders = !is_copy;
  if (!is_ordered(cell.load, fiber, a_shuffle_orders)) {
    return "race with another thread's load";
  }
  if (!loading_copies_are_done(cell, address, fiber)) {
    return "written before a copy from it was waited for";
  }
  cell.copy_load = 0;
  cell.copy_store = by.copy;
  cell.store = is_copy ? Access() : access_of(fiber, Spread::kThread);
  cell.fences = static_cast<uint16_t>(fiber.proxy_fences.size());
  if (is_copy) {
    cell.load = Access();
  }
  cell.was_written = true;
  return nullptr;
}

void check_shared(uintptr_t address, size_t size_bytes, bool is_store, const Accessor& by) {
  const size_t offset = address - reinterpret_cast<uintptr_t>(machine().shared);
  const uint32_t cluster = machine().cluster_number;
  for (size_t i = 0; i < size_bytes; ++i) {
    if (offset + i >= shared_cells.size() || shared_cells[offset + i].cluster != cluster) {
      return report("out of bounds", size_bytes, is_store, "shared", by);
    }
    SharedCell& shared = shared_cells[offset + i];
    if (shared.is_mbarrier) {
      return report("an mbarrier object is there", size_bytes, is_store, "shared", by);
    }
    if (!is_store && !shared.cell.was_written) {
      return report("not initialized", size_bytes, is_store, "shared", by);
    }
    if (const char* wrong = update(shared.cell, address + i, current_fiber(), cluster, is_store, by)) {
      return report(wrong, size_bytes, is_store, "shared", by);
    }
  }
}

void check_device(uintptr_t address, size_t size_bytes, bool is_store, const Accessor& by) {
  const uint8_t needed = is_store ? kMayWrite : kMayRead;
  const auto era = static_cast<uint32_t>(machine().launch_number);
  for (size_t i = 0; i < size_bytes; ++i) {
    Page* page = find_page(address + i);
    Cell* cell = page == nullptr ? nullptr : &(*page)[(address + i) % kPageBytes];
    if (cell == nullptr || cell->allowed_in != generation) {
      if (!is_store && belongs_to_program(address + i)) {
        return;
      }
      return report("out of bounds", size_bytes, is_store, "device", by);
    }
    if ((cell->permission & needed) == 0) {
      return report("forbidden", size_bytes, is_store, "device", by);
    }
    if (!is_store && (cell->permission & kUninitialized) != 0 && !cell->was_written) {
      return report("not initialized", size_bytes, is_store, "device", by);
    }
    if (is_store && (cell->permission & kMustBeWritten) != 0) {
      if (!cell->was_written) {
        --unwritten;
      } else if (cell->era != machine().launch_number ||
                 cell->store.thread != (thread_number(current_fiber()) & 0xffffff)) {
        ++rewritten;
      }
    }
    if (is_store && (cell->permission & kManyWriters) != 0) {
      cell->was_written = true;
      continue;
    }
    if (const char* wrong = update(*cell, address + i, current_fiber(), era, is_store, by)) {
      return report(wrong, size_bytes, is_store, "device", by);
    }
  }
}

bool is_shared_memory(uintptr_t address) {
  return is_within(address, machine().shared, kMaxClusterBlocks * kSharedStride);
}

}  // namespace

void allow(const void* p, size_t size_bytes, uint8_t permission) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  has_buffers = true;
  for (size_t i = 0; i < size_bytes; ++i) {
    std::unique_ptr<Page>& page = pages[(address + i) / kPageBytes];
    if (page == nullptr) {
      page = std::make_unique<Page>();
    }
    Cell& cell = (*page)[(address + i) % kPageBytes];
    if (cell.allowed_in != generation) {
      cell.allowed_in = generation;
      cell.permission = 0;
      cell.was_written = false;
    }
    unwritten += (permission & kMustBeWritten & ~cell.permission) != 0 ? 1 : 0;
    cell.permission |= permission;
  }
}

void forget_buffers() {
  constexpr size_t kMaxPages = 4096;  // half a gigabyte of cells
  if (pages.size() > kMaxPages) {
    pages.clear();
    known_pages.fill({});
  }
  ++generation;
  has_buffers = false;
  unwritten = 0;
  rewritten = 0;
}

size_t count_unwritten() { return unwritten; }
size_t count_rewritten() { return rewritten; }

void remember_host_stack() {
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t size_bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &size_bytes);
  pthread_attr_destroy(&attributes);
  const auto begin = reinterpret_cast<uintptr_t>(stack);
  host_stack = {begin, begin + size_bytes};
}

void begin_checked_cluster(unsigned blocks) {
  if (shared_cells.size() < blocks * kSharedStride) {
    shared_cells.resize(blocks * kSharedStride);
  }
}

void add_shared_array(const void* p, size_t size_bytes) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - machine().shared);
  for (size_t i = 0; i < size_bytes; ++i) {
    shared_cells[offset + i] = SharedCell();
    shared_cells[offset + i].cluster = machine().cluster_number;
  }
  // NaN, in case that a value is used that was never stored.
  std::memset(const_cast<void*>(p), 0xff, size_bytes);
}

void check_access(const void* p, size_t size_bytes, bool is_store, const void* return_address) {
  Machine& m = machine();
  if (!m.is_running || !m.error.empty()) {
    return;
  }
  const Accessor by{return_address};
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (is_within(address, m.stacks, size_t{kMaxBlockThreads} * kMaxClusterBlocks * kStackBytes)) {
    if (!is_within(address, m.stacks + m.current * kStackBytes, kStackBytes)) {
      report("another thread's local memory", size_bytes, is_store, "local", by);
    }
    return;
  }
  if (!is_store && host_stack.holds(address)) {
    return;
  }
  ++m.counters.accesses;
  m.counters.wide_accesses += size_bytes == 16 ? 1 : 0;
  const bool is_vector = size_bytes <= 16 && (size_bytes & (size_bytes - 1)) == 0;
  const bool is_shared = is_shared_memory(address);
  if (!is_shared && !has_buffers) {
    return;
  }
  if (is_vector && address % size_bytes != 0) {
    report("misaligned", size_bytes, is_store, is_shared ? "shared" : "device", by);
  } else if (is_shared) {
    check_shared(address, size_bytes, is_store, by);
  } else {
    check_device(address, size_bytes, is_store, by);
  }
}

void check_load(const void* p, size_t size_bytes) { check_access(p, size_bytes, false, __builtin_return_address(0)); }
void check_store(const void* p, size_t size_bytes) { check_access(p, size_bytes, true, __builtin_return_address(0)); }

void check_copy(const Copy& copy, uint32_t number) {
  const Accessor by{nullptr, number};
  const auto check = [&](const void* p, bool is_store) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (is_shared_memory(address)) {
      check_shared(address, copy.size_bytes, is_store, by);
    } else if (has_buffers) {
      check_device(address, copy.size_bytes, is_store, by);
    }
  };
  check(copy.from, false);
  check(copy.to, true);
}

void check_mbarrier(const void* barrier, MBarrierUse use, const Location& location) {
  constexpr size_t kSizeBytes = 8;
  const auto address = reinterpret_cast<uintptr_t>(barrier);
  const auto wrong = [&](const char* what) { fail(std::string(what) + ": an mbarrier, at " + text_of(location)); };
  if (address % kSizeBytes != 0) {
    wrong("misaligned");
  }
  if (!is_shared_memory(address)) {
    wrong("out of bounds");
  }
  const size_t offset = address - reinterpret_cast<uintptr_t>(machine().shared);
  const Fiber& fiber = current_fiber();
  for (size_t i = 0; i < kSizeBytes; ++i) {
    SharedCell& shared = shared_cells[offset + i];
    if (shared.cluster != machine().cluster_number) {
      wrong("out of bounds");
    }
    if (use == MBarrierUse::kInit ? shared.is_mbarrier : !shared.is_mbarrier) {
      wrong(use == MBarrierUse::kInit ? "initialized twice" : "not initialized");
    }
    if (const char* what = update(shared.cell, address + i, fiber, shared.cluster, use == MBarrierUse::kInit, {})) {
      wrong(what);
    }
    if (use == MBarrierUse::kByCopy && !is_fenced(shared.cell, fiber)) {
      wrong("no fence.proxy.async between the initialization and a bulk copy");
    }
    shared.is_mbarrier = true;
  }
}

}  // namespace simt
