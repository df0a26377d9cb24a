// Staged rows: plain rows that a block holds as in held_rows.cuh, but that come through shared memory. Bulk copies fill
// a ring of stages with the next rows while the block computes one.
//
// So the bytes in flight depend neither on the threads' registers nor on how many loads they have issued: kMinStages to
// kMaxStages rows of each block are under way or at hand. The threads load a row from its stage into registers. The
// rest is that of held rows, with the same order of sums, so results have the same bits.
//
// Bytes moved: as held rows. Copied are the whole pieces of 16 bytes of the valid elements, and nothing else. A row's
// last elements, fewer than a piece has, are loaded by all threads while the row before is computed. Results and
// padding are stored from registers: one instruction of a warp stores 512 bytes, so bulk stores from shared memory
// would take more instructions, not fewer.
//
//   mbarrier s     A phase for each row that goes through stage s. It has one arrival, of the thread that begins the
//                  copies, and expects their bytes. All threads wait for it before they load the row.
//   sync_block()   Between a block's loads from a stage and the copies of another row to it, which thread 0 begins.
//                  It is also the barrier that BlockGroup needs between rows.
//
// No wait lasts forever:
//   - All threads take the block's rows in the same order, and wait once for each.
//   - The phase gets its arrival. For the first row of each stage a thread arrives behind the first barrier, without
//     waiting for anything. For all others, thread 0 arrives when it releases the stage, before it waits for another
//     row.
//   - The phase gets its bytes: a thread expects exactly those that it copies, by one length that it has loaded. For an
//     empty row, or an invalid length, it expects and copies none. A copy ends, or an error ends the kernel.
//   - No thread misses a phase: the next one of its stage begins behind sync_block(), and so behind all waits for this
//     one.
// If another kernel changes a length meanwhile, the threads may load what an earlier row has left in the stage. They
// wait no longer, and access no other memory.
//
// Requires compute capability 9.0. Compiled for less, the kernel is empty, and no plan chooses it
// (DeviceProperties::stage_memory_bytes).
#pragma once

#include "cuda/held_rows.cuh"

namespace masked_softmax::cuda {

#if MASKED_SOFTMAX_HAS_BULK_COPIES
// The number of the next row. It stays where it is past the last one, since the sum might overflow.
MASKED_SOFTMAX_DEVICE unsigned row_after(const KernelProblem& kernel_problem, unsigned row, unsigned step) {
  return row < kernel_problem.plain_rows.rows ? row + step : row;
}

// A row's elements behind its whole pieces of 16 bytes. begin_loads() uses none of the loaded values, so that nothing
// waits for them before finish_loads().
template <class T>
class TailLoads {
 public:
  using VectorType = Vector<T, StagedElems<T>::kElems>;

  // `first` is the row's first element.
  MASKED_SOFTMAX_DEVICE void begin_loads(const T* first, int count) {
    const int whole = StagedElems<T>::whole(count);
    bytes_ = count > whole ? (count - whole) * static_cast<int>(sizeof(T)) : 0;
    const char* const memory = reinterpret_cast<const char*>(in_device_memory(first) + whole);
    if ((bytes_ & 8) != 0) {
      words_[0] = reinterpret_cast<const uint32_t*>(memory)[0];
      words_[1] = reinterpret_cast<const uint32_t*>(memory)[1];
    }
    if ((bytes_ & 4) != 0) {
      word_ = *reinterpret_cast<const uint32_t*>(memory + (bytes_ & 8));
    }
    if (sizeof(T) == 2 && (bytes_ & 2) != 0) {
      half_ = *reinterpret_cast<const uint16_t*>(memory + (bytes_ & 12));
    }
  }

  MASKED_SOFTMAX_DEVICE VectorType finish_loads(T absent) const {
    const auto otherwise = VectorType::filled(absent);
    const uint32_t last = (bytes_ & 2) != 0 ? (otherwise.words[0] & 0xffff0000u) | half_ : otherwise.words[0];
    const bool has_word = (bytes_ & 4) != 0;
    const uint32_t low = has_word ? word_ : last;
    const uint32_t high = has_word ? last : otherwise.words[0];
    const bool has_words = (bytes_ & 8) != 0;
    VectorType vector;
    vector.words[0] = has_words ? words_[0] : low;
    vector.words[1] = has_words ? words_[1] : high;
    vector.words[2] = has_words ? low : otherwise.words[0];
    vector.words[3] = has_words ? high : otherwise.words[0];
    return vector;
  }

 private:
  int bytes_ = 0;
  uint32_t words_[2] = {0, 0};
  uint32_t word_ = 0;
  uint32_t half_ = 0;
};

// A block's rows first, first + step, ... in a ring of stages. A stage has a row of each input.
template <class input_t, int kInputs>
class StagedRows {
 public:
  using Elems = StagedElems<input_t>;

