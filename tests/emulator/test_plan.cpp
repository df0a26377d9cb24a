// The launch plan, for every size around its thresholds.
#include <algorithm>
#include <set>
#include <vector>

#include "check.h"
#include "emulate.h"

namespace {

using namespace masked_softmax::cuda;
using emulator::kWithClusters;
using emulator::kWithoutClusters;

std::string text_of(const RowShape& shape) {
  return std::to_string(shape.rows) + " rows of " + std::to_string(shape.cols) + ", " +
         std::to_string(shape.elems_per_vector) + " to a vector, " + std::to_string(shape.inputs) +
         (shape.is_plain ? " inputs, plain" : " inputs") + (shape.has_row_numbers ? ", with sinks" : "");
}

constexpr DeviceProperties kH200{/*has_clusters=*/true, /*sm_count=*/132};

bool same(const SumOrder& a, const SumOrder& b) {
  return a.threads == b.threads && a.vectors == b.vectors && a.elems == b.elems;
}

// Every size that lanes hold and more, then those around all multiples of the sizes that a warp or a block holds.
std::vector<int64_t> all_cols() {
  std::set<int64_t> cols;
  for (int64_t i = 1; i <= 5000; ++i) {
    cols.insert(i);
  }
  for (int64_t unit : {32, 64, 128, 256, 1024, 4096, 16384, 65536}) {
    for (int64_t multiple = 1; multiple <= 40; ++multiple) {
      for (int64_t near = -1; near <= 1; ++near) {
        cols.insert(unit * multiple + near);
      }
    }
  }
  for (int64_t large : {int64_t{1} << 20, (int64_t{1} << 31) - 1, (int64_t{1} << 31) + 5, int64_t{1} << 36}) {
    cols.insert(large);
  }
  return {cols.begin(), cols.end()};
}

// Rows that can be held: plain ones, and others; those of forward passes also with sinks.
template <class Visitor>
void for_each_shape(const Visitor& visit) {
  struct Inputs {
    int count;
    bool has_sinks;
  };
  for (int64_t cols : all_cols()) {
    for (int elems : {2, 4, 8}) {
      for (const Inputs& inputs : {Inputs{1, false}, Inputs{1, true}, Inputs{2, false}, Inputs{3, false}}) {
        for (bool is_plain : {false, true}) {
          RowShape shape;
          shape.rows = 1000;
          shape.cols = cols;
          shape.elems_per_vector = elems;
          shape.acc_bytes = elems == 2 ? 8 : 4;
          shape.inputs = inputs.count;
          shape.can_be_held = true;
          shape.is_plain = is_plain;
          shape.has_row_numbers = inputs.has_sinks;
          for (const DeviceProperties& device : {kWithClusters, kWithoutClusters, kH200}) {
            visit(shape, device);
          }
        }
      }
    }
  }
}

// Whether there are kernels of plain rows for this plan of some.
bool has_plain_kernels(const RowShape& shape, const LaunchPlan& plan) {
  if (shape.has_row_numbers) {
    return plan.strategy == Strategy::kBlock || (plan.strategy == Strategy::kLanes && shape.cols > 8);
  }
  return plan.strategy != Strategy::kSplit;
}

RowShape plain_shape(int64_t rows, int64_t cols, int elems_per_vector, int inputs) {
  RowShape shape;
  shape.rows = rows;
  shape.cols = cols;
  shape.elems_per_vector = elems_per_vector;
  shape.inputs = inputs;
  shape.can_be_held = true;
  shape.is_plain = true;
  return shape;
}

// Whether the threads of a kernel for any held rows have the registers for this order.
bool any_rows_fit(const SumOrder& order, const RowShape& shape) {
  return order.vectors <= held_vectors(shape.elems_per_vector, shape.inputs);
}

}  // namespace

TEST("plan: every row fits, and a device accepts every launch") {
  for_each_shape([](const RowShape& shape, const DeviceProperties& device) {
    const LaunchPlan plan = plan_launch(shape, device);
    if (holds_rows(plan.strategy)) {
      const int64_t chunks = plan.strategy == Strategy::kSplit ? plan.split_chunks : plan.cluster_size;
      CHECK(plan.order.chunk_elems() * chunks >= shape.cols, text_of(shape));
    }
    CHECK(plan.blocks >= 1 && plan.threads_per_block >= 32 && plan.threads_per_block <= kMaxBlockThreads &&
              plan.threads_per_block % 32 == 0,
          text_of(shape) << ": " << plan.blocks << " blocks of " << plan.threads_per_block);
    CHECK(plan.cluster_size == 1 || plan.strategy == Strategy::kCluster, text_of(shape));
    CHECK(plan.cluster_size <= 8 && plan.blocks % plan.cluster_size == 0, text_of(shape));
    CHECK((plan.workspace_bytes > 0) == (plan.strategy == Strategy::kSplit), text_of(shape));
  });
}

