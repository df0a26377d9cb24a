// The emulator itself: threads exchange values, and each kind of mistake is found.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "checker.h"
#include "simt.h"

namespace {

using simt::Grid;
using simt::Location;
using simt::this_thread;

template <class Kernel>
std::string error_in_order(unsigned seed, const Grid& grid, const Kernel& kernel) {
  constexpr simt::Order kOrders[] = {simt::Order::kForwards, simt::Order::kBackwards, simt::Order::kRandom};
  simt::set_order(kOrders[seed % 3], seed);
  simt::launch(grid, kernel);
  const std::string error = simt::error();
  simt::clear_error();
  return error;
}

constexpr unsigned kSeeds = 12;

// Runs a kernel in several orders of its threads, and expects a mistake to be reported in one of them.
template <class Kernel>
void expect_error(const char* part, const Grid& grid, const Kernel& kernel) {
  std::string errors;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    const std::string error = error_in_order(seed, grid, kernel);
    if (error.find(part) != std::string::npos) {
      return;
    }
    errors += "'" + error + "' ";
  }
  CHECK(false, "expected '" << part << "', but got " << errors);
}

// Expects it to be reported whichever order the threads run in, and whenever asynchronous copies take place.
template <class Kernel>
void expect_error_in_every_order(const char* part, const Grid& grid, const Kernel& kernel) {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    const std::string error = error_in_order(seed, grid, kernel);
    CHECK(error.find(part) != std::string::npos, "expected '" << part << "', but got '" << error << "'");
  }
}

template <class Kernel>
void expect_success(const Grid& grid, const Kernel& kernel) {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    const std::string error = error_in_order(seed, grid, kernel);
    CHECK(error.empty(), error);
  }
}

void sync_block() { simt::sync_block(Location::current()); }

// A shared variable. write() and read() announce the access, as the compiler does in kernels.
int& shared_int() {
  return *static_cast<int*>(simt::shared_array([] {}, sizeof(int), alignof(int)));
}
void write(int& to, int value) {
  simt::check_store(&to, sizeof(int));
  to = value;
}
int read(const int& from) {
  simt::check_load(&from, sizeof(int));
  return from;
}

// A kernel with one mbarrier, two stages in dynamic shared memory, and device memory to copy from and to.
constexpr unsigned kStageBytes = 64;
constexpr Grid kStaged{1, 64, 1, 2 * kStageBytes};

struct DeviceMemory {
  // Not on the host's stack, which kernels may read.
  std::vector<int> inputs = std::vector<int>(64);
  std::vector<int> outputs = std::vector<int>(64);
  int* input = inputs.data();
  int* output = outputs.data();

  DeviceMemory() {
    for (int i = 0; i < 64; ++i) {
      input[i] = i + 1;
    }
    simt::forget_buffers();
    simt::allow(input, 64 * sizeof(int), simt::kMayRead | simt::kMayWrite);
    simt::allow(output, 64 * sizeof(int), simt::kMayRead | simt::kMayWrite | simt::kUninitialized);
  }
  ~DeviceMemory() { simt::forget_buffers(); }
};

int* stage(int number) {
  return static_cast<int*>(simt::dynamic_shared_memory()) + number * static_cast<int>(kStageBytes / sizeof(int));
}
void* mbarrier() {
  return simt::shared_array([] {}, 8, 8);
}
void init_mbarrier() {
  if (this_thread().thread == 0) {
    simt::mbarrier_init(mbarrier(), 1, Location::current());
    simt::fence_proxy_async();
  }
  sync_block();
}
void copy_in(void* to, const void* from, unsigned size_bytes) {
  simt::bulk_copy_to_shared(to, from, size_bytes, mbarrier(), Location::current());
}
void copy_out(void* to, const void* from, unsigned size_bytes) {
  simt::bulk_copy_to_global(to, from, size_bytes, Location::current());
}
void expect_bytes(unsigned size_bytes) { simt::mbarrier_arrive_expect_tx(mbarrier(), size_bytes, Location::current()); }
void wait_parity(unsigned parity) { simt::mbarrier_wait_parity(mbarrier(), parity, Location::current()); }
void wait_for_stores(unsigned pending, simt::CopyStage until) {
  simt::wait_for_copies(simt::CopyGroups::kBulk, pending, until);
}
bool is_first() { return this_thread().thread == 0; }

