// Groups of threads that share a row, and their reductions.
//
// reduce() gives every thread of a group the same result, bit for bit, however the threads are scheduled and whichever
// group they form: results are combined in the order that SumOrder (launch_plan.h) defines. Absent results are neutral.
//
// A group has
//   thread(), threads()  the thread's number among those that share a chunk of the row (SumOrder)
//   chunk(), chunks()    the chunk that they share; only for rows held in registers
//   reduce(result)       a Max, Sum or Count over all of the group's threads
//   sync()               the barrier between the last use of a result and the next row
//   kShuffleLanes        lanes of a warp with consecutive threads
#pragma once

#include "cuda/device.cuh"

namespace masked_softmax::cuda {

// The three results. words[] is what threads exchange; kFirstWord is the place among the kResultWords of all three.

template <class acc_t>
struct Max {
  static constexpr int kFirstWord = 0;
  static constexpr int kWords = 1;
  acc_t words[kWords] = {-std::numeric_limits<acc_t>::infinity()};

  MASKED_SOFTMAX_DEVICE void add(acc_t value) { words[0] = larger(words[0], value); }
  MASKED_SOFTMAX_DEVICE void combine(const Max& other) { add(other.words[0]); }
  MASKED_SOFTMAX_DEVICE acc_t value() const { return words[0]; }
};

// A sum and its rounding error (TwoSum: Knuth, The Art of Computer Programming, vol. 2, 4.2.2). As accurate as in twice
// the precision, so neither a row's length nor the number of threads affects its accuracy.
template <class acc_t>
struct Sum {
  static constexpr int kFirstWord = 1;
  static constexpr int kWords = 2;
  acc_t words[kWords] = {0, 0};

  MASKED_SOFTMAX_DEVICE void add(acc_t value) {
    const acc_t high = words[0];
    const acc_t sum = high + value;
    const acc_t part = sum - high;
    words[1] += (high - (sum - part)) + (value - part);
    words[0] = sum;
  }
  // The values are first added to each other, in pairs.
  template <int kCount>
  MASKED_SOFTMAX_DEVICE void add(const acc_t (&values)[kCount]) {
    add(pairwise<0, kCount>(values));
  }
  // Commutative, bit for bit.
  MASKED_SOFTMAX_DEVICE void combine(const Sum& other) {
    const acc_t lows = words[1] + other.words[1];
    words[1] = 0;
    add(other.words[0]);
    words[1] += lows;
  }
  // The rounding error of an infinite sum is NaN, and is left out.
  MASKED_SOFTMAX_DEVICE acc_t value() const { return words[1] == words[1] ? words[0] + words[1] : words[0]; }

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

// Exact up to 2^24 in float32.
template <class acc_t>
struct Count {
  static constexpr int kFirstWord = 3;
  static constexpr int kWords = 1;
  acc_t words[kWords] = {0};

  MASKED_SOFTMAX_DEVICE void add(acc_t value) { words[0] += value; }
  MASKED_SOFTMAX_DEVICE void combine(const Count& other) { add(other.words[0]); }
  MASKED_SOFTMAX_DEVICE acc_t value() const { return words[0]; }
};

static_assert(Count<float>::kFirstWord + Count<float>::kWords == kResultWords, "the last word of the last result");

// Results in memory that threads share, one of each kind in each slot. Every word of a kind has an array to itself.
template <class acc_t>
struct ResultSlots {
  acc_t* words;
  int64_t slots;

  template <class Result>
  MASKED_SOFTMAX_DEVICE acc_t* address(int64_t slot, int word) const {
    return words + (Result::kFirstWord + word) * slots + slot;
  }
  template <class Result>
  MASKED_SOFTMAX_DEVICE void store(int64_t slot, const Result& result) const {
    MASKED_SOFTMAX_UNROLL
    for (int word = 0; word < Result::kWords; ++word) {
      *address<Result>(slot, word) = result.words[word];
    }
  }
  template <class Result>
  MASKED_SOFTMAX_DEVICE Result load(int64_t slot) const {
    Result result;
    MASKED_SOFTMAX_UNROLL
    for (int word = 0; word < Result::kWords; ++word) {
      result.words[word] = *address<Result>(slot, word);
    }
    return result;
  }
};

// Slots in the block's shared memory: the same ones for each call with the same kSlots.
template <class acc_t, int kSlots>
MASKED_SOFTMAX_DEVICE ResultSlots<acc_t> shared_slots() {
  MASKED_SOFTMAX_SHARED(acc_t, words, kResultWords * kSlots);
  return {words, kSlots};
}

// Over kWidth lanes, a power of two.
template <unsigned kWidth, class Result>
MASKED_SOFTMAX_DEVICE Result reduce_lanes(Result result) {
  MASKED_SOFTMAX_UNROLL
  for (unsigned distance = 1; distance < kWidth; distance *= 2) {
    Result other;
    MASKED_SOFTMAX_UNROLL
    for (int word = 0; word < Result::kWords; ++word) {
      other.words[word] = shuffle_xor(result.words[word], distance, kWidth);
    }
    result.combine(other);
  }
  return result;
}

// Combines results that come one after another in a binary tree: 0 and 1, 2 and 3; then these pairs; and so on. Holds
// one result for each level, in registers: the loops are unrolled.
template <class Result, int kLevels>
class Tree {
 public:
  // Precondition: called at most 2^(kLevels - 1) times.
  MASKED_SOFTMAX_DEVICE void add(Result result) {
    bool is_placed = false;
    MASKED_SOFTMAX_UNROLL
    for (int level = 0; level < kLevels; ++level) {
      if (!is_placed) {
        if ((count_ >> level & 1) == 0) {
          levels_[level] = result;
          is_placed = true;
        } else {
          const Result right = result;
          result = levels_[level];
          result.combine(right);
        }
      }
    }
    ++count_;
  }

