// Which kernel computes a problem, and over how many threads: from shape, types and device alone.
//
// The strategy depends on what a row is, never on how many rows there are: a row's bits must not depend on its company.
#pragma once

#include <cstdint>

namespace masked_softmax {
namespace cuda {

enum class Strategy : uint8_t {
  kAutomatic,
  kLanes,    // part of a warp, or a warp, holds a row
  kBlock,    // a block holds a row
  kCluster,  // a cluster of blocks holds a row
  kColumn,   // rows lie side by side, a lane to each
  kStrided,  // anything
};

constexpr Strategy kStrategies[] = {Strategy::kAutomatic, Strategy::kLanes,  Strategy::kBlock,
                                    Strategy::kCluster,   Strategy::kColumn, Strategy::kStrided};

constexpr const char* strategy_name(Strategy strategy) {
  switch (strategy) {
    case Strategy::kAutomatic: return "automatic";
    case Strategy::kLanes: return "lanes";
    case Strategy::kBlock: return "block";
    case Strategy::kCluster: return "cluster";
    case Strategy::kColumn: return "column";
    case Strategy::kStrided: return "strided";
  }
  return "";
}

struct DeviceProperties {
  int multiprocessors = 1;
  bool has_clusters = false;  // compute capability 9.0 and later
};

// What a plan depends on.
struct RowShape {
  int64_t rows = 0;
  int64_t cols = 0;
  int elems_per_vector = 0;  // 0: the operands' types or strides rule registers out
  int acc_bytes = 4;         // of the computing type
  int inputs = 1;            // how many operands a thread holds
  bool is_side_by_side = false;
};

struct LaunchPlan {
  Strategy strategy = Strategy::kAutomatic;
  int threads_per_row = 0;  // kLanes only
  int vectors = 0;          // that a thread holds of each operand; kLanes, kBlock and kCluster
  unsigned blocks = 0;
  unsigned threads = 0;  // of a block
  unsigned cluster_size = 1;
};

// Lanes to a row and vectors to a lane, in the order in which they are tried: the first that holds the row is taken.
struct LanesStep {
  int threads_per_row;
  int vectors;
};
constexpr LanesStep kLanesSteps[] = {{8, 1}, {8, 2}, {32, 1}, {32, 2}, {32, 4}, {32, 8}};

// Registers that a thread may spend on a row's values, of the 64 that 1024 threads of a block have each, or of 128.
constexpr int kMostLanesRegisters = 32;

// 16 values of each operand.
constexpr int block_vectors(int elems_per_vector) { return elems_per_vector > 4 ? 2 : 4; }
constexpr int kLanesThreads = 128;
constexpr int kWidestBlock = 1024;
constexpr int kStridedThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kMostClusterBlocks = 8;  // what every device with clusters takes
constexpr int64_t kMostBlocks = 0x7fffffff;

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr unsigned limited_blocks(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

constexpr bool lanes_hold(const LanesStep& step, const RowShape& shape) {
  const int registers = step.vectors * shape.elems_per_vector * shape.inputs * (shape.acc_bytes / 4);
  return registers <= kMostLanesRegisters &&
         int64_t{step.threads_per_row} * step.vectors * shape.elems_per_vector >= shape.cols;
}

// The plan of one strategy; its strategy is kAutomatic where that one cannot compute such rows.
constexpr LaunchPlan plan_strategy(Strategy strategy, const RowShape& shape, const DeviceProperties& device) {
  LaunchPlan plan;
  const int64_t vectors = shape.elems_per_vector > 0 ? ceil_divide(shape.cols, shape.elems_per_vector) : 0;
  const int held = block_vectors(shape.elems_per_vector);  // by a thread of a block
  switch (strategy) {
    case Strategy::kLanes:
      for (const LanesStep& step : kLanesSteps) {
        if (vectors > 0 && lanes_hold(step, shape)) {
          plan = {strategy,      step.threads_per_row,
                  step.vectors,  limited_blocks(ceil_divide(shape.rows, kLanesThreads / step.threads_per_row)),
                  kLanesThreads, 1};
          return plan;
        }
      }
      return plan;
    case Strategy::kBlock:
      if (vectors > 0 && vectors <= int64_t{held} * kWidestBlock) {
        const auto threads = static_cast<unsigned>(ceil_divide(vectors, int64_t{held} * kWarp) * kWarp);
        plan = {strategy, 0, held, limited_blocks(shape.rows), threads, 1};
      }
      return plan;
    case Strategy::kCluster: {
      unsigned size = 2;
      while (size < kMostClusterBlocks && vectors > int64_t{size} * held * kWidestBlock) {
        size *= 2;
      }
      if (device.has_clusters && vectors > 0 && vectors <= int64_t{size} * held * kWidestBlock &&
          shape.rows <= kMostBlocks / size) {
        const auto threads = static_cast<unsigned>(ceil_divide(vectors, int64_t{size} * held * kWarp) * kWarp);
        plan = {strategy, 0, held, static_cast<unsigned>(shape.rows) * size, threads, size};
      }
      return plan;
    }
    case Strategy::kColumn:
      if (shape.is_side_by_side) {
        plan = {strategy, 0, 0, limited_blocks(ceil_divide(shape.rows, kWarp)), kStridedThreads, 1};
      }
      return plan;
    case Strategy::kStrided: plan = {strategy, 0, 0, limited_blocks(shape.rows), kStridedThreads, 1}; return plan;
    case Strategy::kAutomatic: break;
  }
  return plan;
}

// rows and cols are at least 1. A forced strategy that cannot compute such rows gives a plan whose strategy is
// kAutomatic.
constexpr LaunchPlan plan_launch(const RowShape& shape, const DeviceProperties& device,
                                 Strategy forced = Strategy::kAutomatic) {
  if (forced != Strategy::kAutomatic) {
    return plan_strategy(forced, shape, device);
  }
  constexpr Strategy kOrder[] = {Strategy::kLanes, Strategy::kBlock, Strategy::kCluster, Strategy::kColumn,
                                 Strategy::kStrided};
  for (Strategy strategy : kOrder) {
    const LaunchPlan plan = plan_strategy(strategy, shape, device);
    if (plan.strategy != Strategy::kAutomatic) {
      return plan;
    }
  }
  return {};
}

}  // namespace cuda
}  // namespace masked_softmax
