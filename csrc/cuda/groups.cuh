// Groups of threads that share a row, and what they find out together: a maximum, a sum. A group has as many threads
// for each piece of the row.
//
// Every thread of a group gets the same result, in the same bits however the threads are scheduled, and whatever group
// they are: SumOrder in launch_plan.h says in which order sums are taken. An absent one is 0, which changes no sum.
#pragma once

#include "cuda/device.cuh"

namespace masked_softmax {
namespace cuda {

// A sum and its rounding error (TwoSum: Knuth, The Art of Computer Programming, vol. 2, 4.2.2): as good as in twice the
// precision, so neither a row's length nor how it is spread over threads shows in its accuracy.
template <class acc_t>
struct Sum {
  acc_t high = 0;
  acc_t low = 0;

  MASKED_SOFTMAX_DEVICE void add(acc_t value) {
    const acc_t sum = high + value;
    const acc_t part = sum - high;
    low += (high - (sum - part)) + (value - part);
    high = sum;
  }
  // A few values, added to each other first, in pairs.
  template <int kCount>
  MASKED_SOFTMAX_DEVICE void add(const acc_t (&values)[kCount]) {
    add(pairwise<0, kCount>(values));
  }
  // The same result whichever of the two is added to the other.
  MASKED_SOFTMAX_DEVICE void add(const Sum& other) {
    const acc_t lows = low + other.low;
    low = 0;
    add(other.high);
    low += lows;
  }
  // An infinite sum has no rounding error to speak of.
  MASKED_SOFTMAX_DEVICE acc_t total() const { return low == low ? high + low : high; }

 private:
  template <int kFirst, int kCount, int kAll>
  MASKED_SOFTMAX_DEVICE static acc_t pairwise(const acc_t (&values)[kAll]) {
    if constexpr (kCount == 1) {
      return values[kFirst];
    } else {
      return pairwise<kFirst, kCount / 2>(values) + pairwise<kFirst + kCount / 2, kCount - kCount / 2>(values);
    }
  }
};

template <unsigned kWidth, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t lanes_max(acc_t value) {
  MASKED_SOFTMAX_UNROLL
  for (unsigned distance = kWidth / 2; distance > 0; distance /= 2) {
    value = larger(value, shuffle_xor(value, distance, kWidth));
  }
  return value;
}

template <unsigned kWidth, class acc_t>
MASKED_SOFTMAX_DEVICE Sum<acc_t> lanes_sum(Sum<acc_t> sum) {
  MASKED_SOFTMAX_UNROLL
  for (unsigned distance = 1; distance < kWidth; distance *= 2) {
    Sum<acc_t> other;
    other.high = shuffle_xor(sum.high, distance, kWidth);
    other.low = shuffle_xor(sum.low, distance, kWidth);
    sum.add(other);
  }
  return sum;
}

// Of counts, which are exact.
template <unsigned kWidth, class acc_t>
MASKED_SOFTMAX_DEVICE acc_t lanes_count(acc_t count) {
  MASKED_SOFTMAX_UNROLL
  for (unsigned distance = kWidth / 2; distance > 0; distance /= 2) {
    count += shuffle_xor(count, distance, kWidth);
  }
  return count;
}

// A binary tree over sums that come one after another: 0 and 1, 2 and 3; then these pairs; and so on. Holds one sum for
// each level, in registers: the loops are unrolled.
template <class acc_t, int kLevels>
class TreeSum {
 public:
  // At most 2^(kLevels - 1) times.
  MASKED_SOFTMAX_DEVICE void add(Sum<acc_t> sum) {
    bool is_placed = false;
    MASKED_SOFTMAX_UNROLL
    for (int level = 0; level < kLevels; ++level) {
      if (!is_placed) {
        if ((count_ >> level & 1) == 0) {
          levels_[level] = sum;
          is_placed = true;
        } else {
          const Sum<acc_t> right = sum;
          sum = levels_[level];
          sum.add(right);
        }
      }
    }
    ++count_;
  }

  MASKED_SOFTMAX_DEVICE Sum<acc_t> total() const {
    Sum<acc_t> sum;
    MASKED_SOFTMAX_UNROLL
    for (int level = 0; level < kLevels; ++level) {
      if ((count_ >> level & 1) != 0) {
        sum.add(levels_[level]);
      }
    }
    return sum;
  }

