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
         std::to_string(shape.elems_per_vector) + " to a vector, " + std::to_string(shape.inputs) + " inputs";
}

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

template <class Visitor>
void for_each_shape(const Visitor& visit) {
  for (int64_t cols : all_cols()) {
    for (int elems : {2, 4, 8}) {
      for (int inputs : {1, 2, 3}) {
        RowShape shape;
        shape.rows = 1000;
        shape.cols = cols;
        shape.elems_per_vector = elems;
        shape.acc_bytes = elems == 2 ? 8 : 4;
        shape.inputs = inputs;
        shape.can_be_held = true;
        for (const DeviceProperties& device : {kWithClusters, kWithoutClusters}) {
          visit(shape, device);
        }
      }
    }
  }
}

}  // namespace

TEST("plan: every row fits, and a device accepts every launch") {
  for_each_shape([](const RowShape& shape, const DeviceProperties& device) {
    const LaunchPlan plan = plan_launch(shape, device);
    const int64_t chunks = plan.strategy == Strategy::kSplit ? plan.split_chunks : plan.cluster_size;
    CHECK(plan.order.chunk_elems() * chunks >= shape.cols, text_of(shape));
    CHECK(plan.blocks >= 1 && plan.threads_per_block >= 32 && plan.threads_per_block <= 1024 &&
              plan.threads_per_block % 32 == 0,
          text_of(shape));
    CHECK(plan.cluster_size == 1 || plan.strategy == Strategy::kCluster, text_of(shape));
    CHECK(plan.cluster_size <= 8 && plan.blocks % plan.cluster_size == 0, text_of(shape));
    CHECK((plan.workspace_bytes > 0) == (plan.strategy == Strategy::kSplit), text_of(shape));
  });
}

TEST("plan: strategies come in the table's order as rows grow, and clusters only where the device has them") {
  Strategy last[2][9][4] = {};
  for_each_shape([&](const RowShape& shape, const DeviceProperties& device) {
    const Strategy now = plan_launch(shape, device).strategy;
    Strategy& before = last[device.has_clusters ? 1 : 0][shape.elems_per_vector][shape.inputs];
    CHECK(now >= before && now <= Strategy::kSplit, text_of(shape) << ": " << strategy_name(now));
    CHECK(now != Strategy::kCluster || device.has_clusters, text_of(shape));
    before = now;
  });
}

TEST("plan: the thresholds of float32") {
  struct Step {
    int64_t cols;
    Strategy strategy;
    int threads;
    int vectors;
  };
  constexpr Step kSteps[] = {
      {32, Strategy::kLanes, 8, 1},       {33, Strategy::kLanes, 8, 2},        {64, Strategy::kLanes, 8, 2},
      {65, Strategy::kLanes, 32, 1},      {1024, Strategy::kLanes, 32, 8},     {1025, Strategy::kBlock, 96, 4},
      {16384, Strategy::kBlock, 1024, 4}, {16385, Strategy::kCluster, 544, 4}, {131072, Strategy::kCluster, 1024, 4},
      {131073, Strategy::kSplit, 512, 4},
  };
  for (const Step& step : kSteps) {
    RowShape shape;
    shape.rows = 64;
    shape.cols = step.cols;
    shape.can_be_held = true;
    const LaunchPlan plan = plan_launch(shape, kWithClusters);
    CHECK(plan.strategy == step.strategy && plan.order.threads == step.threads && plan.order.vectors == step.vectors,
          step.cols << ": " << strategy_name(plan.strategy) << ", " << plan.order.threads << " threads, "
                    << plan.order.vectors << " vectors");
  }
}

TEST("plan: neither the number of rows nor the layout changes how a row is summed") {
  for_each_shape([](RowShape shape, const DeviceProperties& device) {
    const LaunchPlan plan = plan_launch(shape, device);
    for (int64_t rows : {int64_t{1}, int64_t{31}, int64_t{1} << 20}) {
      shape.rows = rows;
      const LaunchPlan other = plan_launch(shape, device);
      CHECK(other.strategy == plan.strategy && same(other.order, plan.order), text_of(shape));
    }
    for (bool has_unit_row_stride : {false, true}) {
      shape.can_be_held = false;
      shape.has_unit_row_stride = has_unit_row_stride;
      const LaunchPlan other = plan_launch(shape, device);
      CHECK(other.strategy == (has_unit_row_stride ? Strategy::kColumn : Strategy::kStrided), text_of(shape));
      CHECK(same(other.order, plan.order), text_of(shape));
    }
  });
}

TEST("plan: 64 rows of 131072 columns fill a GPU") {
  RowShape shape;
  shape.rows = 64;
  shape.cols = 131072;
  shape.can_be_held = true;
  for (const DeviceProperties& device : {kWithClusters, kWithoutClusters}) {
    const LaunchPlan plan = plan_launch(shape, device);
    CHECK(int64_t{plan.blocks} * plan.threads_per_block >= 132 * 2048,
          plan.blocks << " blocks of " << plan.threads_per_block);
  }
}

TEST("plan: a forced strategy is used, or refused if it cannot hold the row") {
  for_each_shape([](RowShape shape, const DeviceProperties& device) {
    for (Strategy forced : kStrategies) {
      if (!holds_rows(forced)) {
        continue;
      }
      const LaunchPlan plan = plan_launch(shape, device, forced);
      CHECK(plan.strategy == forced || !plan.is_valid(), text_of(shape));
      const bool holds_any_row = forced == Strategy::kSplit;
      CHECK(!holds_any_row || plan.strategy == forced, text_of(shape));
    }
    CHECK(plan_launch(shape, device, Strategy::kStrided).strategy == Strategy::kStrided, text_of(shape));
    CHECK(!plan_launch(shape, device, Strategy::kColumn).is_valid(), text_of(shape));
    shape.has_unit_row_stride = true;
    CHECK(plan_launch(shape, device, Strategy::kColumn).strategy == Strategy::kColumn, text_of(shape));
  });
}
