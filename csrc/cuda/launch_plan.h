// Chooses the kernel, the grid and the block for a problem, from its shape, its types and the device alone.
//
// A row is summed in one order (SumOrder): that of the first strategy that can hold a row of its size. It depends on
// the longest length, the types and the number of inputs; for rows that no block holds, also on whether the device has
// clusters, and on whether a grid can have a cluster for each row (it can for fewer than 2^28 rows). It does not depend
// on the layout: kColumn and kStrided follow it, so a row has the same bits in any layout, and with either of the two
// forced. Only a forced strategy that holds rows takes its own order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace masked_softmax::cuda {

enum class Strategy : uint8_t {
  kAutomatic,  // as a forced strategy: the plan chooses; as a plan's strategy: there is no plan
               // (LaunchPlan::is_valid())
#define MASKED_SOFTMAX_STRATEGY(Name, name, rows) k##Name,
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
};

constexpr Strategy kStrategies[] = {
    Strategy::kAutomatic,
#define MASKED_SOFTMAX_STRATEGY(Name, name, rows) Strategy::k##Name,
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
#define MASKED_SOFTMAX_STRATEGY(Name, name, rows) \
  case Strategy::k##Name: return {#name, StrategyRows::rows};
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
  }
  return {};
}

constexpr const char* strategy_name(Strategy strategy) { return info_of(strategy).name; }
constexpr bool holds_rows(Strategy strategy) { return info_of(strategy).rows == StrategyRows::kHeld; }

template <Strategy kStrategy>
using StrategyConstant = std::integral_constant<Strategy, kStrategy>;

// Calls visit(StrategyConstant<strategy>()), and returns what it returns.
template <class Visitor>
auto visit_strategy(Strategy strategy, const Visitor& visit) {
  switch (strategy) {
    case Strategy::kAutomatic: return visit(StrategyConstant<Strategy::kAutomatic>());
#define MASKED_SOFTMAX_STRATEGY(Name, name, rows) \
  case Strategy::k##Name: return visit(StrategyConstant<Strategy::k##Name>());
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
  }
  __builtin_unreachable();  // every enumerator has a case
}

struct DeviceProperties {
  bool has_clusters = false;  // and the loaded binary has cluster kernels: device_properties.h
  int sm_count = 0;           // 0: unknown
  int architecture = 0;       // 10 * major + minor; 0: unknown
  // Of an SM, for the dynamic shared memory of blocks with stages; 0 if the loaded binary has no bulk copies.
  int stage_memory_bytes = 0;
};

// All that a plan depends on.
struct RowShape {
  int64_t rows = 0;
  int64_t cols = 0;                  // upper bound of the lengths
  int elems_per_vector = 4;          // elements of the widest operand in 16 bytes
  int acc_bytes = 4;                 // of the accumulation type
  int inputs = 1;                    // scores, or gradient and saved result, ...
  bool can_be_held = false;          // contiguous columns, and a pair of type_pairs.inc; whatever the size
  bool is_plain = false;             // can be held, and are_plain() in kernel_problem.h
  int64_t stage_bytes = 0;           // of a row's inputs in shared memory; 0: rows cannot be staged
  bool has_unit_row_stride = false;  // the row stride is 1: elements of one column are adjacent in memory
  bool has_plain_columns = false;    // and are_plain_columns() in kernel_problem.h; input and output have one type
  bool has_row_numbers = false;      // Problem::row_input or row_result; of plain rows: has_plain_sinks()
};

// The order of a row's sums. The valid columns are cut into chunks of threads * vectors * elems. The sums of
// kMaxClusterBlocks consecutive chunks are added in a binary tree, and these sums one after another. Within a chunk,
// thread t adds up the vectors t, t + threads, t + 2 * threads, ..., and the threads' sums are added in a binary tree:
// 0 and 1, 2 and 3; then these pairs; and so on. A vector's elements are first added to each other, also in a binary
// tree, where absent elements are zeros: so zeros may be appended to a vector.
//
// `threads` are those of the strategy that defines the order. Where another strategy follows it, a thread may sum for
// several of them.
struct SumOrder {
  int threads = 0;  // 0: the strategy cannot hold such a row
  int vectors = 0;  // per thread
  int elems = 0;    // per vector

  constexpr int64_t chunk_elems() const { return int64_t{threads} * vectors * elems; }
};

struct LaunchPlan {
  Strategy strategy = Strategy::kAutomatic;
  SumOrder order;
  bool is_plain = false;  // the kernels of plain rows (held_rows.cuh) or of plain columns (plain_columns.cuh)
  unsigned blocks = 0;
  unsigned threads_per_block = 0;
  unsigned cluster_size = 1;
  unsigned shared_bytes = 0;    // of dynamic shared memory, per block
  unsigned stages = 0;          // kStaged only: the stages in it
  int64_t split_chunks = 1;     // per row; kSplit only: a cluster's chunks are its blocks
  int64_t workspace_bytes = 0;  // kSplit only