  MASKED_SOFTMAX_DEVICE StagedRows(const KernelProblem& kernel_problem, unsigned first, unsigned step)
      : kernel_problem_(kernel_problem),
        step_(step),
        row_elems_((static_cast<int>(kernel_problem.problem.cols) + Elems::kElems - 1) & ~(Elems::kElems - 1)) {
    MASKED_SOFTMAX_SHARED(uint64_t, mbarriers, kMaxStages);
    MASKED_SOFTMAX_DYNAMIC_SHARED(stages);
    mbarriers_ = mbarriers;
    stages_ = reinterpret_cast<input_t*>(stages);
    if (thread_index() == 0) {
      for (unsigned stage = 0; stage < kernel_problem.stages; ++stage) {
        mbarrier_init(mbarriers_ + stage, 1);
      }
      fence_proxy_async();
    }
    sync_block();
    // The first rows' lengths are loaded by a thread each, so that their loads overlap.
    unsigned number = first;
    MASKED_SOFTMAX_NO_UNROLL
    for (unsigned stage = 0; stage < kernel_problem.stages; ++stage) {
      if (thread_index() == stage) {
        copy(PlainRow(kernel_problem, number), stage);
      }
      number = row_after(kernel_problem, number, step);
    }
    next_copied_number_ = number;
    next_copied_ = PlainRow(kernel_problem, number);
  }

  // Waits for the row that is computed next.
  MASKED_SOFTMAX_DEVICE void wait() const { mbarrier_wait_parity(mbarriers_ + stage_, parity_); }

  // That row's elements in the stage. Precondition: wait() has returned.
  MASKED_SOFTMAX_DEVICE const input_t* elems(int input) const { return memory(stage_, input); }

  // Begins to copy another row over it. Precondition: a barrier since any thread's loads.
  MASKED_SOFTMAX_DEVICE void release() {
    if (thread_index() == 0) {
      copy(next_copied_, stage_);
      next_copied_number_ = row_after(kernel_problem_, next_copied_number_, step_);
      next_copied_ = PlainRow(kernel_problem_, next_copied_number_);
    }
    ++stage_;
    if (stage_ == kernel_problem_.stages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  // An input's row in device memory.
  MASKED_SOFTMAX_DEVICE const input_t* data(int input, const PlainRow& row) const {
    return row.at(static_cast<const input_t*>(kernel_problem_.problem.inputs[input].data),
                  kernel_problem_.plain_rows.inputs[input]);
  }

 private:
  MASKED_SOFTMAX_DEVICE input_t* memory(unsigned stage, int input) const {
    return stages_ + (stage * kInputs + static_cast<unsigned>(input)) * static_cast<unsigned>(row_elems_);
  }

  MASKED_SOFTMAX_DEVICE void copy(const PlainRow& row, unsigned stage) const {
    if (row.length == kNoRow) {
      return;
    }
    uint64_t* const mbarrier = mbarriers_ + stage;
    const auto bytes = static_cast<unsigned>(Elems::whole(row.length)) * static_cast<unsigned>(sizeof(input_t));
    mbarrier_arrive_expect_tx(mbarrier, kInputs * bytes);
    if (bytes > 0) {
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kInputs; ++k) {
        cp_async_bulk_to_shared(memory(stage, k), data(k, row), bytes, mbarrier);
      }
    }
  }

  const KernelProblem& kernel_problem_;
  const unsigned step_;
  const int row_elems_;  // of an input in a stage
  uint64_t* mbarriers_;
  input_t* stages_;
  unsigned stage_ = 0;   // of the row that is computed next
  unsigned parity_ = 0;  // of the phase that it waits for
  // The row after those whose copies have begun: thread 0's. Its length is loaded long before its copy begins.
  unsigned next_copied_number_;
  PlainRow next_copied_;
};
#endif

template <bool kForward, class T>
MASKED_SOFTMAX_KERNEL(kStagedThreadsPerSm, 1)
staged_block(MASKED_SOFTMAX_KERNEL_ARGUMENT KernelProblem kernel_problem) {
#if MASKED_SOFTMAX_HAS_BULK_COPIES
  using Types = RowTypes<T, T>;
  constexpr int kInputs = kForward ? 1 : 2;
  constexpr int kVectors = held_vectors(Types::kElems, kInputs);
  using Group = BlockGroup<typename Types::acc_t>;
  const Group group;
  const auto absent = absent_value<kForward, T>(kernel_problem);
  StagedRows<T, kInputs> staged(kernel_problem, block_index(), grid_blocks());
  TailLoads<T> tails[kInputs];
  const auto load_tails = [&](const PlainRow& row) MASKED_SOFTMAX_DEVICE_LAMBDA {
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kInputs; ++k) {
      tails[k].begin_loads(staged.data(k, row), row.length);
    }
  };
  unsigned number = block_index();
  PlainRow row(kernel_problem, number);
  load_tails(row);
  unsigned next_number = row_after(kernel_problem, number, grid_blocks());
  PlainRow next(kernel_problem, next_number);
  while (number < kernel_problem.plain_rows.rows) {
    HeldRows<T, T, kInputs, 1, kVectors, Group, true> rows(group);
    StagedElems<T> elems[kInputs];
    staged.wait();
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kInputs; ++k) {
      elems[k] = {staged.elems(k), tails[k].finish_loads(absent)};
    }
    rows.take_staged(kernel_problem, row, elems, absent);
    sync_block();
    staged.release();
    number = next_number;
    row = next;
    load_tails(row);
    next_number = row_after(kernel_problem, number, grid_blocks());
    next = PlainRow(kernel_problem, next_number);
    compute_rows<kForward, false>(group, kernel_problem, rows);
  }
#endif
}

template <bool kForward, class input_t, class output_t>
Status launch_staged_rows(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  if constexpr (std::is_same_v<input_t, output_t>) {
    return launch(staged_block<kForward, input_t>, plan, stream, kernel_problem);
  } else {
    return kInvalidLaunch;
  }
}

}  // namespace masked_softmax::cuda