// Every thread has the stage's int of its number modulo 16.
int& own_int(int stage_number) { return stage(stage_number)[this_thread().thread % 16]; }

}  // namespace

TEST("machine: every thread of every block runs once and knows its index") {
  std::vector<int> runs(7 * 96);
  simt::launch({7, 96, 1}, [&] { ++runs[this_thread().block * 96 + this_thread().thread]; });
  for (int count : runs) {
    CHECK(count == 1, count);
  }
}

TEST("machine: shuffles move a value within its group of lanes only") {
  for (unsigned width : {2u, 8u, 32u}) {
    std::vector<unsigned> up(64);
    std::vector<unsigned> across(64);
    expect_success({1, 64, 1}, [&] {
      const unsigned own = this_thread().thread;
      up[own] = simt::shuffle_up(0xffffffffu, own, 1, width, Location::current());
      across[own] = simt::shuffle_xor(0xffffffffu, own, width / 2, width, Location::current());
    });
    for (unsigned i = 0; i < 64; ++i) {
      CHECK(up[i] == (i % width == 0 ? i : i - 1), width << ", " << i << ": " << up[i]);
      CHECK(across[i] == (i ^ (width / 2)), width << ", " << i << ": " << across[i]);
    }
  }
}

TEST("machine: a value stored before a barrier is loaded after it, also from another block of the cluster") {
  expect_success({1, 128, 1}, [] {
    int& shared = shared_int();
    if (this_thread().thread == 77) {
      write(shared, 5);
    }
    sync_block();
    if (read(shared) != 5) {
      simt::sync_cluster(Location::current());  // no other thread arrives: a deadlock
    }
  });
  std::vector<int> got(4);
  expect_success({4, 32, 4}, [&] {
    int& shared = shared_int();
    if (this_thread().thread == 0) {
      write(shared, static_cast<int>(this_thread().cluster_rank) * 10);
    }
    simt::sync_cluster(Location::current());
    const unsigned next = (this_thread().cluster_rank + 1) % 4;
    const int value = read(*static_cast<const int*>(simt::shared_of_block(&shared, next)));
    got[this_thread().cluster_rank] = value;
    simt::sync_cluster(Location::current());
  });
  CHECK((got == std::vector<int>{10, 20, 30, 0}), got[0] << " " << got[1] << " " << got[2] << " " << got[3]);
}

TEST("machine: orders differ, and a seed reproduces its order") {
  const auto order_of = [](simt::Order order, uint64_t seed) {
    std::vector<unsigned> order_of_threads;
    simt::set_order(order, seed);
    simt::launch({1, 64, 1}, [&] { order_of_threads.push_back(this_thread().thread); });
    return order_of_threads;
  };
  const std::vector<unsigned> forwards = order_of(simt::Order::kForwards, 1);
  CHECK(forwards.front() == 0 && forwards.back() == 63, forwards.front() << " " << forwards.back());
  CHECK(order_of(simt::Order::kRandom, 1) == order_of(simt::Order::kRandom, 1), "seed 1 twice");
  CHECK(order_of(simt::Order::kRandom, 1) != order_of(simt::Order::kRandom, 2), "seeds 1 and 2");
}

