// The emulator itself: threads exchange values, and each kind of mistake is found.
#include <string>
#include <vector>

#include "check.h"
#include "checker.h"
#include "simt.h"

namespace {

using simt::Grid;
using simt::Location;
using simt::this_thread;

// Runs a kernel in several orders of its threads. Returns the first error.
template <class Kernel>
std::string error_of(const Grid& grid, const Kernel& kernel) {
  std::string error;
  for (unsigned seed = 0; seed < 12 && error.empty(); ++seed) {
    constexpr simt::Order kOrders[] = {simt::Order::kForwards, simt::Order::kBackwards, simt::Order::kRandom};
    simt::set_order(kOrders[seed % 3], seed);
    simt::launch(grid, kernel);
    error = simt::error();
    simt::clear_error();
  }
  return error;
}

template <class Kernel>
void expect_error(const char* part, const Grid& grid, const Kernel& kernel) {
  const std::string error = error_of(grid, kernel);
  CHECK(error.find(part) != std::string::npos, "expected '" << part << "', but got '" << error << "'");
}

template <class Kernel>
void expect_success(const Grid& grid, const Kernel& kernel) {
  const std::string error = error_of(grid, kernel);
  CHECK(error.empty(), error);
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
  for (const Grid& grid : {Grid{0, 32, 1}, Grid{1, 0, 1}, Grid{1, 1025, 1}, Grid{3, 32, 2}, Grid{32, 32, 32}}) {
    CHECK(simt::launch(grid, [] {}) == simt::kInvalidConfiguration, grid.blocks << " " << grid.threads);
    CHECK(!simt::error().empty(), "no error");
    simt::clear_error();
  }
}