TEST("plan: strategies come in the table's order as rows grow, and clusters only where the device has them") {
  Strategy last[2][9][4] = {};
  for_each_shape([&](const RowShape& shape, const DeviceProperties& device) {
    if (!shape.is_plain) {
      return;
    }
    const Strategy now = plan_launch(shape, device).strategy;
    Strategy& before = last[device.has_clusters ? 1 : 0][shape.elems_per_vector][shape.inputs];
    CHECK(now >= before && now <= Strategy::kSplit, text_of(shape) << ": " << strategy_name(now));
    CHECK(now != Strategy::kCluster || device.has_clusters, text_of(shape));
    before = now;
  });
}

TEST("plan: rows that are not plain take the strategy of plain ones; strided where only plain ones fit the registers") {
  int64_t strided = 0;
  for_each_shape([&](RowShape shape, const DeviceProperties& device) {
    shape.is_plain = true;
    const LaunchPlan plain = plan_launch(shape, device);
    shape.is_plain = false;
    const LaunchPlan other = plan_launch(shape, device);
    const bool fits = any_rows_fit(plain.order, shape);
    CHECK(fits || (plain.strategy == Strategy::kCluster && shape.inputs > 1), text_of(shape));
    CHECK(other.strategy == (fits ? plain.strategy : Strategy::kStrided), text_of(shape)
                                                                              << ": " << strategy_name(other.strategy));
    CHECK(same(other.order, plain.order), text_of(shape));
    CHECK(!other.is_plain && plain.is_plain == has_plain_kernels(shape, plain), text_of(shape));
    strided += fits ? 0 : 1;
  });
  CHECK(strided > 0, "no row needs more registers than the kernels of any rows have");
}

TEST("plan: a sink changes neither the strategy nor the order of a row's sum") {
  for_each_shape([](RowShape shape, const DeviceProperties& device) {
    if (!shape.has_row_numbers) {
      return;
    }
    const LaunchPlan plan = plan_launch(shape, device);
    shape.has_row_numbers = false;
    const LaunchPlan without = plan_launch(shape, device);
    CHECK(plan.strategy == without.strategy && same(plan.order, without.order), text_of(shape));
  });
}