TEST("checker: races in shared memory") {
  expect_error("race with another thread's store", {1, 64, 1}, [] {
    int& shared = shared_int();
    if (this_thread().thread == 40) {
      write(shared, 1);
    }
    simt::shuffle_xor(0xffffffffu, 1, 1, 32, Location::current());  // orders only a warp's loads before its stores
    if (this_thread().thread == 0) {
      sync_block();
    } else {
      read(shared);
    }
  });
  expect_error("race with another thread's load", {1, 64, 1}, [] {
    int& shared = shared_int();
    if (this_thread().thread == 0) {
      write(shared, 1);
    }
    sync_block();
    read(shared);
    if (this_thread().thread == 50) {
      write(shared, 2);
    }
  });
  expect_error("race with another thread's store", {2, 32, 2},
               [] {  // a block's barrier does not synchronize the cluster
                 int& shared = shared_int();
                 if (this_thread().thread == 0) {
                   write(shared, 1);
                 }
                 sync_block();
                 const unsigned other = 1 - this_thread().cluster_rank;
                 read(*static_cast<const int*>(simt::shared_of_block(&shared, other)));
                 simt::sync_cluster(Location::current());
               });
}

TEST("checker: races in device memory") {
  std::vector<int> memory(4);
  simt::forget_buffers();
  simt::allow(memory.data(), 16, simt::kMayRead | simt::kMayWrite);
  expect_error("race with another thread's store", {2, 32, 1}, [&] {
    if (this_thread().thread == 0) {
      write(memory[1], 1);
    }
  });
  expect_error("race", {1, 64, 1}, [&] {
    if (this_thread().thread == 0) {
      write(memory[2], 1);
    } else {
      read(memory[2]);
    }
  });
  simt::forget_buffers();
}

TEST("checker: accesses that are out of bounds, forbidden, misaligned or of uninitialized memory") {
  std::vector<int> memory(8);
  const auto single = [&](const char* part, const auto& access) {
    simt::forget_buffers();
    simt::allow(memory.data(), 12, simt::kMayRead);
    simt::allow(memory.data() + 4, 4, simt::kMayRead | simt::kMayWrite | simt::kUninitialized);
    expect_error(part, {1, 1, 1}, access);
    simt::forget_buffers();
  };
  single("out of bounds", [&] { read(memory[3]); });
  single("out of bounds", [&] { write(memory[5], 1); });
  single("forbidden", [&] { write(memory[0], 1); });
  single("not initialized", [&] { read(memory[4]); });
  single("misaligned", [&] { simt::check_load(reinterpret_cast<char*>(memory.data()) + 2, 4); });
  expect_error("not initialized", {1, 1, 1}, [] { read(shared_int()); });
  expect_error("out of bounds", {1, 1, 1}, [] { write(*(&shared_int() + 1), 1); });
  expect_error("another thread's local memory", {1, 2, 1}, [] {
    static int* local_of_first;
    int local = 0;
    if (this_thread().thread == 0) {
      local_of_first = &local;
    }
    sync_block();
    if (this_thread().thread == 1) {
      read(*local_of_first);
    }
    sync_block();
  });
}

TEST("checker: bytes that must be written are counted until they are written") {
  std::vector<int> memory(4);
  simt::forget_buffers();
  simt::allow(memory.data(), 16, simt::kMayWrite | simt::kMustBeWritten);
  expect_success({1, 1, 1}, [&] { write(memory[1], 1); });
  CHECK(simt::count_unwritten() == 12, simt::count_unwritten());
  simt::forget_buffers();
}

