// Rows that fit a scratch buffer, several at a time, sweep by sweep.
//
// A sweep over one short row ends in a reduction whose result the next sweep waits for. So each sweep runs over a whole
// batch of rows before the next one begins: the processor works on one row's elements while it reduces another's, and
// the polynomial's coefficients stay in registers. Between the sweeps the exponentials, each evaluated once, wait in
// the scratch, which stays in cache: memory sees one read of the valid elements and one write of the result.
//
// Meanwhile memory is kept busy too: the sweep that computes most asks for the lines that this batch will write and
// that the next one will read. The hardware's own prefetchers stop at the end of a page and know nothing of lengths.
// They are asked for into the second-level cache: the first has fewer misses under way at a time, and so a lower
// bandwidth. (Zen 4, 4096 x 512 floats, uniform lengths. Caches cold: 300 ns a row; asked for into the first level 560,
// and 520 without the padding's lines. In the third level: 130 ns; 240; and 350.)
//
// Input and output may be the same memory, element for element.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax {

// A batch holds rows of together kBatchElems elements at most: 8 KiB of floats, which with as much input and output
// stay in a first-level cache of 32 KiB. A single row may have kShortRowElems.
constexpr int kBatchRows = 16;
constexpr int64_t kBatchElems = 2048;
constexpr int64_t kShortRowElems = 8192;

template <class V>
struct Batch {
  using acc_t = typename V::acc_t;
  static constexpr int kMostSums = 2;

  int rows = 0;
  int64_t elems = 0;  // that they take of the scratch
  bool has_padding = false;
  const void* inputs[kMaxInputs][kBatchRows];
  void* outputs[kBatchRows];
  int64_t lengths[kBatchRows];
  int64_t before[kBatchRows];  // columns of padding
  int64_t after[kBatchRows];
  acc_t* scratch = nullptr;
  acc_t maxima[kBatchRows];
  acc_t sums[kMostSums][kBatchRows];
  alignas(64) acc_t lanes[kMostSums][kBatchRows * V::kLanes];

  void clear() {
    rows = 0;
    elems = 0;
    has_padding = false;
  }

  // In the scratch every row begins at a multiple of kLanes.
  static int64_t scratch_elems(int64_t length) { return (length + V::kLanes - 1) & -int64_t{V::kLanes}; }
};

// The batch that is computed, and two behind it, for whose rows there is something to do meanwhile. Where results go
// past the caches there is one before it, too: its results are written meanwhile. Where rows are staged there is only
// the first: they are brought into their buffers one batch at a time.
template <class V, int64_t kScratchElems, bool kLooksAhead>
class Batches {
 public:
  static constexpr bool kAhead = kLooksAhead;
  static constexpr bool kMayWriteLater = V::kStoresPastCaches && kLooksAhead && kScratchElems > 1;
  const Writing writing;
  const bool writes_later;

  explicit Batches(Writing how) : writing(how), writes_later(kMayWriteLater && how == Writing::kPastCaches) {
    now().scratch = scratch_[0];
  }

  MASKED_SOFTMAX_INLINE Batch<V>& before() const { return *batches_[3]; }
  MASKED_SOFTMAX_INLINE Batch<V>& now() const { return *batches_[0]; }
  MASKED_SOFTMAX_INLINE Batch<V>& next() const { return *batches_[1]; }
  MASKED_SOFTMAX_INLINE Batch<V>& after_next() const { return *batches_[2]; }
  MASKED_SOFTMAX_INLINE Batch<V>& filling() const { return *batches_[kLooksAhead ? 2 : 0]; }

  void advance() {
    if (!writes_later) {
      now().clear();
    }
    if (!kLooksAhead) {
      return;
    }
    Batch<V>* const done = batches_[3];
    done->clear();
    batches_[3] = batches_[0];
    batches_[0] = batches_[1];
    batches_[1] = batches_[2];
    batches_[2] = done;
    now().scratch = writes_later && before().scratch == scratch_[0] ? scratch_[kMayWriteLater ? 1 : 0] : scratch_[0];
  }

