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
  Access() : thread(0), cluster_syncs(0), block_syncs(0), warp_syncs(0), spread(0) {}
  Access(uint32_t in_thread, const SyncCounts& syncs, Spread distance)
      : thread(in_thread & 0xffffff),
        cluster_syncs(syncs.cluster & 0xff),
        block_syncs(syncs.block & 0xffff),
        warp_syncs(syncs.warp & 0x1fff),
        spread(static_cast<uint64_t>(distance)) {}

  uint64_t thread : 24;  // in the grid
  uint64_t cluster_syncs : 8;
  uint64_t block_syncs : 16;
  uint64_t warp_syncs : 13;
  uint64_t spread : 3;

  Spread distance() const { return static_cast<Spread>(spread); }
  bool before_cluster_sync(const SyncCounts& syncs) const { return cluster_syncs != (syncs.cluster & 0xff); }
  bool before_block_sync(const SyncCounts& syncs) const { return block_syncs != (syncs.block & 0xffff); }
  bool before_warp_sync(const SyncCounts& syncs) const { return warp_syncs != (syncs.warp & 0x1fff); }
};

struct Cell {
  Access load;
  Access store;
  uint32_t era = 0;         // of the accesses: the launch's number; for shared memory, the cluster's
  uint32_t allowed_in = 0;  // of the permission: the generation of buffers
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
};
std::vector<SharedCell> shared_cells;  // as machine().shared
uint32_t cluster_number = 0;

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
    case Spread::kBlock: return earlier.before_block_sync(fiber.syncs);
    case Spread::kWarp:
      return earlier.before_block_sync(fiber.syncs) || (a_shuffle_orders && earlier.before_warp_sync(fiber.syncs));
    default: return true;
  }
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

void report(const char* what, size_t size_bytes, bool is_store, const char* memory, const void* return_address) {
  fail(std::string(what) + ": a " + (is_store ? "store" : "load") + " of " + std::to_string(size_bytes) + " bytes of " +
       memory + " memory" + source_of(return_address));
}

// Records an access to one byte. Returns the mistake, or null.
const char* update(Cell& cell, const Fiber& fiber, uint32_t era, bool is_store) {
  if (cell.era != era) {
    cell.era = era;
    cell.load = cell.store = Access();
  }
  if (!is_ordered(cell.store, fiber, false)) {
    return "race with another thread's store";
  }
  if (!is_store) {
    const bool replaces = is_ordered(cell.load, fiber, true);
    const Spread spread =
        replaces ? Spread::kThread : std::max(cell.load.distance(), spread_between(cell.load.thread, fiber));
    cell.load = access_of(fiber, spread);
    return nullptr;
  }
  if (!is_ordered(cell.load, fiber, true)) {
    return "race with another thread's load";
  }
  cell.store = access_of(fiber, Spread::kThread);
  cell.was_written = true;
  return nullptr;
}

void check_shared(uintptr_t address, size_t size_bytes, bool is_store, const void* return_address) {
  const size_t offset = address - reinterpret_cast<uintptr_t>(machine().shared);
  for (size_t i = 0; i < size_bytes; ++i) {
    SharedCell& shared = shared_cells[offset + i];
    if (shared.cluster != cluster_number) {
      return report("out of bounds", size_bytes, is_store, "shared", return_address);
    }
    if (!is_store && !shared.cell.was_written) {
      return report("not initialized", size_bytes, is_store, "shared", return_address);
    }
    if (const char* wrong = update(shared.cell, current_fiber(), cluster_number, is_store)) {
      return report(wrong, size_bytes, is_store, "shared", return_address);
    }
  }
}

void check_device(uintptr_t address, size_t size_bytes, bool is_store, const void* return_address) {
  const uint8_t needed = is_store ? kMayWrite : kMayRead;
  for (size_t i = 0; i < size_bytes; ++i) {
    Page* page = find_page(address + i);
    Cell* cell = page == nullptr ? nullptr : &(*page)[(address + i) % kPageBytes];
    if (cell == nullptr || cell->allowed_in != generation) {
      if (!is_store && belongs_to_program(address + i)) {
        return;
      }
      return report("out of bounds", size_bytes, is_store, "device", return_address);
    }
    if ((cell->permission & needed) == 0) {
      return report("forbidden", size_bytes, is_store, "device", return_address);
    }
    if (!is_store && (cell->permission & kUninitialized) != 0 && !cell->was_written) {
      return report("not initialized", size_bytes, is_store, "device", return_address);
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
    if (const char* wrong = update(*cell, current_fiber(), static_cast<uint32_t>(machine().launch_number), is_store)) {
      return report(wrong, size_bytes, is_store, "device", return_address);
    }
  }
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

void begin_checked_cluster() {
  shared_cells.resize(kMaxClusterBlocks * kSharedBytes);
  ++cluster_number;
}

void add_shared_array(const void* p, size_t size_bytes, unsigned /*block*/) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - machine().shared);
  for (size_t i = 0; i < size_bytes; ++i) {
    shared_cells[offset + i].cluster = cluster_number;
    shared_cells[offset + i].cell = Cell();
  }
  // NaN, in case that a value is used that was never stored.
  std::memset(const_cast<void*>(p), 0xff, size_bytes);
}

void check_access(const void* p, size_t size_bytes, bool is_store, const void* return_address) {
  Machine& m = machine();
  if (!m.is_running || !m.error.empty()) {
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (is_within(address, m.stacks, size_t{kMaxBlockThreads} * kMaxClusterBlocks * kStackBytes)) {
    if (!is_within(address, m.stacks + m.current * kStackBytes, kStackBytes)) {
      report("another thread's local memory", size_bytes, is_store, "local", return_address);
    }
    return;
  }
  if (!is_store && host_stack.holds(address)) {
    return;
  }
  ++m.counters.accesses;
  m.counters.wide_accesses += size_bytes == 16 ? 1 : 0;
  const bool is_vector = size_bytes <= 16 && (size_bytes & (size_bytes - 1)) == 0;
  const bool is_shared = is_within(address, m.shared, kMaxClusterBlocks * kSharedBytes);
  if (!is_shared && !has_buffers) {
    return;
  }
  if (is_vector && address % size_bytes != 0) {
    report("misaligned", size_bytes, is_store, is_shared ? "shared" : "device", return_address);
  } else if (is_shared) {
    check_shared(address, size_bytes, is_store, return_address);
  } else {
    check_device(address, size_bytes, is_store, return_address);
  }
}

void check_load(const void* p, size_t size_bytes) { check_access(p, size_bytes, false, __builtin_return_address(0)); }
void check_store(const void* p, size_t size_bytes) { check_access(p, size_bytes, true, __builtin_return_address(0)); }

}  // namespace simt