TEST("machine: asynchronous copies bring the right bytes, whenever they take place") {
  DeviceMemory memory;
  int* const input = memory.input;
  int* const output = memory.output;
  for (unsigned seed = 0; seed < 30; ++seed) {
    std::fill(output, output + 64, 0);
    const std::string error = error_in_order(seed, kStaged, [&] {
      // Phase 0 fills stage 0, phase 1 stage 1, phase 2 stage 0 again. Each is doubled in place and copied out.
      init_mbarrier();
      for (unsigned phase = 0; phase < 3; ++phase) {
        int* const own = stage(phase % 2);
        if (is_first()) {
          expect_bytes(kStageBytes);
          copy_in(own, input + phase * 16, 16);
          copy_in(own + 4, input + phase * 16 + 4, kStageBytes - 16);
        }
        wait_parity(phase % 2);
        if (this_thread().thread < 16) {
          write(own_int(phase % 2), 2 * read(own_int(phase % 2)));
          simt::fence_proxy_async();
        }
        sync_block();
        if (is_first()) {
          copy_out(output + phase * 16, own, kStageBytes);
          simt::commit_copies(simt::CopyGroups::kBulk);
          wait_for_stores(1, simt::CopyStage::kRead);
          if (phase == 2) {
            wait_for_stores(0, simt::CopyStage::kRead);
          }
        }
      }
      // The last part goes through copies of 16 bytes.
      sync_block();
      const unsigned own = this_thread().thread * 4;
      if (own < 16) {
        simt::copy_16_bytes(stage(1) + own, input + 48 + own, Location::current());
        simt::commit_copies(simt::CopyGroups::k16Bytes);
        simt::wait_for_copies(simt::CopyGroups::k16Bytes, 0, simt::CopyStage::kWritten);
      }
      sync_block();
      if (this_thread().thread < 16) {
        write(output[48 + this_thread().thread], 2 * read(own_int(1)));
      }
    });
    CHECK(error.empty(), "seed " << seed << ": " << error);
    for (int i = 0; i < 64; ++i) {
      CHECK(output[i] == 2 * input[i], "seed " << seed << ", " << i << ": " << output[i]);
    }
  }
}

TEST("machine: a phase completes with no bytes, and with bytes that come before they are expected") {
  DeviceMemory memory;
  expect_success(kStaged, [&] {
    init_mbarrier();
    if (is_first()) {
      expect_bytes(0);
    }
    wait_parity(0);
    sync_block();
    if (is_first()) {
      copy_in(stage(0), memory.input, 32);
      copy_in(stage(0) + 8, memory.input, 32);
      expect_bytes(64);
    }
    wait_parity(1);
    read(own_int(0));
  });
}

TEST("checker: a copied stage that is read before its barrier's phase") {
  DeviceMemory memory;
  const auto kernel = [&](const auto& before_reading) {
    return [&] {
      init_mbarrier();
      if (is_first()) {
        expect_bytes(kStageBytes);
        copy_in(stage(0), memory.input, kStageBytes);
      }
      sync_block();
      before_reading();
      read(own_int(0));
      wait_parity(0);
    };
  };
  constexpr const char* kError = "read before the copy to it was waited for";
  expect_error_in_every_order(kError, kStaged, kernel([] {}));
  expect_error(kError, kStaged, kernel([] { wait_parity(1); }));  // the phase before
  // A thread that waits does not wait for the others, unless they meet.
  expect_error_in_every_order(kError, kStaged, kernel([] {
                                if (is_first()) {
                                  wait_parity(0);
                                }
                              }));
  expect_success(kStaged, kernel([] {
                   if (is_first()) {
                     wait_parity(0);
                   }
                   sync_block();
                 }));
  // A copy of 16 bytes, which only the thread that issued it can wait for.
  const auto small = [&](unsigned pending, bool commits) {
    return [&memory, pending, commits] {
      if (is_first()) {
        simt::copy_16_bytes(stage(0), memory.input, Location::current());
        if (commits) {
          simt::commit_copies(simt::CopyGroups::k16Bytes);
        }
        simt::wait_for_copies(simt::CopyGroups::k16Bytes, pending, simt::CopyStage::kWritten);
      }
      sync_block();
      read(stage(0)[3]);
    };
  };
  expect_error_in_every_order(kError, kStaged, small(1, true));
  expect_error_in_every_order(kError, kStaged, small(0, false));
  expect_success(kStaged, small(0, true));
}