 private:
  Sum<acc_t> levels_[kLevels];
  unsigned count_ = 0;
};

// kWidth lanes of a warp: a power of two up to 32.
template <unsigned kWidth, class acc_t>
class LaneGroup {
 public:
  static constexpr int kSumLevels = 1;
  static constexpr unsigned kRunLanes = kWidth;

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() % kWidth; }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return kWidth; }
  MASKED_SOFTMAX_DEVICE unsigned pieces() const { return 1; }
  MASKED_SOFTMAX_DEVICE unsigned piece() const { return 0; }
  MASKED_SOFTMAX_DEVICE void meet() const {}  // a shuffle lets nobody ahead
  MASKED_SOFTMAX_DEVICE acc_t max(acc_t value) const { return lanes_max<kWidth>(value); }
  MASKED_SOFTMAX_DEVICE Sum<acc_t> sum(const Sum<acc_t>& value) const { return lanes_sum<kWidth>(value); }
  MASKED_SOFTMAX_DEVICE acc_t count(acc_t value) const { return lanes_count<kWidth>(value); }
};

// What the warps of a block found, in shared memory: one array for each kind of result.
template <class acc_t>
struct WarpResults {
  static constexpr int kMostWarps = 32;  // for a BlockGroup
  acc_t* maxima;
  acc_t* sum_highs;
  acc_t* sum_lows;
  acc_t* counts;
};

// A whole block: threads are a multiple of 32. No thread may write a result where a slower one still reads the last:
// between two uses of the same array comes another barrier, be it another array's or, at the end of a row, the
// kernel's.
template <class acc_t>
class BlockGroup {
 public:
  static constexpr int kSumLevels = 3;
  static_assert(kStridedThreads << (kSumLevels - 1) >= kWidestBlock, "as many threads as an order may have");
  static constexpr unsigned kRunLanes = kWarpThreads;

  MASKED_SOFTMAX_DEVICE explicit BlockGroup(const WarpResults<acc_t>& results) : results_(results) {}

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index(); }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return block_threads(); }
  MASKED_SOFTMAX_DEVICE unsigned pieces() const { return 1; }
  MASKED_SOFTMAX_DEVICE unsigned piece() const { return 0; }
  MASKED_SOFTMAX_DEVICE void meet() const { sync_block(); }

  MASKED_SOFTMAX_DEVICE acc_t max(acc_t value) const {
    value = lanes_max<kWarpThreads>(value);
    if (lane() == 0) {
      results_.maxima[warp()] = value;
    }
    sync_block();
    return lanes_max<kWarpThreads>(lane() < warps() ? results_.maxima[lane()]
                                                    : -std::numeric_limits<acc_t>::infinity());
  }

  MASKED_SOFTMAX_DEVICE Sum<acc_t> sum(const Sum<acc_t>& value) const {
    Sum<acc_t> warp_sum = lanes_sum<kWarpThreads>(value);
    if (lane() == 0) {
      results_.sum_highs[warp()] = warp_sum.high;
      results_.sum_lows[warp()] = warp_sum.low;
    }
    sync_block();
    Sum<acc_t> of_lane;
    if (lane() < warps()) {
      of_lane.high = results_.sum_highs[lane()];
      of_lane.low = results_.sum_lows[lane()];
    }
    return lanes_sum<kWarpThreads>(of_lane);
  }

  MASKED_SOFTMAX_DEVICE acc_t count(acc_t value) const {
    value = lanes_count<kWarpThreads>(value);
    if (lane() == 0) {
      results_.counts[warp()] = value;
    }
    sync_block();
    return lanes_count<kWarpThreads>(lane() < warps() ? results_.counts[lane()] : acc_t{0});
  }

 private:
  MASKED_SOFTMAX_DEVICE unsigned lane() const { return thread_index() % kWarpThreads; }
  MASKED_SOFTMAX_DEVICE unsigned warp() const { return thread_index() / kWarpThreads; }
  MASKED_SOFTMAX_DEVICE unsigned warps() const { return block_threads() / kWarpThreads; }

  WarpResults<acc_t> results_;
};