TEST("plan: the thresholds of float32, and of 16-bit types") {
  struct Step {
    int64_t cols;
    Strategy strategy;
    int threads;
    int vectors;
    unsigned cluster_size = 1;
  };
  struct Table {
    const char* what;
    int elems_per_vector;
    int inputs;
    std::vector<Step> steps;
  };
  const Table tables[] = {
      {"float32, forward",
       4,
       1,
       {{1, Strategy::kLanes, 1, 2},
        {8, Strategy::kLanes, 1, 2},
        {9, Strategy::kLanes, 4, 4},
        {64, Strategy::kLanes, 4, 4},
        {65, Strategy::kLanes, 16, 4},
        {256, Strategy::kLanes, 16, 4},
        {257, Strategy::kLanes, 32, 4},
        {512, Strategy::kLanes, 32, 4},
        {513, Strategy::kLanes, 32, 8},
        {1024, Strategy::kLanes, 32, 8},
        {1025, Strategy::kBlock, 64, 8},
        {2048, Strategy::kBlock, 64, 8},
        {2049, Strategy::kBlock, 96, 8},
        {16384, Strategy::kBlock, 512, 8},
        {16385, Strategy::kCluster, 160, 8, 4},
        {32768, Strategy::kCluster, 256, 8, 4},
        {32769, Strategy::kCluster, 160, 8, 8},
        {131072, Strategy::kCluster, 512, 8, 8},
        {131073, Strategy::kSplit, 512, 8}}},
      {"float32, backward",
       4,
       2,
       {{8, Strategy::kLanes, 1, 2},
        {9, Strategy::kLanes, 4, 4},
        {65, Strategy::kLanes, 16, 4},
        {257, Strategy::kLanes, 32, 4},
        {512, Strategy::kLanes, 32, 4},
        {513, Strategy::kBlock, 64, 4},
        {8192, Strategy::kBlock, 512, 4},
        {8193, Strategy::kCluster, 160, 4, 4},
        {65536, Strategy::kCluster, 512, 4, 8},
        {65537, Strategy::kCluster, 288, 8, 8},
        {131072, Strategy::kCluster, 512, 8, 8},
        {131073, Strategy::kSplit, 512, 4}}},
      {"16 bits, forward",
       8,
       1,
       {{8, Strategy::kLanes, 1, 1},
        {9, Strategy::kLanes, 4, 2},
        {65, Strategy::kLanes, 16, 2},
        {257, Strategy::kLanes, 32, 2},
        {513, Strategy::kLanes, 32, 4},
        {1024, Strategy::kLanes, 32, 4},
        {1025, Strategy::kBlock, 64, 4},
        {16384, Strategy::kBlock, 512, 4},
        {16385, Strategy::kCluster, 160, 4, 4},
        {131072, Strategy::kCluster, 512, 4, 8},
        {131073, Strategy::kSplit, 512, 4}}},
      {"16 bits, backward",
       8,
       2,
       {{8, Strategy::kLanes, 1, 1},
        {1024, Strategy::kLanes, 32, 4},
        {1025, Strategy::kBlock, 64, 4},
        {16384, Strategy::kBlock, 512, 4},
        {16385, Strategy::kCluster, 160, 4, 4},
        {131072, Strategy::kCluster, 512, 4, 8},
        {131073, Strategy::kCluster, 288, 8, 8},
        {262144, Strategy::kCluster, 512, 8, 8},
        {262145, Strategy::kSplit, 512, 4}}},
  };
  for (const Table& table : tables) {
    for (const Step& step : table.steps) {
      const LaunchPlan plan = plan_launch(plain_shape(64, step.cols, table.elems_per_vector, table.inputs), kH200);
      CHECK(plan.strategy == step.strategy && plan.order.threads == step.threads &&
                plan.order.vectors == step.vectors && plan.order.elems == table.elems_per_vector &&
                plan.cluster_size == step.cluster_size,
            table.what << ", " << step.cols << ": " << strategy_name(plan.strategy) << ", " << plan.order.threads
                       << " threads, " << plan.order.vectors << " vectors, " << plan.cluster_size << " blocks");
    }
  }
}

TEST("plan: neither the number of rows, the layout nor the number of SMs changes how a row is summed") {
  for_each_shape([](RowShape shape, const DeviceProperties& device) {
    const LaunchPlan plan = plan_launch(shape, device);
    for (int64_t rows : {int64_t{1}, int64_t{31}, int64_t{1} << 20}) {
      shape.rows = rows;
      const LaunchPlan other = plan_launch(shape, device);
      CHECK(other.strategy == plan.strategy && same(other.order, plan.order), text_of(shape));
    }
    for (int sm_count : {0, 1, 8, 132}) {
      const LaunchPlan other = plan_launch(shape, {device.has_clusters, sm_count});
      CHECK(other.strategy == plan.strategy && same(other.order, plan.order), text_of(shape) << ", SMs: " << sm_count);
    }
    for (bool has_unit_row_stride : {false, true}) {
      shape.can_be_held = shape.is_plain = false;
      shape.has_unit_row_stride = has_unit_row_stride;
      const LaunchPlan other = plan_launch(shape, device);
      CHECK(other.strategy == (has_unit_row_stride ? Strategy::kColumn : Strategy::kStrided), text_of(shape));
      CHECK(same(other.order, plan.order), text_of(shape));
    }
  });
}

TEST("plan: plain lanes and blocks are no more than run at once, and as many as the rows need") {
  int64_t persistent = 0;
  for_each_shape([&](RowShape shape, const DeviceProperties& /*device*/) {
    for (int64_t rows : {int64_t{1}, int64_t{1000}, int64_t{1} << 20, int64_t{0x7fffffff}}) {
      for (int sm_count : {1, 132}) {
        shape.rows = rows;
        const LaunchPlan plan = plan_launch(shape, {true, sm_count});
        if (!plan.is_plain || plan.strategy == Strategy::kCluster) {
          continue;
        }
        const int elems_per_thread = plan.order.vectors * plan.order.elems;
        const int64_t block_rows =
            plan.strategy == Strategy::kBlock
                ? 1
                : kLanesThreads / plan.order.threads * rows_per_group(elems_per_thread, shape.inputs);
        const int64_t needed = (rows + block_rows - 1) / block_rows;
        const int64_t resident = sm_count * (plain_threads_per_sm(plan.order.threads, elems_per_thread) /
                                             static_cast<int64_t>(plan.threads_per_block));
        CHECK(resident >= sm_count, text_of(shape)
                                        << ": a block of " << plan.threads_per_block << " does not fit an SM");
        CHECK(plan.blocks == std::min(needed, resident),
              text_of(shape) << ": " << plan.blocks << " blocks; " << needed << " needed, " << resident << " at once");
        const LaunchPlan unknown = plan_launch(shape, {true, /*sm_count=*/0});
        CHECK(unknown.blocks == needed, text_of(shape) << ": " << unknown.blocks << " blocks without a number of SMs");
        persistent += needed > resident ? 1 : 0;
      }
    }
  });
  CHECK(persistent > 0, "no grid had fewer blocks than the rows need");
}