TEST("checker: an mbarrier that expects other bytes than are copied") {
  DeviceMemory memory;
  const auto expect = [&](unsigned size_bytes) {
    return [&memory, size_bytes] {
      init_mbarrier();
      if (is_first()) {
        expect_bytes(size_bytes);
        copy_in(stage(0), memory.input, 32);
        copy_in(stage(0) + 8, memory.input, 32);
      }
      wait_parity(0);
      read(own_int(0));
    };
  };
  expect_success(kStaged, expect(64));
  expect_error_in_every_order("still waits for 0 arrivals and 16 bytes", kStaged, expect(80));
  expect_error("completes while 32 bytes are still being copied", kStaged, expect(32));
  // Whenever the copies take place, something is found: in the second copy's phase, none of its bytes may be read.
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    CHECK(!error_in_order(seed, kStaged, expect(32)).empty(), "seed " << seed);
    CHECK(!error_in_order(seed, kStaged, expect(0)).empty(), "seed " << seed);
  }
  expect_error_in_every_order("more than 1048575 bytes", kStaged, expect(1 << 20));
  expect_error_in_every_order("still waits for 1 arrivals and -64 bytes", kStaged, [&] {  // nobody arrives
    init_mbarrier();
    if (is_first()) {
      copy_in(stage(0), memory.input, 64);
    }
    wait_parity(0);
  });
  expect_error_in_every_order("more arrivals in a phase", kStaged, [&] {
    init_mbarrier();
    if (is_first()) {
      expect_bytes(64);
      expect_bytes(0);
    }
  });
}

TEST("checker: a stage that is overwritten while threads may read it, or while a copy fills it") {
  DeviceMemory memory;
  const auto kernel = [&](const auto& before_refill) {
    return [&] {
      init_mbarrier();
      if (is_first()) {
        expect_bytes(kStageBytes);
        copy_in(stage(0), memory.input, kStageBytes);
      }
      wait_parity(0);
      read(own_int(0));
      before_refill();
      if (is_first()) {
        expect_bytes(kStageBytes);
        copy_in(stage(0), memory.input, kStageBytes);
      }
      wait_parity(1);
    };
  };
  const auto shuffle = [] { simt::shuffle_xor(0xffffffffu, 1, 1, 32, Location::current()); };
  expect_error("race with another thread's load", kStaged, kernel([] {}));
  expect_error("race with another thread's load", kStaged, kernel(shuffle));
  for (unsigned seed = 0; seed < kSeeds; ++seed) {  // in other orders, other threads miss a phase
    CHECK(!error_in_order(seed, kStaged, kernel([] {})).empty(), "seed " << seed);
    CHECK(!error_in_order(seed, kStaged, kernel(shuffle)).empty(), "seed " << seed);
  }
  expect_success(kStaged, kernel([] { sync_block(); }));
  const auto twice = [&](bool by_copy) {
    return [&memory, by_copy] {
      init_mbarrier();
      if (is_first()) {
        expect_bytes(kStageBytes * (by_copy ? 2 : 1));
        copy_in(stage(0), memory.input, kStageBytes);
        if (by_copy) {
          copy_in(stage(0), memory.input, kStageBytes);
        } else {
          write(own_int(0), 1);
        }
      }
      wait_parity(0);
    };
  };
  expect_error_in_every_order("written before a copy to it was waited for", kStaged, twice(true));
  expect_error_in_every_order("written before a copy to it was waited for", kStaged, twice(false));
}

