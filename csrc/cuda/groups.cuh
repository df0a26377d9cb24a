// Groups of threads that share a row, and their reductions.
//
// A thread's, a block's or a chunk's part of a reduction is a partial: a Max, a Sum or a Count. reduce() gives every
// thread of a group the same total, bit for bit, however the threads are scheduled and whichever group they form:
// partials are combined in the order that SumOrder (launch_plan.h) defines. A partial of no elements is neutral.
//
// A group has
//   thread(), threads()  the thread's number among those that share a row, or a chunk of it
//   kMinThreads          a lower bound of threads(); held rows only
//   reduce(partials)     sets each row's partial to the total over all of the group's threads
//   kHasChunks, chunk()  whether a row may have several chunks, and the number of the group's; held rows only
//   release()            after the last reduction of a row; held rows only
//   sync()               the barrier between the last use of a partial in shared memory and the next row
//   kHasOneChunk         whether a row has a single chunk in SumOrder; strided and column rows only
//   kTreeLevels          strided and column rows only: the levels of the Tree in which a thread combines its partials,
//                        if SumOrder has more threads than the group; 1 + log2 of their number
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernel_problem.h"

namespace masked_softmax::cuda {

// The three kinds of partial. words[] is what threads exchange. A slot in memory (PartialSlots) has kPartialWords words
// for one partial of each kind, of which a kind's begin at kFirstWord.

template <class acc_t>
struct Max {
  static constexpr int kFirstWord = 0;
  static constexpr int kWords = 1;
  acc_t words[kWords] = {-std::numeric_limits<acc_t>::infinity()};

  MASKED_SOFTMAX_DEVICE void add(acc_t value) { words[0] = larger(words[0], value); }
  MASKED_SOFTMAX_DEVICE void combine(const Max& other) { add(other.words[0]); }
  MASKED_SOFTMAX_DEVICE acc_t value() const { return words[0]; }
};

// The rounding error of sum = a + b (TwoSum: Knuth, The Art of Computer Programming, vol. 2, 4.2.2).
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t error_of_sum(acc_t a, acc_t b, acc_t sum) {
  const acc_t part = sum - a;
  return (a - (sum - part)) + (b - part);
}

// A sum and its rounding error. As accurate as in twice the precision, so neither a row's length nor the number of
// threads affects its accuracy.
template <class acc_t>
struct Sum {
  static constexpr int kFirstWord = 1;
  static constexpr int kWords = 2;
  acc_t words[kWords] = {0, 0};

  MASKED_SOFTMAX_DEVICE void add(acc_t value) { words[1] += add_to_high(value); }
  // The sum of values in a binary tree.
  template <int kCount>
  MASKED_SOFTMAX_DEVICE static acc_t pairwise(const acc_t (&values)[kCount]) {
    return pairwise_from<0, kCount>(values);
  }
  template <int kCount>
  MASKED_SOFTMAX_DEVICE void add(const acc_t (&values)[kCount]) {
    add(pairwise(values));
  }
  // The same where the sum is 0 before.
  template <int kCount>
  MASKED_SOFTMAX_DEVICE void set(const acc_t (&values)[kCount]) {
    words[0] = pairwise(values);
  }
  // a.combine(b) and b.combine(a) give the same bits, as add_to_high() finds the exact error in either order. The two
  // lanes of a shuffle each combine the other's partial with their own, and need the same result.
  MASKED_SOFTMAX_DEVICE void combine(const Sum& other) {
    const acc_t lows = words[1] + other.words[1];
    words[1] = lows + add_to_high(other.words[0]);
  }
  // The rounding error of an infinite sum is NaN, and is left out.
  MASKED_SOFTMAX_DEVICE acc_t value() const { return words[1] == words[1] ? words[0] + words[1] : words[0]; }

 private:
  // Returns the rounding error.
  MASKED_SOFTMAX_DEVICE acc_t add_to_high(acc_t value) {
    const acc_t high = words[0];
    words[0] = high + value;
    return error_of_sum(high, value, words[0]);
  }