TEST("plan: a cluster holds one row, in blocks of half the threads while there may be more blocks") {
  int64_t clusters = 0;
  for_each_shape([&](const RowShape& shape, const DeviceProperties& device) {
    const LaunchPlan plan = plan_launch(shape, device);
    if (plan.strategy != Strategy::kCluster) {
      return;
    }
    ++clusters;
    const unsigned size = plan.cluster_size;
    CHECK(size >= 2 && (size & (size - 1)) == 0, text_of(shape) << ": " << size << " blocks");
    CHECK(plan.blocks == shape.rows * size, text_of(shape) << ": " << plan.blocks << " blocks");
    CHECK(size == kMaxClusterBlocks || plan.threads_per_block <= kMaxBlockThreads / 2,
          text_of(shape) << ": " << size << " blocks of " << plan.threads_per_block);
  });
  CHECK(clusters > 0, "no row takes a cluster");
  RowShape shape = plain_shape(kMaxBlocks / kMaxClusterBlocks, 131072, 4, 1);
  CHECK(plan_launch(shape, kH200).strategy == Strategy::kCluster, text_of(shape));
  ++shape.rows;
  CHECK(plan_launch(shape, kH200).strategy == Strategy::kSplit, text_of(shape) << ": a grid has fewer blocks");
}

TEST("plan: 64 rows of 131072 columns fill a GPU: two blocks for every SM, and the threads that run at once") {
  for (const DeviceProperties& device : {kH200, kWithoutClusters}) {
    for (int inputs : {1, 2}) {
      const LaunchPlan plan = plan_launch(plain_shape(64, 131072, 4, inputs), device);
      CHECK(plan.blocks >= 2 * 132, plan.blocks << " blocks");
      CHECK(int64_t{plan.blocks} * plan.threads_per_block >=
                132 * plain_threads_per_sm(plan.order.threads, plan.order.vectors * plan.order.elems),
            plan.blocks << " blocks of " << plan.threads_per_block);
    }
  }
}

TEST("plan: a forced strategy is used, or refused if it cannot hold the row") {
  for_each_shape([](RowShape shape, const DeviceProperties& device) {
    for (Strategy forced : kStrategies) {
      if (!holds_rows(forced)) {
        continue;
      }
      const LaunchPlan plan = plan_launch(shape, device, forced);
      const SumOrder order = order_of(forced, shape, device);
      CHECK(plan.is_valid() == (order.threads > 0), text_of(shape) << ": " << strategy_name(forced));
      // Strided rows take the place of those that only plain rows' clusters hold.
      const Strategy expected = order.threads == 0                             ? Strategy::kAutomatic
                                : shape.is_plain || any_rows_fit(order, shape) ? forced
                                                                               : Strategy::kStrided;
      CHECK(plan.strategy == expected,
            text_of(shape) << ", forced " << strategy_name(forced) << ": " << strategy_name(plan.strategy));
      CHECK(!plan.is_valid() || same(plan.order, order), text_of(shape));
      const bool holds_any_row = forced == Strategy::kSplit;
      CHECK(!holds_any_row || plan.strategy == forced, text_of(shape));
    }
    CHECK(plan_launch(shape, device, Strategy::kStrided).strategy == Strategy::kStrided, text_of(shape));
    CHECK(!plan_launch(shape, device, Strategy::kColumn).is_valid(), text_of(shape));
    shape.has_unit_row_stride = true;
    CHECK(plan_launch(shape, device, Strategy::kColumn).strategy == Strategy::kColumn, text_of(shape));
  });
}

