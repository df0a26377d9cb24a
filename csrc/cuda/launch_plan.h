// Which kernel computes a problem, and over how many threads: from shape, types and device alone.
//
// A row's sums are taken in one order, which its size and its types alone decide. A strategy is a way to follow that
// order; which one does, and how many rows there are, leaves no trace in a row's bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace masked_softmax {
namespace cuda {

enum class Strategy : uint8_t {
  kAutomatic,
  // Rows whose columns are adjacent, of the types in register_types.inc, by their size:
  kLanes,    // part of a warp, or a warp, holds a row
  kBlock,    // a block holds a row
  kCluster,  // a cluster of blocks holds a row
  kSplit,    // blocks hold a piece of a row each, and leave what they found in memory
  // Rows of any layout and types:
  kColumn,   // they lie side by side, a lane to each
  kStrided,  // anything
};

constexpr Strategy kStrategies[] = {Strategy::kAutomatic, Strategy::kLanes,  Strategy::kBlock,  Strategy::kCluster,
                                    Strategy::kSplit,     Strategy::kColumn, Strategy::kStrided};

constexpr const char* strategy_name(Strategy strategy) {
  switch (strategy) {
    case Strategy::kAutomatic: return "automatic";
    case Strategy::kLanes: return "lanes";
    case Strategy::kBlock: return "block";
    case Strategy::kCluster: return "cluster";
    case Strategy::kSplit: return "split";
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
  int elems_per_vector = 4;      // as many as 16 bytes hold of the narrowest operand
  int acc_bytes = 4;             // of the computing type
  int inputs = 1;                // how many operands a thread holds
  bool fits_registers = false;   // columns adjacent, and types of register_types.inc
  bool is_side_by_side = false;  // neighbouring rows are neighbours in memory
};

// How the valid columns of a row are summed. They are cut into pieces of threads * vectors * elems, and the pieces'
// sums are added in their order. In a piece, thread t adds up the vectors t, t + threads, t + 2 * threads, ..., and the
// threads' sums are added in a binary tree: 0 and 1, 2 and 3; then these pairs; and so on.
struct SumOrder {
  int threads = 0;
  int vectors = 0;  // of a thread
  int elems = 0;    // of a vector

  constexpr int64_t piece_elems() const { return int64_t{threads} * vectors * elems; }
};

struct LaunchPlan {
  Strategy strategy = Strategy::kAutomatic;
  SumOrder order;
  unsigned blocks = 0;
  unsigned threads = 0;  // of a block
  unsigned cluster_size = 1;
  // kSplit only:
  int64_t pieces = 1;  // of a row
  int64_t workspace_bytes = 0;
};

// What a piece leaves behind: its maximum, its sum in two words, how many maxima it has.
constexpr int kPieceResults = 4;

// Lanes to a row and vectors to a lane, in the order in which they are tried: the first that holds the row is taken.
struct LanesStep {
  int threads_per_row;
  int vectors;
};
constexpr LanesStep kLanesSteps[] = {{8, 1}, {8, 2}, {32, 1}, {32, 2}, {32, 4}, {32, 8}};

// Registers that a thread may spend on a row's values, of the 64 that 1024 threads of a block have each, or of 128.
constexpr int kMostLanesRegisters = 32;

// 16 values of each operand; of float64, whose values and arithmetic take twice the registers, 4.
constexpr int block_vectors(int elems_per_vector) { return elems_per_vector == 4 ? 4 : 2; }
constexpr int kLanesThreads = 128;
constexpr int kWidestBlock = 1024;
constexpr int kSplitThreads = 512;
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

// How many blocks of a cluster it takes, a power of two.
constexpr unsigned cluster_size_for(const RowShape& shape) {
  const int64_t block_elems = int64_t{kWidestBlock} * block_vectors(shape.elems_per_vector) * shape.elems_per_vector;
  unsigned size = 2;
  while (size < kMostClusterBlocks && shape.cols > size * block_elems) {
    size *= 2;
  }
  return size;
}

// The order in which one of the first four strategies sums; no threads where it cannot hold such a row.
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
      const int64_t threads = ceil_divide(vectors, int64_t{held} * kWarp) * kWarp;
      return threads <= kWidestBlock ? SumOrder{static_cast<int>(threads), held, elems} : SumOrder{};
    }
    case Strategy::kCluster: {
      const unsigned size = cluster_size_for(shape);
      const int64_t threads = ceil_divide(vectors, int64_t{size} * held * kWarp) * kWarp;
      const bool fits = device.has_clusters && threads <= kWidestBlock && shape.rows <= kMostBlocks / size;
      return fits ? SumOrder{static_cast<int>(threads), held, elems} : SumOrder{};
    }
    case Strategy::kSplit: return {kSplitThreads, held, elems};
    default: return {};
  }
}