  constexpr bool is_valid() const { return strategy != Strategy::kAutomatic; }
};

// Words of the accumulation type in a partial of each kind: the maximum, the sum and its rounding error, the count. See
// groups.cuh.
constexpr int kPartialWords = 4;

constexpr int kWarpThreads = 32;
constexpr int kMaxBlockThreads = 512;  // each may have 128 of an SM's 65536 registers
constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr unsigned kMaxClusterBlocks = 8;  // portable: every device with clusters supports it
constexpr int kLanesThreads = 128;         // of a block, per strategy
constexpr int kSplitThreads = 512;
constexpr int kStridedThreads = 256;

// Of a forward pass's held row, in a thread's registers, as float32. A multiple of every vector's size.
constexpr int kMaxThreadElems = 32;

// The vectors of each input that a thread holds at most. A backward pass keeps its inputs' own bits: 128 bytes of two.
// float64 is never held; its order has as many elements as float32's.
constexpr int held_vectors(int elems_per_vector, int inputs) {
  return inputs == 1 ? kMaxThreadElems / elems_per_vector : elems_per_vector == 2 ? 8 : 4;
}

// Lanes per row, and elements per lane, in the order in which they are tried: the first that holds the row is taken.
struct LanesStep {
  int threads_per_row;
  int elems_per_thread;
};
constexpr LanesStep kLanesSteps[] = {{1, 8}, {4, 16}, {16, 16}, {32, 16}, {32, kMaxThreadElems}};

// Plain rows that a group of lanes takes at a time, so that the loads of all are in flight together.
constexpr int rows_per_group(int elems_per_thread, int inputs) {
  const int rows = 16 / (elems_per_thread * inputs);
  return rows > 1 ? rows : 1;
}