  template <int kFirst, int kCount, int kAll>
  MASKED_SOFTMAX_DEVICE static acc_t pairwise_from(const acc_t (&values)[kAll]) {
    if constexpr (kCount == 1) {
      return values[kFirst];
    } else {
      return pairwise_from<kFirst, kCount / 2>(values) +
             pairwise_from<kFirst + kCount / 2, kCount - kCount / 2>(values);
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

static_assert(Count<float>::kFirstWord + Count<float>::kWords == kPartialWords, "the last word of the last kind");

// Partials in memory that threads share, one of each kind in each slot. Each word has an array of its own, over slots.
template <class acc_t>
struct PartialSlots {
  acc_t* words;
  int64_t slots;

  template <class Partial>
  MASKED_SOFTMAX_DEVICE acc_t* address(int64_t slot, int word) const {
    return words + (Partial::kFirstWord + word) * slots + slot;
  }
  template <class Partial>
  MASKED_SOFTMAX_DEVICE void store(int64_t slot, const Partial& partial) const {
    MASKED_SOFTMAX_UNROLL
    for (int word = 0; word < Partial::kWords; ++word) {
      *address<Partial>(slot, word) = partial.words[word];
    }
  }
  template <class Partial>
  MASKED_SOFTMAX_DEVICE Partial load(int64_t slot) const {
    Partial partial;
    MASKED_SOFTMAX_UNROLL
    for (int word = 0; word < Partial::kWords; ++word) {
      partial.words[word] = *address<Partial>(slot, word);
    }
    return partial;
  }
};

// Slots in the block's shared memory. Calls with the same kSlots return the same memory: a kernel has one group, and
// its copies in all threads of the block must share the slots.
template <class acc_t, int kSlots>
MASKED_SOFTMAX_DEVICE PartialSlots<acc_t> shared_slots() {
  MASKED_SOFTMAX_SHARED(acc_t, words, kPartialWords * kSlots);
  return {words, kSlots};
}

// The smallest power of two that is at least n. Precondition: 1 <= n <= kWarpThreads.
MASKED_SOFTMAX_DEVICE unsigned power_of_two_from(unsigned n) {
  unsigned power = 1;
  MASKED_SOFTMAX_UNROLL
  for (unsigned next = 2; next <= kWarpThreads; next *= 2) {
    power = n > next / 2 ? next : power;
  }
  return power;
}

// Sets each partial to the total over `width` lanes, a power of two. Several rows' reductions overlap.
template <int kRows, class Partial>
MASKED_SOFTMAX_DEVICE void reduce_lanes(Partial (&partials)[kRows], unsigned width) {
  MASKED_SOFTMAX_UNROLL
  for (unsigned distance = 1; distance < kWarpThreads; distance *= 2) {
    if (distance >= width) {
      break;
    }
    MASKED_SOFTMAX_UNROLL
    for (int row = 0; row < kRows; ++row) {
      Partial other;
      MASKED_SOFTMAX_UNROLL
      for (int word = 0; word < Partial::kWords; ++word) {
        other.words[word] = shuffle_xor(partials[row].words[word], distance);
      }
      partials[row].combine(other);
    }
  }
}

// Combines partials that are added one after another in a binary tree: 0 and 1, 2 and 3; then these pairs; and so on.
// Holds one partial for each level, in registers: the loops are unrolled.
template <class Partial, int kLevels>
class Tree {
 public:
  // Precondition: called at most 2^(kLevels - 1) times.
  MASKED_SOFTMAX_DEVICE void add(Partial partial) {
    bool is_placed = false;
    MASKED_SOFTMAX_UNROLL
    for (int level = 0; level < kLevels; ++level) {
      if (!is_placed) {
        if ((count_ >> level & 1) == 0) {
          levels_[level] = partial;
          is_placed = true;
        } else {
          const Partial right = partial;
          partial = levels_[level];
          partial.combine(right);
        }
      }
    }
    ++count_;
  }

  MASKED_SOFTMAX_DEVICE Partial total() const {
    Partial partial;
    MASKED_SOFTMAX_UNROLL
    for (int level = 0; level < kLevels; ++level) {
      if ((count_ >> level & 1) != 0) {
        partial.combine(levels_[level]);
      }
    }
    return partial;
  }

 private:
  Partial levels_[kLevels];
  unsigned count_ = 0;
};

// kWidth lanes of a warp: a power of two up to 32.
template <unsigned kWidth>
class LaneGroup {
 public:
  static constexpr unsigned kMinThreads = kWidth;
  static constexpr bool kHasChunks = false;

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() % kWidth; }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return kWidth; }
  MASKED_SOFTMAX_DEVICE void release() const {}
  MASKED_SOFTMAX_DEVICE void sync() const {}  // no barrier needed: the shuffles already synchronize the lanes

  template <int kRows, class Partial>
  MASKED_SOFTMAX_DEVICE void reduce(Partial (&partials)[kRows]) const {
    reduce_lanes(partials, kWidth);
  }
};

// Lanes of a warp whose number, a power of two, is known at run time. Strided rows only.
class AnyLaneGroup {
 public:
  static constexpr bool kHasOneChunk = true;
  static constexpr int kTreeLevels = 1;  // the order has no more threads