TEST("plan: plain columns of up to 512 are held, in the order of held rows, in as many blocks as the rows fill") {
  for (int inputs : {1, 2}) {
    for (int elems : {4, 8}) {
      for (int64_t cols : {1, 8, 9, 64, 65, 256, 257, 512, 513, 1024, 5000}) {
        RowShape shape = plain_shape(1000, cols, elems, inputs);
        shape.can_be_held = shape.is_plain = false;
        shape.has_unit_row_stride = shape.has_plain_columns = true;
        const LaunchPlan plan = plan_launch(shape, kH200);
        const std::string text = text_of(shape);
        CHECK(plan.strategy == Strategy::kColumn, text << ": " << strategy_name(plan.strategy));
        CHECK(plan.is_plain == (cols <= 512), text);
        CHECK(same(plan.order, plan_launch(plain_shape(1000, cols, elems, inputs), kH200).order), text);
        if (plan.is_plain) {
          const int64_t slots = inputs == 1 ? 4 : 2;
          const int64_t warps = std::max<int64_t>(plan.order.threads / slots, 1);
          CHECK(plan.threads_per_block == 1024 / slots, text << ": " << plan.threads_per_block << " threads");
          CHECK(plan.blocks == ceil_divide(1000, plan.threads_per_block / warps), text << ": " << plan.blocks);
        }
        shape.has_plain_columns = false;
        CHECK(!plan_launch(shape, kH200).is_plain, text);
      }
    }
  }
}

TEST("plan: staged rows have two to four stages, which fit an SM's shared memory beside those of its other blocks") {
  int64_t staged = 0;
  int64_t refused = 0;
  for_each_shape([&](RowShape shape, const DeviceProperties& /*device*/) {
    const SumOrder order = order_of(Strategy::kBlock, shape, kH200);
    if (!shape.is_plain || order.threads == 0 || shape.inputs > 2 || shape.has_row_numbers) {
      return;
    }
    for (int memory_kib : {228, 100}) {  // compute capability 9.0 and 10.0; 12.0
      const DeviceProperties device{true, 132, 90, memory_kib * 1024};
      const int64_t row_bytes = shape.cols * 16 / shape.elems_per_vector * shape.inputs;
      shape.stage_bytes = row_bytes;
      const LaunchPlan plan = plan_launch(shape, device, Strategy::kStaged);
      const std::string text = text_of(shape) + ", " + std::to_string(memory_kib) + " KiB";
      if (!plan.is_valid()) {
        CHECK(2 * row_bytes + kUnstagedBytes > device.stage_memory_bytes, text << ": two stages fit");
        ++refused;
        continue;
      }
      ++staged;
      const int64_t blocks_per_sm = std::max<int64_t>(plan.blocks / 132, 1);
      CHECK(plan.stages >= 2 && plan.stages <= 4, text << ": " << plan.stages << " stages");
      CHECK(plan.shared_bytes == plan.stages * row_bytes, text << ": " << plan.shared_bytes << " bytes");
      CHECK(blocks_per_sm * (plan.shared_bytes + kUnstagedBytes) <= device.stage_memory_bytes,
            text << ": " << blocks_per_sm << " blocks of " << plan.shared_bytes << " bytes");
      CHECK(blocks_per_sm * plan.threads_per_block <= kStagedThreadsPerSm,
            text << ": " << blocks_per_sm << " blocks of " << plan.threads_per_block << " threads");
      CHECK(same(plan.order, order), text << ": sums in another order than a block's");
    }
  });
  CHECK(staged > 0 && refused > 0, staged << " staged, " << refused << " refused");
}

TEST("plan: rows are staged only if that is forced, the rows can be, and the binary has bulk copies") {
  constexpr DeviceProperties kKnown[] = {
      {true, 132, 90, 228 * 1024}, {true, 148, 100, 228 * 1024}, {true, 188, 120, 100 * 1024}};
  for (int64_t cols : {64, 2048, 8192, 16384}) {
    RowShape shape = plain_shape(4096, cols, 4, 1);
    for (DeviceProperties device : kKnown) {
      shape.stage_bytes = cols * 4;
      const std::string text = text_of(shape) + ", on " + std::to_string(device.architecture);
      CHECK(plan_launch(shape, device).strategy != Strategy::kStaged, text);
      const bool fits = device.stage_memory_bytes >= 2 * shape.stage_bytes + kUnstagedBytes;
      const Strategy expected = fits ? Strategy::kStaged : Strategy::kAutomatic;
      CHECK(plan_launch(shape, device, Strategy::kStaged).strategy == expected, text);
      shape.stage_bytes = 0;
      CHECK(!plan_launch(shape, device, Strategy::kStaged).is_valid(), text << ": the rows cannot be staged");
      shape.stage_bytes = cols * 4;
      device.stage_memory_bytes = 0;
      CHECK(!plan_launch(shape, device, Strategy::kStaged).is_valid(), text << ": there are no bulk copies");
    }
  }
}