TEST("checker: memory that is changed while a copy may still read it") {
  DeviceMemory memory;
  constexpr const char* kError = "written before a copy from it was waited for";
  const auto store = [&](unsigned pending, bool commits) {
    return [&memory, pending, commits] {
      if (is_first()) {
        for (int i = 0; i < 4; ++i) {
          write(stage(0)[i], i);
        }
        simt::fence_proxy_async();
        copy_out(memory.output, stage(0), 16);
        if (commits) {
          simt::commit_copies(simt::CopyGroups::kBulk);
        }
        copy_out(memory.output + 4, stage(0), 16);
        simt::commit_copies(simt::CopyGroups::kBulk);
        wait_for_stores(pending, simt::CopyStage::kRead);
        write(stage(0)[1], 7);
        wait_for_stores(0, simt::CopyStage::kRead);
      }
    };
  };
  expect_success(kStaged, store(0, true));
  expect_error_in_every_order(kError, kStaged, store(1, true));
  expect_error_in_every_order(kError, kStaged, store(1, false));
  // Copies of several threads from the same memory, of which the last one is waited for.
  const auto several = [&](bool first_waits) {
    return [&memory, first_waits] {
      if (this_thread().thread < 16) {
        write(own_int(0), 0);
        simt::fence_proxy_async();
      }
      for (unsigned issuing : {20u, 40u}) {
        sync_block();
        if (this_thread().thread == issuing) {
          copy_out(memory.output + issuing / 5 * 4, stage(0), 16);
          simt::commit_copies(simt::CopyGroups::kBulk);
          if (issuing == 40 || first_waits) {
            wait_for_stores(0, simt::CopyStage::kRead);
          }
        }
      }
      sync_block();
      if (is_first()) {
        write(own_int(0), 1);
      }
      sync_block();
      if (this_thread().thread == 20) {
        wait_for_stores(0, simt::CopyStage::kRead);
      }
    };
  };
  expect_success(kStaged, several(true));
  expect_error_in_every_order(kError, kStaged, several(false));
  // Rows in place: what a copy reads from device memory, too.
  expect_error_in_every_order(kError, kStaged, [&] {
    init_mbarrier();
    if (is_first()) {
      expect_bytes(16);
      copy_in(stage(0), memory.input, 16);
      write(memory.input[2], 5);
    }
    wait_parity(0);
  });
  // What a bulk store writes may be read after the writes were waited for, not only the reads.
  const auto read_back = [&](simt::CopyStage until) {
    return [&memory, until] {
      if (is_first()) {
        for (int i = 0; i < 4; ++i) {
          write(stage(0)[i], i);
        }
        simt::fence_proxy_async();
        copy_out(memory.output, stage(0), 16);
        simt::commit_copies(simt::CopyGroups::kBulk);
        wait_for_stores(0, until);
        read(memory.output[0]);
      }
    };
  };
  expect_success(kStaged, read_back(simt::CopyStage::kWritten));
  expect_error_in_every_order("read before the copy to it was waited for", kStaged, read_back(simt::CopyStage::kRead));
}

TEST("checker: what a thread stored is visible to a bulk copy after its fence and a barrier") {
  DeviceMemory memory;
  const auto kernel = [&](bool fence_before, bool fence_after) {
    return [&memory, fence_before, fence_after] {
      if (this_thread().thread < 16) {
        write(own_int(0), 1);
      }
      if (fence_before) {
        simt::fence_proxy_async();
      }
      sync_block();
      if (fence_after) {
        simt::fence_proxy_async();
      }
      if (is_first()) {
        copy_out(memory.output, stage(0), kStageBytes);
        simt::commit_copies(simt::CopyGroups::kBulk);
        wait_for_stores(0, simt::CopyStage::kRead);
      }
    };
  };
  expect_success(kStaged, kernel(true, false));
  expect_error_in_every_order("no fence.proxy.async", kStaged, kernel(false, false));
  expect_error_in_every_order("no fence.proxy.async", kStaged, kernel(false, true));
  expect_error("race with another thread's store", kStaged, [&] {  // no barrier
    if (this_thread().thread < 16) {
      write(own_int(0), 1);
      simt::fence_proxy_async();
    } else if (this_thread().thread == 40) {
      copy_out(memory.output, stage(0), kStageBytes);
    }
  });
}