  // How often to advance until nothing is left.
  static constexpr int kDepth = 4;

 private:
  Batch<V> storage_[kDepth];
  Batch<V>* batches_[kDepth] = {&storage_[0], &storage_[1], &storage_[2], &storage_[3]};
  alignas(64) typename V::acc_t scratch_[kMayWriteLater ? 2 : 1][kScratchElems];
};

// What memory is asked for while row `row` of a batch is computed: the same row of the batch after the next one, and
// this row's output.
template <class V, class T, class U>
class MemoryAhead {
 public:
  MASKED_SOFTMAX_INLINE MemoryAhead(const Batch<V>& now, const Batch<V>& after_next, Writing writing, int row)
      : asks_(now.lengths[row] >= kFewElems) {
    if (!asks_) {
      return;
    }
    const bool has_row = row < after_next.rows;
    const Batch<V>& asked = has_row ? after_next : now;
    input_ = static_cast<const T*>(asked.inputs[0][row]);
    last_ = has_row ? asked.lengths[row] - 1 : 0;
    asks_for_output_ = writing == Writing::kToCache;
    output_ = static_cast<const U*>(now.outputs[row]);
    if (asks_for_output_ && now.after[row] > 0) {
      ask_for_padding(output_ + now.lengths[row], now.after[row]);
    }
  }

  // The `count` elements from i on of both.
  MASKED_SOFTMAX_INLINE void ask_for(int64_t i, int64_t count) const {
    if (!asks_) {
      return;
    }
    for (int64_t k = i; k < i + count; k += kLineBytes / sizeof(T)) {
      __builtin_prefetch(input_ + (k < last_ ? k : last_), 0, kIntoSecondLevel);
    }
    if (asks_for_output_) {
      for (int64_t k = i; k < i + count; k += kLineBytes / sizeof(U)) {
        __builtin_prefetch(output_ + k, 0, kIntoSecondLevel);
      }
    }
  }

 private:
  static constexpr int kIntoSecondLevel = 2;
  static constexpr int64_t kLineBytes = 64;
  // Shorter rows follow one another closely enough for the hardware, and asking would cost more than they take.
  static constexpr int64_t kFewElems = 128;
  // Beyond this the stores of the padding are a stream of their own, which the hardware sees coming.
  static constexpr int64_t kMostPaddingBytes = 4096;

  static MASKED_SOFTMAX_INLINE void ask_for_padding(const U* padding, int64_t count) {
    constexpr int64_t kMostElems = kMostPaddingBytes / sizeof(U);
    const int64_t asked = count < kMostElems ? count : kMostElems;
    for (int64_t i = 0; i < asked; i += kLineBytes / sizeof(U)) {
      __builtin_prefetch(padding + i, 0, kIntoSecondLevel);
    }
  }

  const bool asks_;
  const T* input_;
  int64_t last_;
  const U* output_;
  bool asks_for_output_;
};

template <class V, class T>
MASKED_SOFTMAX_NOINLINE V rest_maxima(const T* x, int64_t count) {
  return find_maxima<V>(x, count);
}

// Looks for the largest elements of a row while another one's exponentials are computed, which leaves the processor
// ports to load and compare on. Their order shows in nothing but the sign of a zero.
template <class V, class T>
class MaximaAhead {
 public:
  MASKED_SOFTMAX_INLINE MaximaAhead(const Batch<V>& batch, int row)
      : x_(static_cast<const T*>(batch.inputs[0][row])), length_(row < batch.rows ? batch.lengths[row] : 0) {
    for (V& chain : maxima_) {
      chain = V::broadcast(-std::numeric_limits<typename V::acc_t>::infinity());
    }
  }

  // As many elements from i on as a W holds, if there are as many.
  template <class W>
  MASKED_SOFTMAX_INLINE void look_at(int64_t i) {
    if (i + W::kLanes <= length_) {
      const W loaded = W::load(x_ + i);
      for (int k = 0; k < W::kLanes / V::kLanes; ++k) {
        maxima_[k] = V::max(vector_of(loaded, k), maxima_[k]);
      }
      seen_ = i + W::kLanes;
    }
  }