// Threads of plain rows on an SM: as many as have the registers for their elements.
constexpr int plain_threads_per_sm(int threads_per_row, int elems_per_thread) {
  return elems_per_thread > 16 ? 640 : threads_per_row > 1 ? 896 : 768;
}

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr unsigned limited_blocks(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// The blocks that run at once on the device, or `blocks` if it is less.
constexpr unsigned persistent_blocks(int64_t blocks, int block_threads, const SumOrder& order,
                                     const DeviceProperties& device) {
  const int threads = plain_threads_per_sm(order.threads, order.vectors * order.elems);
  const int64_t resident = int64_t{device.sm_count} * (threads / block_threads);
  return limited_blocks(resident > 0 && resident < blocks ? resident : blocks);
}

// The vectors of each input that a thread of a cluster holds at most, if the rows are plain. A backward pass has twice
// as many where the longest rows would not fit otherwise.
constexpr int cluster_vectors(int elems_per_vector, int inputs) {
  return held_vectors(elems_per_vector, inputs) * (inputs == 1 ? 1 : 2);
}

// Staged rows. Threads on an SM: with the registers that more would leave, kernels spill on compute capability 12.0.
constexpr int kStagedThreadsPerSm = 512;
// A block's shared memory has room for some of the next rows. With one stage, no copy would be under way while a row is
// computed.
constexpr int kMinStages = 2;
constexpr int kMaxStages = 4;
// Of a block's shared memory: what the system reserves, and the static arrays.
constexpr int kUnstagedBytes = 1024 + 1024;

struct Staging {
  int blocks_per_sm = 0;
  int stages = 0;  // 0: not even the fewest stages fit
};

// As many blocks as have the registers, with as many stages as fit; fewer blocks where kMinStages would not fit.
// Precondition: the rows can be staged.
constexpr Staging staging_of(const SumOrder& order, const RowShape& shape, const DeviceProperties& device) {
  int blocks = kStagedThreadsPerSm / order.threads;
  for (; blocks > 0; --blocks) {
    const int64_t fitting = (device.stage_memory_bytes / blocks - kUnstagedBytes) / shape.stage_bytes;
    if (fitting >= kMinStages) {
      return {blocks, static_cast<int>(fitting < kMaxStages ? fitting : kMaxStages)};
    }
  }
  return {};
}

// The devices on which staged rows replace those that a block holds otherwise, from so many columns on. On none yet:
// the kernel waits on mbarriers, and has never run on a GPU. Measurements may change this.
struct StagedThreshold {
  int architecture;
  int64_t min_cols;
};
constexpr int64_t kNever = INT64_MAX;
constexpr StagedThreshold kStagedThresholds[] = {{90, kNever}, {100, kNever}};

// The lanes that share a strided row, where a warp has the order's threads: at least 8, so that adjacent columns are
// loaded together.
constexpr int strided_lanes_of(const SumOrder& order) { return order.threads <= 8 ? 8 : kWarpThreads; }

// Plain columns: plain_columns.cuh. A lane holds column_slots() of the order's threads, with up to kColumnThreadElems
// elements of each input for each of them.
constexpr int kColumnThreadElems = 16;
constexpr int kColumnThreadsPerSm = 512;  // each may have 128 registers
constexpr int column_slots(int inputs) { return inputs == 1 ? 4 : 2; }
constexpr int column_block_threads(int inputs) { return kWarpThreads / column_slots(inputs) * kWarpThreads; }

// The warps that share 32 rows: a power of two.
constexpr int column_warps(const SumOrder& order, int inputs) {
  return order.threads > column_slots(inputs) ? order.threads / column_slots(inputs) : 1;
}

constexpr bool holds_columns(const RowShape& shape, const SumOrder& order) {
  return shape.has_plain_columns && order.chunk_elems() >= shape.cols && order.threads <= kWarpThreads &&
         order.vectors * order.elems <= kColumnThreadElems;
}

// The blocks of a cluster that hold a row: a power of two. As long as there may be more blocks, they have half of the
// threads that they may have, so that two run on an SM.
constexpr unsigned cluster_size_for(const RowShape& shape) {
  unsigned size = 2;
  while (size < kMaxClusterBlocks && shape.cols > int64_t{size} * kMaxBlockThreads / 2 *
                                                      held_vectors(shape.elems_per_vector, shape.inputs) *
                                                      shape.elems_per_vector) {
    size *= 2;
  }
  return size;
}

// The order in which a strategy that holds rows sums them, if it can hold rows of this size.
constexpr SumOrder order_of(Strategy strategy, const RowShape& shape, const DeviceProperties& device) {
  const int elems = shape.elems_per_vector;
  const int held = held_vectors(elems, shape.inputs);
  const int64_t vectors = ceil_divide(shape.cols, elems);
  switch (strategy) {
    case Strategy::kLanes:
      for (const LanesStep& step : kLanesSteps) {
        if (step.elems_per_thread <= held * elems && step.threads_per_row * step.elems_per_thread >= shape.cols) {
          return {step.threads_per_row, step.elems_per_thread / elems, elems};
        }
      }
      return {};
    case Strategy::kBlock: {
      const int64_t threads = ceil_divide(vectors, int64_t{held} * kWarpThreads) * kWarpThreads;
      return threads <= kMaxBlockThreads ? SumOrder{static_cast<int>(threads), held, elems} : SumOrder{};
    }
    case Strategy::kStaged: {
      const SumOrder order = order_of(Strategy::kBlock, shape, device);
      const bool can_be_staged = order.threads > 0 && shape.stage_bytes > 0;
      return can_be_staged && staging_of(order, shape, device).stages > 0 ? order : SumOrder{};
    }
    case Strategy::kCluster: {
      const int64_t size = cluster_size_for(shape);
      const bool is_long = vectors > size * held * kMaxBlockThreads;
      const int of_thread = is_long ? cluster_vectors(elems, shape.inputs) : held;
      const int64_t threads = ceil_divide(vectors, size * of_thread * kWarpThreads) * kWarpThreads;
      const bool fits = device.has_clusters && threads <= kMaxBlockThreads && shape.rows <= kMaxBlocks / size;
      return fits ? SumOrder{static_cast<int>(threads), of_thread, elems} : SumOrder{};
    }
    case Strategy::kSplit: return {kSplitThreads, held, elems};
    case Strategy::kAutomatic:
    case Strategy::kColumn:
    case Strategy::kStrided: return {};
  }
  return {};
}

// Whether the kernels of plain rows have versions for rows with sinks. Where they do not, the kernel of any held rows
// takes them: calls that need a cluster or one lane a row are rare, and more kernels take longer to compile.
constexpr bool plain_rows_take_sinks(Strategy strategy, const SumOrder& order) {
  return (strategy == Strategy::kLanes && order.threads > 1) || strategy == Strategy::kBlock;
}

// How a strategy carries out an order.
constexpr LaunchPlan plan_strategy(Strategy strategy, const SumOrder& order, const RowShape& shape,
                                   const DeviceProperties& device) {
  LaunchPlan plan;
  plan.strategy = strategy;
  plan.order = order;
  plan.threads_per_block = static_cast<unsigned>(order.threads);
  plan.is_plain = shape.is_plain && holds_rows(strategy) && strategy != Strategy::kSplit &&
                  (!shape.has_row_numbers || plain_rows_take_sinks(strategy, order));
  switch (strategy) {
    case Strategy::kAutomatic: break;
    case Strategy::kLanes: {
      const int rows = plan.is_plain ? rows_per_group(order.vectors * order.elems, shape.inputs) : 1;
      const int64_t blocks = ceil_divide(shape.rows, kLanesThreads / order.threads * rows);
      plan.threads_per_block = kLanesThreads;
      plan.blocks = plan.is_plain ? persistent_blocks(blocks, kLanesThreads, order, device) : limited_blocks(blocks);
      break;
    }
    case Strategy::kBlock:
      plan.blocks =
          plan.is_plain ? persistent_blocks(shape.rows, order.threads, order, device) : limited_blocks(shape.rows);
      break;
    case Strategy::kStaged: {
      const Staging staging = staging_of(order, shape, device);
      plan.stages = static_cast<unsigned>(staging.stages);
      plan.shared_bytes = static_cast<unsigned>(staging.stages * shape.stage_bytes);
      const int64_t resident = int64_t{device.sm_count} * staging.blocks_per_sm;
      plan.blocks = limited_blocks(resident > 0 && resident < shape.rows ? resident : shape.rows);
      break;
    }
    case Strategy::kCluster:
      plan.cluster_size = cluster_size_for(shape);
      plan.blocks = static_cast<unsigned>(shape.rows) * plan.cluster_size;
      break;
    case Strategy::kSplit:
      plan.split_chunks = ceil_divide(shape.cols, order.chunk_elems());
      plan.blocks = limited_blocks(shape.rows * plan.split_chunks);
      plan.workspace_bytes = shape.rows * plan.split_chunks * kPartialWords * shape.acc_bytes;
      break;
    case Strategy::kColumn: {
      plan.is_plain = holds_columns(shape, order);
      plan.threads_per_block =
          static_cast<unsigned>(plan.is_plain ? column_block_threads(shape.inputs) : kStridedThreads);
      const int threads_per_row = plan.is_plain ? column_warps(order, shape.inputs) : kStridedThreads / kWarpThreads;
      plan.blocks = limited_blocks(ceil_divide(shape.rows, plan.threads_per_block / threads_per_row));
      break;
    }
    case Strategy::kStrided: {
      const int rows_per_block = order.threads <= kWarpThreads ? kStridedThreads / strided_lanes_of(order) : 1;
      plan.threads_per_block = kStridedThreads;
      plan.blocks = limited_blocks(ceil_divide(shape.rows, rows_per_block));
      break;
    }
  }
  return plan;
}

// Whether a strategy takes rows of these types and this layout, in this order; whether it can hold them, order_of()
// tells.
constexpr bool can_compute(Strategy strategy, const RowShape& shape, const SumOrder& order) {
  switch (strategy) {
    case Strategy::kAutomatic: return false;
    case Strategy::kLanes:
    case Strategy::kBlock:
    case Strategy::kStaged:
    case Strategy::kCluster:
    case Strategy::kSplit:
      return shape.can_be_held &&
             (shape.is_plain || order.vectors <= held_vectors(shape.elems_per_vector, shape.inputs));
    case Strategy::kColumn: return shape.has_unit_row_stride;
    case Strategy::kStrided: return true;
  }
  return false;
}

constexpr bool prefers_stages(const RowShape& shape, const DeviceProperties& device) {
  for (const StagedThreshold& threshold : kStagedThresholds) {
    if (device.architecture == threshold.architecture && shape.cols >= threshold.min_cols) {
      return order_of(Strategy::kStaged, shape, device).threads > 0;
    }
  }
  return false;
}

// The first strategy that can hold rows of this size, whatever their types and layout. kSplit holds any.
constexpr Strategy first_holding(const RowShape& shape, const DeviceProperties& device) {
  for (Strategy strategy : kStrategies) {
    if (holds_rows(strategy) && order_of(strategy, shape, device).threads > 0) {
      return strategy == Strategy::kBlock && prefers_stages(shape, device) ? Strategy::kStaged : strategy;
    }
  }
  return Strategy::kAutomatic;
}

// Returns a plan that is not valid if the forced strategy cannot compute such rows. There is one exception: if it could
// hold rows of this size, but not of these types or this layout, kStrided computes them in its order. Precondition:
// rows and cols are at least 1.
constexpr LaunchPlan plan_launch(const RowShape& shape, const DeviceProperties& device,
                                 Strategy forced = Strategy::kAutomatic) {
  const Strategy holding = holds_rows(forced) ? forced : first_holding(shape, device);
  const SumOrder order = order_of(holding, shape, device);
  if (order.threads == 0) {
    return {};
  }
  if (forced != Strategy::kAutomatic) {
    const Strategy strategy = holds_rows(forced) && !can_compute(forced, shape, order) ? Strategy::kStrided : forced;
    return can_compute(strategy, shape, order) ? plan_strategy(strategy, order, shape, device) : LaunchPlan{};
  }
  for (Strategy strategy : kStrategies) {
    if ((strategy == holding || !holds_rows(strategy)) && can_compute(strategy, shape, order)) {
      return plan_strategy(strategy, order, shape, device);
    }
  }
  return {};
}

}  // namespace masked_softmax::cuda