#if MASKED_SOFTMAX_HAS_CLUSTERS
// A cluster of blocks, a piece of the row to each. Each block leaves its result in its own shared memory, the cluster
// meets, and everyone reads all of them, in the order of the pieces. Each kind of result may be asked for once; a
// kernel ends with leave(): until then another block may still read.
template <class acc_t>
class ClusterGroup {
 public:
  static constexpr unsigned kRunLanes = kWarpThreads;

  // block_results: one element of each kind.
  MASKED_SOFTMAX_DEVICE ClusterGroup(const WarpResults<acc_t>& warp_results, const WarpResults<acc_t>& block_results)
      : block_(warp_results), results_(block_results) {}

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index(); }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return block_threads(); }
  MASKED_SOFTMAX_DEVICE unsigned pieces() const { return cluster_size(); }
  MASKED_SOFTMAX_DEVICE unsigned piece() const { return cluster_rank(); }
  MASKED_SOFTMAX_DEVICE void leave() const { sync_cluster(); }

  MASKED_SOFTMAX_DEVICE acc_t max(acc_t value) const {
    value = block_.max(value);
    if (thread_index() == 0) {
      *results_.maxima = value;
    }
    sync_cluster();
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      value = larger(value, load_from_block(results_.maxima, rank));
    }
    return value;
  }

  MASKED_SOFTMAX_DEVICE Sum<acc_t> sum(const Sum<acc_t>& value) const {
    const Sum<acc_t> of_block = block_.sum(value);
    if (thread_index() == 0) {
      *results_.sum_highs = of_block.high;
      *results_.sum_lows = of_block.low;
    }
    sync_cluster();
    Sum<acc_t> sum;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      Sum<acc_t> other;
      other.high = load_from_block(results_.sum_highs, rank);
      other.low = load_from_block(results_.sum_lows, rank);
      sum.add(other);
    }
    return sum;
  }

  MASKED_SOFTMAX_DEVICE acc_t count(acc_t value) const {
    value = block_.count(value);
    if (thread_index() == 0) {
      *results_.counts = value;
    }
    sync_cluster();
    acc_t count = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      count += load_from_block(results_.counts, rank);
    }
    return count;
  }

 private:
  BlockGroup<acc_t> block_;
  WarpResults<acc_t> results_;
};
#endif

// The same lane of each of a block's kWarps warps: 32 groups, each with a row of its own. Each warp's 32 results lie
// side by side.
template <unsigned kWarps, class acc_t>
class WarpsGroup {
 public:
  static constexpr int kSumLevels = 8;
  static_assert(kWarps << (kSumLevels - 1) >= kWidestBlock, "as many threads as an order may have");
  MASKED_SOFTMAX_DEVICE explicit WarpsGroup(const WarpResults<acc_t>& results) : results_(results) {}

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() / kWarpThreads; }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return kWarps; }
  MASKED_SOFTMAX_DEVICE void meet() const { sync_block(); }

  MASKED_SOFTMAX_DEVICE acc_t max(acc_t value) const {
    results_.maxima[thread_index()] = value;
    sync_block();
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      value = larger(value, results_.maxima[place(warp)]);
    }
    return value;
  }

  MASKED_SOFTMAX_DEVICE Sum<acc_t> sum(const Sum<acc_t>& value) const {
    results_.sum_highs[thread_index()] = value.high;
    results_.sum_lows[thread_index()] = value.low;
    sync_block();
    TreeSum<acc_t, 4> sum;
    static_assert(kWarps <= 8, "a level for each power of two");
    MASKED_SOFTMAX_UNROLL
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      Sum<acc_t> of_warp;
      of_warp.high = results_.sum_highs[place(warp)];
      of_warp.low = results_.sum_lows[place(warp)];
      sum.add(of_warp);
    }
    return sum.total();
  }

  MASKED_SOFTMAX_DEVICE acc_t count(acc_t value) const {
    results_.counts[thread_index()] = value;
    sync_block();
    acc_t count = 0;
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      count += results_.counts[place(warp)];
    }
    return count;
  }

 private:
  MASKED_SOFTMAX_DEVICE unsigned place(unsigned warp) const {
    return warp * kWarpThreads + thread_index() % kWarpThreads;
  }

  WarpResults<acc_t> results_;
};

}  // namespace cuda
}  // namespace masked_softmax