  // Spread over the lanes; what was not looked at yet is now.
  MASKED_SOFTMAX_INLINE V finish() const {
    const V seen = V::max(V::max(maxima_[0], maxima_[1]), V::max(maxima_[2], maxima_[3]));
    return seen_ == length_ ? seen : V::max(rest_maxima<V>(x_ + seen_, length_ - seen_), seen);
  }

 private:
  const T* x_;
  int64_t length_;
  int64_t seen_ = 0;
  V maxima_[kChains];
};

// The maxima of rows that nothing was computed beside, from row `first` on, and those of all rows reduced. A maximum is
// never -0, whichever of several zeros was found first: in a logarithm's results the sign would show.
template <class V, class T>
MASKED_SOFTMAX_NOINLINE void finish_maxima(Batch<V>& batch, int first) {
  for (int r = first; r < batch.rows; ++r) {
    find_maxima<V>(static_cast<const T*>(batch.inputs[0][r]), batch.lengths[r]).store(batch.lanes[0] + r * V::kLanes);
  }
  reduce_max_rows<V>(batch.lanes[0], batch.rows, batch.maxima);
  for (int r = 0; r < batch.rows; ++r) {
    batch.maxima[r] += 0;
  }
}

// What becomes of row `row`'s elements, its sums known; nothing of a row that is not there.
template <class V, Operation kOperation, class T>
MASKED_SOFTMAX_INLINE auto row_values(const Batch<V>& batch, int row, const RowScale<typename V::acc_t>& scale,
                                      const typename V::acc_t* scratch) {
  using acc_t = typename V::acc_t;
  if constexpr (kOperation == Operation::kLogSoftmax) {
    (void)scratch;
    return LogProbability<acc_t, T>{static_cast<const T*>(batch.inputs[0][row]), batch.maxima[row], scale.scale,
                                    log_of_sum(batch.sums[0][row], batch.sums[1][row])};
  } else {
    (void)scale;
    return Probability<acc_t>{scratch, 1 / batch.sums[0][row]};
  }
}

// The sweep that computes most: the exponentials and their sums. Beside them, where kWritesLater, the results of the
// batch before are written: stores past the caches wait for memory, and this is what can be done while they do.
template <class V, Operation kOperation, class T, class U, bool kWritesLater, class AllBatches>
MASKED_SOFTMAX_NOINLINE void sweep_exponentials(const AllBatches& batches, const RowScale<typename V::acc_t>& scale) {
  using acc_t = typename V::acc_t;
  constexpr int kSums = kOperation == Operation::kLogSoftmax ? 2 : 1;
  Batch<V>& batch = batches.now();
  const Batch<V>& before = batches.before();
  acc_t* scratch = batch.scratch;
  const acc_t* scratch_before = before.scratch;
  for (int r = 0; r < batch.rows; ++r) {
    const T* x = static_cast<const T*>(batch.inputs[0][r]);
    const acc_t row_max = batch.maxima[r];
    const MemoryAhead<V, T, U> memory(batch, batches.after_next(), batches.writing, r);
    MaximaAhead<V, T> next(batches.next(), r);
    const auto values = row_values<V, kOperation, T>(before, r, scale, scratch_before);
    const int64_t length_before = r < before.rows ? before.lengths[r] : 0;
    RowWriter<V, U, decltype(values)> results(static_cast<U*>(before.outputs[r]), length_before, batches.writing,
                                              values);
    RowSums<V, kSums> sums;
    sums.add(batch.lengths[r], [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
      using W = typename decltype(as)::type;
      memory.ask_for(i, W::kLanes);
      next.template look_at<W>(i);
      if (kWritesLater && i % (kChains * V::kLanes) == 0) {
        results.step();
      }
      if constexpr (kOperation == Operation::kLogSoftmax) {
        return rest_and_maxima<W>(x + i, row_max, scale.exponent, lanes);
      } else {
        return exponential<W>(x + i, row_max, scale.exponent, scratch + i, lanes);
      }
    });
    if constexpr (kWritesLater) {
      results.finish();
    }
    for (int s = 0; s < kSums; ++s) {
      sums.lanes(s).store(batch.lanes[s] + r * V::kLanes);
    }
    if (r < batches.next().rows) {
      next.finish().store(batches.next().lanes[0] + r * V::kLanes);
    }
    scratch += batch.scratch_elems(batch.lengths[r]);
    scratch_before += batch.scratch_elems(length_before);
  }
  for (int s = 0; s < kSums; ++s) {
    reduce_add_rows<V>(batch.lanes[s], batch.rows, batch.sums[s]);
  }
}