// How a plan with a given order is carried out.
constexpr LaunchPlan plan_strategy(Strategy strategy, const SumOrder& order, const RowShape& shape) {
  LaunchPlan plan;
  plan.strategy = strategy;
  plan.order = order;
  switch (strategy) {
    case Strategy::kLanes:
      plan.blocks = limited_blocks(ceil_divide(shape.rows, kLanesThreads / order.threads));
      plan.threads = kLanesThreads;
      break;
    case Strategy::kBlock:
      plan.blocks = limited_blocks(shape.rows);
      plan.threads = static_cast<unsigned>(order.threads);
      break;
    case Strategy::kCluster:
      plan.cluster_size = cluster_size_for(shape);
      plan.blocks = static_cast<unsigned>(shape.rows) * plan.cluster_size;
      plan.threads = static_cast<unsigned>(order.threads);
      break;
    case Strategy::kSplit:
      plan.pieces = ceil_divide(shape.cols, order.piece_elems());
      plan.blocks = limited_blocks(shape.rows * plan.pieces);
      plan.workspace_bytes = shape.rows * plan.pieces * kPieceResults * shape.acc_bytes;
      plan.threads = static_cast<unsigned>(order.threads);
      break;
    case Strategy::kColumn:
      plan.blocks = limited_blocks(ceil_divide(shape.rows, kWarp));
      plan.threads = kStridedThreads;
      break;
    default: {
      const int rows_per_block = order.threads <= kWarp ? kStridedThreads / order.threads : 1;
      plan.blocks = limited_blocks(ceil_divide(shape.rows, rows_per_block));
      plan.threads = kStridedThreads;
      break;
    }
  }
  return plan;
}

// rows and cols are at least 1. A forced strategy that cannot compute such rows gives a plan whose strategy is
// kAutomatic; one of the first four that merely cannot reach them gives its order to kStrided.
constexpr LaunchPlan plan_launch(const RowShape& shape, const DeviceProperties& device,
                                 Strategy forced = Strategy::kAutomatic) {
  constexpr Strategy kBySize[] = {Strategy::kLanes, Strategy::kBlock, Strategy::kCluster, Strategy::kSplit};
  const bool reaches_anything = forced == Strategy::kColumn || forced == Strategy::kStrided;
  for (Strategy strategy : kBySize) {
    if (forced != Strategy::kAutomatic && !reaches_anything && forced != strategy) {
      continue;
    }
    const SumOrder order = order_of(strategy, shape, device);
    if (order.threads == 0) {
      continue;
    }
    if (forced == Strategy::kColumn) {
      return shape.is_side_by_side ? plan_strategy(forced, order, shape) : LaunchPlan{};
    }
    if (shape.fits_registers && forced != Strategy::kStrided) {
      return plan_strategy(strategy, order, shape);
    }
    const bool by_columns = shape.is_side_by_side && forced == Strategy::kAutomatic;
    return plan_strategy(by_columns ? Strategy::kColumn : Strategy::kStrided, order, shape);
  }
  return {};
}

}  // namespace cuda
}  // namespace masked_softmax
