// Which devices have clusters and bulk copies, from what the CUDA runtime reports of them.
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"
#include "emulate.h"

namespace {

using namespace masked_softmax::cuda;

constexpr int kLongest = 20000;  // columns, of float32: more than a block holds

Strategy strategy_for_long_rows(const DeviceProperties& device) {
  RowShape shape;
  shape.rows = 3;
  shape.cols = kLongest;
  shape.can_be_held = true;
  return plan_launch(shape, device).strategy;
}

// Makes a device the current one that has not been asked before.
EmulatedClusters& new_device(const ClusterSupport& support, unsigned active_blocks) {
  static int devices = 0;
  emulated_device = ++devices;
  emulated_clusters = EmulatedClusters();
  emulated_clusters.support = support;
  emulated_clusters.active_blocks = active_blocks;
  return emulated_clusters;
}

}  // namespace

TEST("plan: clusters and bulk copies only where the binary has their kernels; clusters where one of the largest fits") {
  struct Case {
    const char* what;
    ClusterSupport support;
    bool has_clusters;
    bool has_bulk_copies;
  };
  constexpr Case kCases[] = {
      {"8.0 on 8.0", {false, 80, 80, 0}, false, false},
      {"8.0 on 8.9", {false, 80, 80, 0}, false, false},
      {"PTX of 8.0 on 9.0", {true, 90, 80, 16}, false, false},
      {"PTX of 8.0 on 12.0", {true, 120, 80, 16}, false, false},
      {"9.0 on 9.0", {true, 90, 90, 16}, true, true},
      {"PTX of 9.0 on 12.0", {true, 120, 90, 16}, true, true},
      {"10.0 on 10.0", {true, 100, 100, 16}, true, true},
      {"12.0 on 12.0", {true, 120, 120, 1}, true, true},
      {"12.0, compiled from 10.0's PTX, on 12.0", {true, 120, 100, 1}, true, true},
      {"9.0 on 9.0 that has no clusters", {false, 90, 90, 16}, false, true},
      {"9.0 on 9.0 that fits none", {true, 90, 90, 0}, false, true},
      {"nothing is known", {}, false, false},
  };
  for (const Case& c : kCases) {
    CHECK(has_clusters(c.support) == c.has_clusters, c.what);
    CHECK(has_bulk_copies(c.support) == c.has_bulk_copies, c.what);
  }
}

TEST("plan: rows that a block cannot hold are split where clusters cannot run") {
  const unsigned largest = largest_cluster_plan().cluster_size;
  CHECK(largest == kMaxClusterBlocks, largest << " blocks");
  CHECK(largest_cluster_plan().threads_per_block == kMaxBlockThreads, largest_cluster_plan().threads_per_block);
  struct Case {
    const char* what;
    ClusterSupport support;
    unsigned active_blocks;
    Strategy strategy;
  };
  const Case cases[] = {
      {"9.0 on 9.0", {true, 90, 90, 0}, largest, Strategy::kCluster},
      {"9.0 on 9.0, a block less than the largest cluster has", {true, 90, 90, 0}, largest - 1, Strategy::kSplit},
      {"PTX of 8.0 on 9.0", {true, 90, 80, 0}, 132, Strategy::kSplit},
      {"8.0 on 8.0", {false, 80, 80, 0}, 0, Strategy::kSplit},
  };
  for (const Case& c : cases) {
    new_device(c.support, c.active_blocks);
    DeviceProperties device;
    CHECK(get_device_properties(device) == kSuccess, c.what);
    CHECK((device.stage_memory_bytes > 0) == has_bulk_copies(c.support), c.what << ": stages");
    CHECK(device.architecture == c.support.binary_version, c.what << ": " << device.architecture);
    const Strategy strategy = strategy_for_long_rows(device);
    CHECK(strategy == c.strategy, c.what << ": " << strategy_name(strategy));
  }
}

TEST("plan: the runtime is asked once for each device, by any number of threads, and again after an error") {
  EmulatedClusters& clusters = new_device({true, 90, 90, 0}, kMaxClusterBlocks);
  const auto properties = [] {
    DeviceProperties found;
    CHECK(get_device_properties(found) == kSuccess, "a query");
    return found.has_clusters;
  };
  std::vector<char> found(8);
  std::vector<std::thread> threads;
  for (char& result : found) {
    threads.emplace_back([&] { result = properties() ? 1 : 0; });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (char result : found) {
    CHECK(result == 1, "every thread finds clusters");
  }
  CHECK(clusters.queries == 1, clusters.queries << " queries");

  const int first = emulated_device;
  new_device({true, 90, 80, 0}, kMaxClusterBlocks);
  CHECK(!properties() && clusters.queries == 1, "another device: " << clusters.queries << " queries");
  emulated_device = first;
  CHECK(properties() && clusters.queries == 1, "the first device again: " << clusters.queries << " queries");

  new_device({true, 90, 90, 0}, kMaxClusterBlocks).status = kInvalidLaunch;
  DeviceProperties unknown;
  CHECK(get_device_properties(unknown) == kInvalidLaunch && !unknown.has_clusters, "an error");
  clusters.status = kSuccess;
  CHECK(properties() && clusters.queries == 2, "after an error: " << clusters.queries << " queries");
}