// Those of the rows from `first` on that were not written beside another batch.
template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_results(const Batch<V>& batch, int first, const RowScale<typename V::acc_t>& scale,
                                           Writing writing) {
  const typename V::acc_t* scratch = batch.scratch;
  for (int r = 0; r < batch.rows; ++r) {
    if (r >= first) {
      const auto values = row_values<V, kOperation, T>(batch, r, scale, scratch);
      write_row<V>(static_cast<U*>(batch.outputs[r]), batch.lengths[r], writing, values);
    }
    scratch += batch.scratch_elems(batch.lengths[r]);
  }
}

template <class V, Operation kOperation, class T, class U, class AllBatches>
MASKED_SOFTMAX_INLINE void forward_batch(const AllBatches& batches, const RowScale<typename V::acc_t>& scale) {
  if (!AllBatches::kAhead) {
    finish_maxima<V, T>(batches.now(), 0);
  }
  if constexpr (AllBatches::kMayWriteLater) {
    if (batches.writes_later) {
      sweep_exponentials<V, kOperation, T, U, true>(batches, scale);
      finish_maxima<V, T>(batches.next(), batches.now().rows);
      sweep_results<V, kOperation, T, U>(batches.before(), batches.now().rows, scale, batches.writing);
      return;
    }
  }
  sweep_exponentials<V, kOperation, T, U, false>(batches, scale);
  if (AllBatches::kAhead) {
    finish_maxima<V, T>(batches.next(), batches.now().rows);
  }
  sweep_results<V, kOperation, T, U>(batches.now(), 0, scale, batches.writing);
}

template <class V, Operation kOperation, class T>
MASKED_SOFTMAX_NOINLINE void sweep_derivative_sums(Batch<V>& batch, const DerivativeTerms<typename V::acc_t>& shared) {
  using D = Derivative<kOperation>;
  for (int r = 0; r < batch.rows; ++r) {
    const InputPointers<T, D::kInputs> inputs(batch.inputs, r);
    RowSums<V, D::kSums> sums;
    sums.add(batch.lengths[r], [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
      using W = typename decltype(as)::type;
      return D::terms(shared, InputVectors<W, D::kInputs>(inputs.rows, i, lanes).in);
    });
    for (int s = 0; s < D::kSums; ++s) {
      sums.lanes(s).store(batch.lanes[s] + r * V::kLanes);
    }
  }
  for (int s = 0; s < D::kSums; ++s) {
    reduce_add_rows<V>(batch.lanes[s], batch.rows, batch.sums[s]);
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_derivatives(const Batch<V>& batch, const DerivativeTerms<typename V::acc_t>& shared,
                                               Writing writing) {
  using D = Derivative<kOperation>;
  for (int r = 0; r < batch.rows; ++r) {
    const InputPointers<T, D::kInputs> inputs(batch.inputs, r);
    typename V::acc_t sums[D::kSums];
    for (int s = 0; s < D::kSums; ++s) {
      sums[s] = batch.sums[s][r];
    }
    derivative_values<V, kOperation>(inputs.rows, batch.lengths[r], shared, sums, static_cast<U*>(batch.outputs[r]),
                                     writing);
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_INLINE void derivative_batch(Batch<V>& batch, const DerivativeTerms<typename V::acc_t>& shared,
                                            Writing writing) {
  sweep_derivative_sums<V, kOperation, T>(batch, shared);
  sweep_derivatives<V, kOperation, T, U>(batch, shared, writing);
}

}  // namespace masked_softmax