  MASKED_SOFTMAX_DEVICE explicit AnyLaneGroup(unsigned lanes) : lanes_(lanes) {}

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() & (lanes_ - 1); }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return lanes_; }
  MASKED_SOFTMAX_DEVICE void sync() const {}  // no barrier needed: the shuffles already synchronize the lanes

  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce(Partial (&partials)[1]) const {
    reduce_lanes(partials, lanes_);
  }

 private:
  const unsigned lanes_;
};

// A block, of a multiple of 32 threads. Two reductions of one kind need a barrier between them, so that no thread
// stores a partial while a slower one still loads the last: sync(), or the barrier of a reduction of another kind,
// which has words of its own in shared memory.
template <class acc_t>
class BlockGroup {
 public:
  static constexpr unsigned kMinThreads = kWarpThreads;
  static constexpr bool kHasChunks = false;
  static constexpr bool kHasOneChunk = false;
  static constexpr int kTreeLevels = 2;
  static_assert(kStridedThreads << (kTreeLevels - 1) >= kMaxBlockThreads, "strided: at most 2 partials per thread");

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index(); }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return block_threads(); }
  MASKED_SOFTMAX_DEVICE void release() const {}
  MASKED_SOFTMAX_DEVICE void sync() const { sync_block(); }

  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce(Partial (&partials)[1]) const {
    const unsigned lane = thread_index() % kWarpThreads;
    reduce_lanes(partials, kWarpThreads);
    if (lane == 0) {
      warp_partials_.store(thread_index() / kWarpThreads, partials[0]);
    }
    sync_block();
    const unsigned warp = lane & (reduced_warps_ - 1);  // all lanes get the total
    partials[0] = warp < block_threads() / kWarpThreads ? warp_partials_.template load<Partial>(warp) : Partial();
    reduce_lanes(partials, reduced_warps_);
  }

 private:
  static constexpr int kMaxWarps = kMaxBlockThreads / kWarpThreads;
  const PartialSlots<acc_t> warp_partials_ = shared_slots<acc_t, kMaxWarps>();
  const unsigned reduced_warps_ = power_of_two_from(block_threads() / kWarpThreads);
};

// The total over `chunks` chunks, at most `width`, a power of two; in a binary tree. load(chunk, word) loads a word
// of a chunk's partial.
template <class Partial, class Load>
MASKED_SOFTMAX_DEVICE Partial reduce_chunks(unsigned chunks, unsigned width, const Load& load) {
  const unsigned chunk = thread_index() & (width - 1);
  Partial partials[1];
  if (chunk < chunks) {
    MASKED_SOFTMAX_UNROLL
    for (int word = 0; word < Partial::kWords; ++word) {
      partials[0].words[word] = load(chunk, word);
    }
  }
  reduce_lanes(partials, width);
  return partials[0];
}

// A cluster of blocks, each with a chunk of the row. A block stores its partial in its own shared memory; after a
// cluster barrier every warp loads all blocks' partials. release() comes after the last reduction of a row, and sync()
// before a block returns or begins the next row: so no block changes its partials while others load them.
template <class acc_t>
class ClusterGroup : public BlockGroup<acc_t> {
 public:
  static constexpr bool kHasChunks = true;

  MASKED_SOFTMAX_DEVICE int chunk() const { return static_cast<int>(cluster_rank()); }
  MASKED_SOFTMAX_DEVICE void release() const { cluster_arrive_relaxed(); }
  MASKED_SOFTMAX_DEVICE void sync() const { cluster_wait_acquire(); }

  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce(Partial (&partials)[1]) const {
    BlockGroup<acc_t>::reduce(partials);
    if (thread_index() == 0) {
      block_partials_.store(0, partials[0]);
    }
    sync_cluster();
    const unsigned size = cluster_size();
    partials[0] = reduce_chunks<Partial>(size, size, [&](unsigned rank, int word) MASKED_SOFTMAX_DEVICE_LAMBDA {
      return load_from_block(block_partials_.template address<Partial>(0, word), rank);
    });
  }

 private:
  const PartialSlots<acc_t> block_partials_ = shared_slots<acc_t, 1>();
};

// The threads that hold a row of any size: order.threads lanes of a warp; or as many threads of a block, with a chunk
// of the row where it has several.
//
// The chunks of a row have a block of a cluster each. Those of a split row have a block of any, and a launch for each
// reduction: publish() stores a chunk's partial in the workspace, PartialSlots for each row with a slot for each chunk;
// in the next launch, reduce_published() loads all of a row's.
template <class acc_t>
class AnyGroup {
 public:
  static constexpr unsigned kMinThreads = 1;
  static constexpr bool kHasChunks = true;