TEST("checker: bulk copies of odd sizes, addresses or places") {
  DeviceMemory memory;
  char* const input = reinterpret_cast<char*>(memory.input);
  const auto copy = [&](unsigned to, unsigned from, unsigned size_bytes) {
    return [=] {
      init_mbarrier();
      if (is_first()) {
        expect_bytes(size_bytes);
        copy_in(reinterpret_cast<char*>(stage(0)) + to, input + from, size_bytes);
      }
      wait_parity(0);
    };
  };
  expect_success(kStaged, copy(16, 32, 48));
  expect_error_in_every_order("misaligned", kStaged, copy(0, 8, 16));
  expect_error_in_every_order("misaligned", kStaged, copy(4, 0, 16));
  expect_error_in_every_order("expected a size that is a multiple of 16", kStaged, copy(0, 0, 24));
  expect_error_in_every_order("expected a size that is a multiple of 16", kStaged, copy(0, 0, 0));
  expect_error_in_every_order("out of bounds", kStaged, copy(0, 240, 32));
  expect_error_in_every_order("out of bounds", kStaged, copy(64, 0, 80));
  expect_error_in_every_order("expected a copy to the block's shared memory", kStaged, [&] {
    init_mbarrier();
    copy_in(memory.output, memory.input, 16);
  });
  expect_error_in_every_order("expected a copy from the block's shared memory", kStaged,
                              [&] { copy_out(memory.output, memory.input, 16); });
  expect_error_in_every_order("misaligned", kStaged,
                              [&] { simt::copy_16_bytes(stage(0), input + 4, Location::current()); });
}

TEST("checker: shared memory beyond the launch's, and mbarriers that are not used as such") {
  DeviceMemory memory;
  expect_error_in_every_order("out of bounds", kStaged, [] { write(stage(2)[0], 1); });
  expect_error_in_every_order("out of shared memory", {1, 32, 1, simt::kMaxSharedBytes - 8}, [] {
    shared_int();
    mbarrier();
  });
  expect_error_in_every_order("an mbarrier object is there", kStaged, [] {
    init_mbarrier();
    read(*static_cast<int*>(mbarrier()));
  });
  expect_error_in_every_order("not initialized", kStaged, [] { wait_parity(0); });
  expect_error_in_every_order("initialized twice", kStaged, [] {
    init_mbarrier();
    init_mbarrier();
  });
  expect_error("race with another thread's store", kStaged, [] {
    if (is_first()) {
      simt::mbarrier_init(mbarrier(), 1, Location::current());
      expect_bytes(0);
    } else if (this_thread().thread == 63) {
      wait_parity(1);
    }
  });
  expect_error_in_every_order("no fence.proxy.async between the initialization", kStaged, [&] {
    if (is_first()) {
      simt::mbarrier_init(mbarrier(), 1, Location::current());
      expect_bytes(16);
      copy_in(stage(0), memory.input, 16);
    }
  });
}

TEST("checker: a block that returns with copies under way") {
  DeviceMemory memory;
  expect_error_in_every_order("has not waited for its bulk copy of 16 bytes", kStaged, [&] {
    init_mbarrier();
    if (is_first()) {
      expect_bytes(16);
      copy_in(stage(0), memory.input, 16);
    }
  });
  const auto store = [&](bool waits) {
    return [&memory, waits] {
      if (is_first()) {
        for (int i = 0; i < 4; ++i) {
          write(stage(0)[i], 3);
        }
        simt::fence_proxy_async();
        copy_out(memory.output, stage(0), 16);
        simt::commit_copies(simt::CopyGroups::kBulk);
        if (waits) {
          wait_for_stores(0, simt::CopyStage::kRead);
        }
      }
    };
  };
  expect_error_in_every_order("has not waited for its bulk copy of 16 bytes", kStaged, store(false));
  expect_success(kStaged, store(true));
  CHECK(memory.output[0] == 3 && memory.output[3] == 3, "a store that nobody waits for takes place before the end");
  expect_error_in_every_order("has not waited for its copy of 16 bytes", kStaged, [&] {
    if (is_first()) {
      simt::copy_16_bytes(stage(0), memory.input, Location::current());
    }
  });
}