  MASKED_SOFTMAX_DEVICE Result total() const {
    Result result;
    MASKED_SOFTMAX_UNROLL
    for (int level = 0; level < kLevels; ++level) {
      if ((count_ >> level & 1) != 0) {
        result.combine(levels_[level]);
      }
    }
    return result;
  }

 private:
  Result levels_[kLevels];
  unsigned count_ = 0;
};

// kWidth lanes of a warp: a power of two up to 32.
template <unsigned kWidth>
class LaneGroup {
 public:
  static constexpr int kTreeLevels = 1;  // of a thread that sums for several threads of an order
  static constexpr unsigned kShuffleLanes = kWidth;

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() % kWidth; }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return kWidth; }
  MASKED_SOFTMAX_DEVICE unsigned chunk() const { return 0; }
  MASKED_SOFTMAX_DEVICE unsigned chunks() const { return 1; }
  MASKED_SOFTMAX_DEVICE void sync() const {}  // no barrier needed: the shuffles already synchronize the lanes

  template <class Result>
  MASKED_SOFTMAX_DEVICE Result reduce(const Result& result) const {
    return reduce_lanes<kWidth>(result);
  }
};

// A block, of a multiple of 32 threads. Two reductions of one kind need a barrier between them, so that no thread
// stores a result while a slower one still loads the last: that of another reduction, or sync() at a row's end.
template <class acc_t>
class BlockGroup {
 public:
  static constexpr int kTreeLevels = 3;
  static_assert(kStridedThreads << (kTreeLevels - 1) >= kMaxBlockThreads, "a thread sums for at most four");
  static constexpr unsigned kShuffleLanes = kWarpThreads;

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index(); }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return block_threads(); }
  MASKED_SOFTMAX_DEVICE unsigned chunk() const { return 0; }
  MASKED_SOFTMAX_DEVICE unsigned chunks() const { return 1; }
  MASKED_SOFTMAX_DEVICE void sync() const { sync_block(); }

  template <class Result>
  MASKED_SOFTMAX_DEVICE Result reduce(Result result) const {
    const unsigned lane = thread_index() % kWarpThreads;
    result = reduce_lanes<kWarpThreads>(result);
    if (lane == 0) {
      warp_results_.store(thread_index() / kWarpThreads, result);
    }
    sync_block();
    const bool is_warp = lane < block_threads() / kWarpThreads;
    return reduce_lanes<kWarpThreads>(is_warp ? warp_results_.template load<Result>(lane) : Result());
  }

 private:
  static constexpr int kMaxWarps = kMaxBlockThreads / kWarpThreads;
  ResultSlots<acc_t> warp_results_ = shared_slots<acc_t, kMaxWarps>();
};

#if MASKED_SOFTMAX_HAS_CLUSTERS
// A cluster of blocks, each with a chunk of the row. A block stores its result in its own shared memory; after a
// cluster barrier every thread loads all blocks' results, in the chunks' order. Precondition: one reduction of each
// kind, and sync() before a block returns, so that its shared memory outlives the others' loads.
template <class acc_t>
class ClusterGroup : public BlockGroup<acc_t> {
 public:
  MASKED_SOFTMAX_DEVICE unsigned chunk() const { return cluster_rank(); }
  MASKED_SOFTMAX_DEVICE unsigned chunks() const { return cluster_size(); }
  MASKED_SOFTMAX_DEVICE void sync() const { sync_cluster(); }

  template <class Result>
  MASKED_SOFTMAX_DEVICE Result reduce(Result result) const {
    result = BlockGroup<acc_t>::reduce(result);
    if (thread_index() == 0) {
      block_results_.store(0, result);
    }
    sync_cluster();
    Result total;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      Result other;
      MASKED_SOFTMAX_UNROLL
      for (int word = 0; word < Result::kWords; ++word) {
        other.words[word] = load_from_block(block_results_.template address<Result>(0, word), rank);
      }
      total.combine(other);
    }
    return total;
  }

 private:
  ResultSlots<acc_t> block_results_ = shared_slots<acc_t, 1>();
};
#endif

// One lane of each of a block's kWarps warps: 32 groups, each with a row of its own.
template <unsigned kWarps, class acc_t>
class ColumnGroup {
 public:
  static constexpr int kTreeLevels = 8;
  static_assert(kWarps << (kTreeLevels - 1) >= kMaxBlockThreads, "a thread sums for at most 128");

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() / kWarpThreads; }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return kWarps; }
  MASKED_SOFTMAX_DEVICE void sync() const { sync_block(); }

  template <class Result>
  MASKED_SOFTMAX_DEVICE Result reduce(const Result& result) const {
    results_.store(thread_index(), result);
    sync_block();
    Tree<Result, 4> tree;
    static_assert(kWarps <= 8, "a tree of four levels");
    MASKED_SOFTMAX_UNROLL
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      tree.add(results_.template load<Result>(warp * kWarpThreads + thread_index() % kWarpThreads));
    }
    return tree.total();
  }

 private:
  ResultSlots<acc_t> results_ = shared_slots<acc_t, kWarps * kWarpThreads>();
};

}  // namespace masked_softmax::cuda