  // `number` counts the chunks of all rows, if they are split, or the rows.
  MASKED_SOFTMAX_DEVICE AnyGroup(const KernelProblem& kernel_problem, int64_t number)
      : order_threads_(static_cast<unsigned>(kernel_problem.order.threads)),
        is_split_(kernel_problem.pass != Pass::kAll),
        row_(is_split_ ? number / kernel_problem.split_chunks : number),
        chunk_(is_split_ ? number % kernel_problem.split_chunks : cluster_rank()),
        chunks_(is_split_ ? kernel_problem.split_chunks : cluster_size()),
        published_{in_device_memory(static_cast<acc_t*>(kernel_problem.workspace)) + row_ * kPartialWords * chunks_,
                   chunks_} {}

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() % order_threads_; }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return order_threads_; }
  MASKED_SOFTMAX_DEVICE int64_t row() const { return row_; }
  MASKED_SOFTMAX_DEVICE int64_t chunk() const { return chunk_; }
  MASKED_SOFTMAX_DEVICE int64_t chunks() const { return chunks_; }
  MASKED_SOFTMAX_DEVICE void release() const {
    if (is_cluster()) {
      cluster_.release();
    }
  }
  MASKED_SOFTMAX_DEVICE void sync() const {
    if (is_cluster()) {
      cluster_.sync();
    } else if (order_threads_ > kWarpThreads) {
      sync_block();
    }
  }

  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce(Partial (&partials)[1]) const {
    if (is_cluster()) {
      cluster_.reduce(partials);
    } else {
      reduce_chunk(partials);
    }
  }

  // Stores the chunk's partial in the workspace, given this thread's.
  template <class Partial>
  MASKED_SOFTMAX_DEVICE void publish(Partial (&partials)[1]) const {
    reduce_chunk(partials);
    if (thread_index() == 0) {
      published_.store(chunk_, partials[0]);
    }
  }

  // Sets the partial to the total over the chunks' partials that an earlier launch has published. The barrier comes
  // between the loads of the row's ends, which all threads make, and the stores of a result in place.
  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce_published(Partial (&partials)[1]) const {
    partials[0] = Partial();
    MASKED_SOFTMAX_NO_UNROLL
    for (int64_t first = 0; first < chunks_; first += kMaxClusterBlocks) {
      const int64_t rest = chunks_ - first;
      const auto count = static_cast<unsigned>(rest < kMaxClusterBlocks ? rest : kMaxClusterBlocks);
      partials[0].combine(
          reduce_chunks<Partial>(count, kMaxClusterBlocks, [&](unsigned chunk, int word) MASKED_SOFTMAX_DEVICE_LAMBDA {
            return *published_.template address<Partial>(first + chunk, word);
          }));
    }
    sync_block();
  }

 private:
  MASKED_SOFTMAX_DEVICE bool is_cluster() const { return !is_split_ && chunks_ > 1; }

  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce_chunk(Partial (&partials)[1]) const {
    if (order_threads_ > kWarpThreads) {
      cluster_.BlockGroup<acc_t>::reduce(partials);
    } else {
      reduce_lanes(partials, order_threads_);
    }
  }

  const ClusterGroup<acc_t> cluster_;
  const unsigned order_threads_;
  const bool is_split_;
  const int64_t row_;
  const int64_t chunk_;
  const int64_t chunks_;
  const PartialSlots<acc_t> published_;
};

// One lane of each of a block's kWarps warps: 32 groups, each with a row of its own.
template <unsigned kWarps, class acc_t>
class ColumnGroup {
 public:
  static constexpr bool kHasOneChunk = false;
  static constexpr int kTreeLevels = 7;
  static_assert(kWarps << (kTreeLevels - 1) >= kMaxBlockThreads, "at most 64 partials per thread");

  MASKED_SOFTMAX_DEVICE unsigned thread() const { return thread_index() / kWarpThreads; }
  MASKED_SOFTMAX_DEVICE unsigned threads() const { return kWarps; }
  MASKED_SOFTMAX_DEVICE void sync() const { sync_block(); }

  template <class Partial>
  MASKED_SOFTMAX_DEVICE void reduce(Partial (&partials)[1]) const {
    partials_.store(thread_index(), partials[0]);
    sync_block();
    Tree<Partial, 4> tree;
    static_assert(kWarps <= 8, "a tree of four levels");
    MASKED_SOFTMAX_UNROLL
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      tree.add(partials_.template load<Partial>(warp * kWarpThreads + thread_index() % kWarpThreads));
    }
    partials[0] = tree.total();
  }

 private:
  PartialSlots<acc_t> partials_ = shared_slots<acc_t, kWarps * kWarpThreads>();
};

}  // namespace masked_softmax::cuda
