// Chooses the kernel, the grid and the block for a problem, from its shape, its types and the device alone.
//
// A row is summed in one order (SumOrder), which its size and its types alone decide. All strategies follow it, so
// neither the strategy nor the number of rows changes a row's bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace masked_softmax::cuda {

enum class Strategy : uint8_t {
  kAutomatic,  // no strategy is forced
#define MASKED_SOFTMAX_STRATEGY(Name, name, Rows) k##Name,
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
};

constexpr Strategy kStrategies[] = {
    Strategy::kAutomatic,
#define MASKED_SOFTMAX_STRATEGY(Name, name, Rows) Strategy::k##Name,
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
};

enum class StrategyRows : uint8_t { kHeld, kAny };

struct StrategyInfo {
  const char* name;
  StrategyRows rows;
};

constexpr StrategyInfo info_of(Strategy strategy) {
  switch (strategy) {
    case Strategy::kAutomatic: return {"automatic", StrategyRows::kAny};
#define MASKED_SOFTMAX_STRATEGY(Name, name, Rows) \
  case Strategy::k##Name: return {#name, StrategyRows::Rows};
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
  }
  return {};
}

constexpr const char* strategy_name(Strategy strategy) { return info_of(strategy).name; }
constexpr bool holds_rows(Strategy strategy) { return info_of(strategy).rows == StrategyRows::kHeld; }

struct DeviceProperties {
  bool has_clusters = false;  // compute capability 9.0 and later
};

// All that a plan depends on.
struct RowShape {
  int64_t rows = 0;
  int64_t cols = 0;
  int elems_per_vector = 4;          // elements of the narrowest operand in 16 bytes
  int acc_bytes = 4;                 // of the accumulation type
  int inputs = 1;                    // operands that a thread holds
  bool fits_registers = false;       // contiguous columns, and a pair of type_pairs.inc
  bool has_unit_row_stride = false;  // adjacent rows are adjacent in memory
};

// The order of a row's sums. The valid columns are cut into chunks of threads * vectors * elems, whose sums are added
// in their order. Within a chunk, thread t adds up the vectors t, t + threads, t + 2 * threads, ..., and the threads'
// sums are added in a binary tree: 0 and 1, 2 and 3; then these pairs; and so on.
struct SumOrder {
  int threads = 0;
  int vectors = 0;  // per thread
  int elems = 0;    // per vector

  constexpr int64_t chunk_elems() const { return int64_t{threads} * vectors * elems; }
};

struct LaunchPlan {
  Strategy strategy = Strategy::kAutomatic;
  SumOrder order;
  unsigned blocks = 0;
  unsigned threads = 0;  // per block
  unsigned cluster_size = 1;
  // kSplit only:
  int64_t chunks = 1;  // per row
  int64_t workspace_bytes = 0;
};

// Words of the accumulation type in all results of a reduction: the maximum, the sum and its rounding error, the count.
constexpr int kResultWords = 4;

constexpr int kWarpThreads = 32;
constexpr int kMaxBlockThreads = 1024;
constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr unsigned kMaxClusterBlocks = 8;  // portable: every device with clusters supports it
constexpr int kLanesThreads = 128;         // of a block, per strategy
constexpr int kSplitThreads = 512;
constexpr int kStridedThreads = 256;

// Lanes per row and vectors per lane, in the order in which they are tried: the first that holds the row is taken.
struct LanesStep {
  int threads_per_row;
  int vectors;
};
constexpr LanesStep kLanesSteps[] = {{8, 1}, {8, 2}, {32, 1}, {32, 2}, {32, 4}, {32, 8}};

// Registers for a row's values: half of the 64 that each thread has in a block of 1024.
constexpr int kMaxValueRegisters = 32;