TEST("machine: a cluster's barrier in two steps orders what comes before the arrive, if that is a release") {
  const auto kernel = [](simt::Arrive semantics, bool arrives_early) {
    return [=] {
      int& shared = shared_int();
      if (arrives_early) {
        simt::arrive_at_cluster(semantics, Location::current());
      }
      if (is_first()) {
        write(shared, 1);
      }
      if (!arrives_early) {
        simt::arrive_at_cluster(semantics, Location::current());
      }
      simt::wait_for_cluster(Location::current());
      read(*static_cast<const int*>(simt::shared_of_block(&shared, 1 - this_thread().cluster_rank)));
      simt::arrive_at_cluster(simt::Arrive::kRelaxed, Location::current());  // only keeps the blocks' memory
      simt::wait_for_cluster(Location::current());
    };
  };
  expect_success({4, 32, 2}, kernel(simt::Arrive::kRelease, false));
  expect_error("race with another thread's store", {4, 32, 2}, kernel(simt::Arrive::kRelaxed, false));
  expect_error("race with another thread's store", {4, 32, 2}, kernel(simt::Arrive::kRelease, true));
  expect_error_in_every_order("before it has waited", {2, 32, 2}, [] {
    simt::arrive_at_cluster(simt::Arrive::kRelease, Location::current());
    simt::arrive_at_cluster(simt::Arrive::kRelease, Location::current());
  });
  expect_error_in_every_order("without having arrived", {2, 32, 2},
                              [] { simt::wait_for_cluster(Location::current()); });
  expect_error_in_every_order("arrived at the cluster barrier but not waited", {2, 32, 2},
                              [] { simt::arrive_at_cluster(simt::Arrive::kRelease, Location::current()); });
}

TEST("machine: threads that do not synchronize together are reported") {
  expect_error("deadlock", {1, 64, 1}, [] {
    if (this_thread().thread < 32) {
      sync_block();
    } else {
      simt::sync_cluster(Location::current());
    }
  });
  expect_error("returns while other threads", {1, 64, 1}, [] {
    if (this_thread().thread != 3) {
      sync_block();
    }
  });
  expect_error("different places", {1, 32, 1}, [] {
    if (this_thread().thread < 16) {
      simt::shuffle_xor(0xffffffffu, 1, 1, 32, Location::current());
    } else {
      simt::shuffle_xor(0xffffffffu, 1, 1, 32, Location::current());
    }
  });
  expect_error("lanes that have returned or do not exist", {1, 40, 1},
               [] { simt::shuffle_xor(0xffffffffu, 1, 1, 32, Location::current()); });
  expect_error("threads of its block may have returned", {2, 32, 2}, [] {
    int& shared = shared_int();
    if (this_thread().cluster_rank == 1) {
      return;
    }
    for (int i = 0; i < 100; ++i) {
      simt::shuffle_xor(0xffffffffu, 1, 1, 32, Location::current());
    }
    read(*static_cast<const int*>(simt::shared_of_block(&shared, 1)));
  });
}

TEST("machine: launches that no device accepts") {
  for (const Grid& grid : {Grid{0, 32, 1}, Grid{1, 0, 1}, Grid{1, 1025, 1}, Grid{3, 32, 2}, Grid{32, 32, 32},
                           Grid{1, 32, 1, simt::kMaxSharedBytes + 1}}) {
    CHECK(simt::launch(grid, [] {}) == simt::kInvalidConfiguration, grid.blocks << " " << grid.threads);
    CHECK(!simt::error().empty(), "no error");
    simt::clear_error();
  }
}