// Vectors per thread of a block: 16 values of each operand; 4 of float64, which takes twice the registers.
constexpr int block_vectors(int elems_per_vector) { return elems_per_vector == 4 ? 4 : 2; }

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr unsigned limited_blocks(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

constexpr bool lanes_hold(const LanesStep& step, const RowShape& shape) {
  const int registers = step.vectors * shape.elems_per_vector * shape.inputs * (shape.acc_bytes / 4);
  return registers <= kMaxValueRegisters &&
         int64_t{step.threads_per_row} * step.vectors * shape.elems_per_vector >= shape.cols;
}

// The blocks of a cluster that hold a row: a power of two.
constexpr unsigned cluster_size_for(const RowShape& shape) {
  const int64_t block_elems =
      int64_t{kMaxBlockThreads} * block_vectors(shape.elems_per_vector) * shape.elems_per_vector;
  unsigned size = 2;
  while (size < kMaxClusterBlocks && shape.cols > size * block_elems) {
    size *= 2;
  }
  return size;
}

// The order in which a strategy that holds rows sums them. It has no threads if the strategy cannot hold such a row.
constexpr SumOrder order_of(Strategy strategy, const RowShape& shape, const DeviceProperties& device) {
  const int elems = shape.elems_per_vector;
  const int held = block_vectors(elems);
  const int64_t vectors = ceil_divide(shape.cols, elems);
  switch (strategy) {
    case Strategy::kLanes:
      for (const LanesStep& step : kLanesSteps) {
        if (lanes_hold(step, shape)) {
          return {step.threads_per_row, step.vectors, elems};
        }
      }
      return {};
    case Strategy::kBlock: {
      const int64_t threads = ceil_divide(vectors, int64_t{held} * kWarpThreads) * kWarpThreads;
      return threads <= kMaxBlockThreads ? SumOrder{static_cast<int>(threads), held, elems} : SumOrder{};
    }
    case Strategy::kCluster: {
      const unsigned size = cluster_size_for(shape);
      const int64_t threads = ceil_divide(vectors, int64_t{size} * held * kWarpThreads) * kWarpThreads;
      const bool fits = device.has_clusters && threads <= kMaxBlockThreads && shape.rows <= kMaxBlocks / size;
      return fits ? SumOrder{static_cast<int>(threads), held, elems} : SumOrder{};
    }
    case Strategy::kSplit: return {kSplitThreads, held, elems};
    case Strategy::kAutomatic:
    case Strategy::kColumn:
    case Strategy::kStrided: return {};
  }
  return {};
}

// How a strategy carries out an order.
constexpr LaunchPlan plan_strategy(Strategy strategy, const SumOrder& order, const RowShape& shape) {
  LaunchPlan plan;
  plan.strategy = strategy;
  plan.order = order;
  plan.threads = static_cast<unsigned>(order.threads);
  switch (strategy) {
    case Strategy::kAutomatic: break;
    case Strategy::kLanes:
      plan.threads = kLanesThreads;
      plan.blocks = limited_blocks(ceil_divide(shape.rows, kLanesThreads / order.threads));
      break;
    case Strategy::kBlock: plan.blocks = limited_blocks(shape.rows); break;
    case Strategy::kCluster:
      plan.cluster_size = cluster_size_for(shape);
      plan.blocks = static_cast<unsigned>(shape.rows) * plan.cluster_size;
      break;
    case Strategy::kSplit:
      plan.chunks = ceil_divide(shape.cols, order.chunk_elems());
      plan.blocks = limited_blocks(shape.rows * plan.chunks);
      plan.workspace_bytes = shape.rows * plan.chunks * kResultWords * shape.acc_bytes;
      break;
    case Strategy::kColumn:
      plan.threads = kStridedThreads;
      plan.blocks = limited_blocks(ceil_divide(shape.rows, kWarpThreads));
      break;
    case Strategy::kStrided: {
      const int rows_per_block = order.threads <= kWarpThreads ? kStridedThreads / order.threads : 1;
      plan.threads = kStridedThreads;
      plan.blocks = limited_blocks(ceil_divide(shape.rows, rows_per_block));
      break;
    }
  }
  return plan;
}

// Precondition: rows and cols are at least 1. If the forced strategy cannot compute such rows, the plan's strategy is
// kAutomatic. If it could hold them but for their types or layout, kStrided takes its order.
constexpr LaunchPlan plan_launch(const RowShape& shape, const DeviceProperties& device,
                                 Strategy forced = Strategy::kAutomatic) {
  for (Strategy strategy : kStrategies) {
    if (!holds_rows(strategy) || (holds_rows(forced) && forced != strategy)) {
      continue;
    }
    const SumOrder order = order_of(strategy, shape, device);
    if (order.threads == 0) {
      continue;
    }
    if (forced == Strategy::kColumn) {
      return shape.has_unit_row_stride ? plan_strategy(forced, order, shape) : LaunchPlan{};
    }
    if (shape.fits_registers && forced != Strategy::kStrided) {
      return plan_strategy(strategy, order, shape);
    }
    const bool by_columns = shape.has_unit_row_stride && forced == Strategy::kAutomatic;
    return plan_strategy(by_columns ? Strategy::kColumn : Strategy::kStrided, order, shape);
  }
  return {};
}

}  // namespace masked_softmax::cuda
