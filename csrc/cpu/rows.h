// Runs a problem's rows [begin, end): chooses how the rows' memory is reached, walks them, and fills their padding.
#pragma once

#include "cpu/column_strips.h"
#include "cpu/long_row.h"
#include "cpu/narrow_rows.h"
#include "cpu/short_rows.h"

namespace masked_softmax {

// Contiguous rows of types that the vectors load and store.
template <class V, class input_t, class output_t>
struct DirectAccess {
  using acc_t = typename V::acc_t;
  using batch_input_t = input_t;
  using batch_output_t = output_t;
  static constexpr int64_t kLongestShortRow = kShortRowElems;
  static constexpr int64_t kMostBatchElems = kBatchBytes / sizeof(input_t);
  static constexpr bool kStaged = false;

  explicit DirectAccess(const Problem& /*problem*/) {}

  MASKED_SOFTMAX_INLINE DirectSource<input_t> source(const Operand& operand, int64_t offset) const {
    return DirectSource<input_t>(static_cast<const input_t*>(operand.data) + offset);
  }
  MASKED_SOFTMAX_INLINE DirectSink<output_t> sink(const Operand& operand, int64_t offset) const {
    return DirectSink<output_t>(static_cast<output_t*>(operand.data) + offset);
  }

  static MASKED_SOFTMAX_INLINE int64_t col_stride(const Operand& /*operand*/) { return 1; }
  static MASKED_SOFTMAX_INLINE const void* input_at(const Operand& operand, int64_t offset) {
    return static_cast<const input_t*>(operand.data) + offset;
  }
  static MASKED_SOFTMAX_INLINE void* output_at(const Operand& operand, int64_t offset) {
    return static_cast<output_t*>(operand.data) + offset;
  }
  MASKED_SOFTMAX_INLINE void bring(const Problem& /*problem*/, Batch<V>& /*batch*/) {}
  MASKED_SOFTMAX_INLINE void finish(const Problem& /*problem*/, Batch<V>& /*batch*/) {}

  // valid: where the row's valid columns begin, with `before` and `after` columns of padding around them.
  static MASKED_SOFTMAX_INLINE void fill_padding(const Operand& /*output*/, void* valid, int64_t before, int64_t length,
                                                 int64_t after, acc_t value, Writing writing) {
    output_t* first = static_cast<output_t*>(valid);
    if (before > 0) {
      fill(first - before, before, value, writing);
    }
    if (after > 0) {
      fill(first + length, after, value, writing);
    }
  }

 private:
  static MASKED_SOFTMAX_NOINLINE void fill(output_t* to, int64_t count, acc_t value, Writing writing) {
    constexpr int64_t kMemsetBytes = 512;  // from here on memset's own start costs less than our stores
    if (writing == Writing::kToCache && value == 0 && count * static_cast<int64_t>(sizeof(output_t)) >= kMemsetBytes) {
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(output_t));
      return;
    }
    const acc_t filling = hidden(value);
    write_row<V>(to, count, count, writing, [&](auto as, int64_t /*i*/, auto /*lanes*/) MASKED_SOFTMAX_LAMBDA_INLINE {
      return decltype(as)::type::broadcast(filling);
    });
  }
};

// Everything else: a batch's rows are brought into buffers of the computing type before its sweeps, and its results out
// of one after them.
template <class V>
struct StagedAccess {
  using acc_t = typename V::acc_t;
  using batch_input_t = acc_t;
  using batch_output_t = acc_t;
  static constexpr int64_t kMostBatchElems = kBatchBytes / sizeof(float);
  static constexpr int64_t kLongestShortRow = kMostBatchElems;
  static constexpr bool kStaged = true;

  explicit StagedAccess(const Problem& problem) : factor_(static_cast<acc_t>(input_factor(problem))) {}

  StagedSource<V> source(const Operand& operand, int64_t offset) const {
    return {element_at(operand.data, operand.type, offset), operand.type, operand.col_stride, factor_};
  }
  StagedSink<V> sink(const Operand& operand, int64_t offset) const {
    return {element_at(operand.data, operand.type, offset), operand.type, operand.col_stride};
  }

  static int64_t col_stride(const Operand& operand) { return operand.col_stride; }
  static const void* input_at(const Operand& operand, int64_t offset) {
    return element_at(static_cast<const void*>(operand.data), operand.type, offset);
  }
  static void* output_at(const Operand& operand, int64_t offset) {
    return element_at(operand.data, operand.type, offset);
  }

  // The results go over the first input's buffer: every sweep reads an element before it writes it.
  void bring(const Problem& problem, Batch<V>& batch) {
    int64_t first = 0;
    for (int r = 0; r < batch.rows; ++r) {
      for (int k = 0; k < problem.input_count; ++k) {
        acc_t* buffer = buffers_[k] + first;
        gather(batch.inputs[k][r], problem.inputs[k].type, problem.inputs[k].col_stride, batch.lengths[r], buffer);
        if (factor_ != 1) {
          multiply_all<V>(buffer, batch.lengths[r], factor_);
        }
        batch.inputs[k][r] = buffer;
      }
      destinations_[r] = batch.outputs[r];
      batch.outputs[r] = buffers_[0] + first;
      first += batch.scratch_elems(batch.lengths[r]);
    }
  }
  void finish(const Problem& problem, Batch<V>& batch) {
    for (int r = 0; r < batch.rows; ++r) {
      scatter(static_cast<const acc_t*>(batch.outputs[r]), batch.lengths[r], destinations_[r], problem.output.type,
              problem.output.col_stride);
      batch.outputs[r] = destinations_[r];
    }
  }

  static void fill_padding(const Operand& output, void* valid, int64_t before, int64_t length, int64_t after,
                           acc_t value, Writing /*writing*/) {
    const auto fill = [&](int64_t first, int64_t count) {
      void* to = element_at(valid, output.type, first * output.col_stride);
      scatter_value(value, count, to, output.type, output.col_stride);
    };
    fill(-before, before);
    fill(length, after);
  }

 private:
  alignas(64) acc_t buffers_[kMaxInputs][kMostBatchElems];
  void* destinations_[kBatchRows];
  acc_t factor_;
};

// What an operation does to a batch and to a long row.
template <class V, class Access, Operation kOperation>
struct Kernel {
  static constexpr bool kForward = is_forward(kOperation);
  using acc_t = typename V::acc_t;
  using input_t = typename Access::batch_input_t;
  using output_t = typename Access::batch_output_t;
  using Parameters = std::conditional_t<kForward, RowScale<acc_t>, DerivativeTerms<acc_t>>;

  static constexpr int kInputs = [] {
    if constexpr (kForward) {
      return 1;
    } else {
      return Derivative<kOperation>::kInputs;
    }
  }();
  static constexpr acc_t kPadding =
      kOperation == Operation::kLogSoftmax ? -std::numeric_limits<acc_t>::infinity() : acc_t{0};

  static MASKED_SOFTMAX_INLINE void run_batch(Batch<V>& batch, const Batch<V>& next, const Parameters& parameters,
                                              acc_t* scratch, Writing writing) {
    if constexpr (kForward) {
      forward_batch<V, kOperation, input_t, output_t>(batch, next, parameters, scratch, writing);
    } else {
      derivative_batch<V, kOperation, input_t, output_t>(batch, next, parameters, writing);
    }
  }

  // offsets: of the first valid element in the output and the inputs.
  static MASKED_SOFTMAX_NOINLINE void run_long_row(const Problem& problem, int64_t output_offset,
                                                   const int64_t* input_offsets, int64_t length,
                                                   const Parameters& parameters) {
    // Directly only where nothing needs converting: a tile in a buffer costs a long row little.
    constexpr bool kDirect = std::is_same_v<Access, DirectAccess<V, acc_t, acc_t>>;
    using LongAccess = std::conditional_t<kDirect, Access, StagedAccess<V>>;
    const LongAccess access(problem);
    const auto source = [&](int k) { return access.source(problem.inputs[k], input_offsets[k]); };
    auto sink = access.sink(problem.output, output_offset);
    if constexpr (kForward) {
      auto x = source(0);
      forward_long_row<V, kOperation>(x, sink, length, parameters);
    } else if constexpr (Derivative<kOperation>::kInputs == 2) {
      decltype(source(0)) sources[] = {source(0), source(1)};
      derivative_long_row<V, kOperation>(sources, sink, length, parameters);
    } else {
      decltype(source(0)) sources[] = {source(0), source(1), source(2)};
      derivative_long_row<V, kOperation>(sources, sink, length, parameters);
    }
  }
};

template <class V, class Access, Operation kOperation>
MASKED_SOFTMAX_NOINLINE void run_swept_rows(const Problem& problem, int64_t begin, int64_t end) {
  using K = Kernel<V, Access, kOperation>;
  const typename K::Parameters parameters(problem.scale / input_factor(problem));
  const Operand& output = problem.output;
  Access access(problem);
  const bool is_packed = problem.packing.is_packed;

  const Writing writing = Access::kStaged ? Writing::kToCache : writing_of(problem);
  constexpr int64_t kScratchElems = kOperation == Operation::kSoftmax ? Access::kLongestShortRow : 1;
  alignas(64) typename V::acc_t scratch[kScratchElems];

  // One batch is computed while the next, already filled, is on its way from memory: direct passes ask for it.
  Batch<V> batches[2];
  Batch<V>* filling = &batches[0];
  Batch<V>* filled = &batches[1];
  const auto compute_filled = [&]() MASKED_SOFTMAX_NOINLINE {
    access.bring(problem, *filled);
    K::run_batch(*filled, Access::kStaged ? *filled : *filling, parameters, scratch, writing);
    access.finish(problem, *filled);
    for (int r = 0; r < (filled->has_padding ? filled->rows : 0); ++r) {
      const int64_t written = Access::kStaged ? filled->lengths[r] : filled->written[r];
      Access::fill_padding(output, filled->outputs[r], filled->before[r], written,
                           filled->lengths[r] + filled->after[r] - written, K::kPadding, writing);
    }
    filled->clear();
    std::swap(filling, filled);
  };

  const auto take_row = [&](const RowRun& run, int64_t ahead, RowBounds bounds) MASKED_SOFTMAX_LAMBDA_INLINE {
    const int64_t length = bounds.length();
    const int64_t before = is_packed ? 0 : bounds.start;
    const int64_t after = is_packed ? 0 : problem.cols - bounds.end;
    const int64_t output_offset = run.output_offset(ahead) + bounds.start * Access::col_stride(output);
    void* const valid = Access::output_at(output, output_offset);
    if (length == 0) {
      Access::fill_padding(output, valid, before, length, after, K::kPadding, writing);
      return;
    }
    int64_t input_offsets[K::kInputs];
    for (int k = 0; k < K::kInputs; ++k) {
      input_offsets[k] = run.input_offset(k, ahead) + bounds.start * Access::col_stride(problem.inputs[k]);
    }
    if (length > Access::kLongestShortRow) {
      K::run_long_row(problem, output_offset, input_offsets, length, parameters);
      Access::fill_padding(output, valid, before, length, after, K::kPadding, writing);
      return;
    }
    const int64_t row_elems = Batch<V>::scratch_elems(length);
    if (filling->rows == kBatchRows || (filling->elems + row_elems > Access::kMostBatchElems && filling->rows > 0)) {
      compute_filled();
    }
    Batch<V>& batch = *filling;
    const int row = batch.rows++;
    batch.elems += row_elems;
    for (int k = 0; k < K::kInputs; ++k) {
      batch.inputs[k][row] = Access::input_at(problem.inputs[k], input_offsets[k]);
    }
    batch.outputs[row] = valid;
    batch.lengths[row] = length;
    batch.before[row] = before;
    batch.after[row] = after;
    batch.has_padding |= before + after > 0;
  };

  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run);) {
    for (int64_t first = 0; first < run.rows; first += kBatchRows) {
      RowBounds bounds[kBatchRows];
      const int64_t count = run.rows - first < kBatchRows ? run.rows - first : kBatchRows;
      run.read_bounds(first, count, bounds);
      for (int64_t i = 0; i < count; ++i) {
        take_row(run, first + i, bounds[i]);
      }
    }
  }
  compute_filled();
  compute_filled();
  if (writing == Writing::kPastCaches) {
    V::finish_stores();
  }
}

template <class V, class Access, Operation kOperation>
void run_rows(const Problem& problem, int64_t begin, int64_t end) {
  if constexpr (is_ever_narrow(kOperation) && V::kNarrowVectors > 0 && !Access::kStaged) {
    if (is_narrow<V>(problem)) {
      using K = Kernel<V, Access, kOperation>;
      const auto sweep = [&](int64_t row) { run_swept_rows<V, Access, kOperation>(problem, row, row + 1); };
      return run_narrow_rows<V, typename K::input_t, typename K::output_t, kOperation, V::kNarrowVectors>(
          problem, begin, end, sweep);
    }
  }
  run_swept_rows<V, Access, kOperation>(problem, begin, end);
}

// The others are asked for by second derivatives and forward-mode differentiation only: one way for every type is
// enough.
constexpr bool has_direct_kernel(Operation operation) {
  return is_forward(operation) || operation == Operation::kSoftmaxBackward ||
         operation == Operation::kLogSoftmaxBackward;
}

// Rows that are not contiguous, or not of types that are read and written directly: side by side in strips, or one by
// one through buffers.
template <class V, Operation kOperation>
void run_staged(const Problem& problem, int64_t begin, int64_t end) {
  using Staged = StagedAccess<V>;
  using K = Kernel<V, Staged, kOperation>;
  using Strips = ColumnStrips<V, K::kInputs>;
  if (columns_are_adjacent(problem) || !Strips::has_strips(problem)) {
    return run_rows<V, Staged, kOperation>(problem, begin, end);
  }
  Strips::run(problem, begin, end, K::kPadding, [](const Problem& strip) {
    if constexpr (has_direct_kernel(kOperation)) {
      if (input_factor(strip) == 1 && !is_scale_extreme(strip)) {
        return run_rows<V, DirectAccess<V, typename V::acc_t, typename V::acc_t>, kOperation>(strip, 0, strip.rows);
      }
    }
    run_rows<V, Staged, kOperation>(strip, 0, strip.rows);
  });
}

template <class Isa, Operation kOperation>
void run_indirect(const Problem& problem, int64_t begin, int64_t end) {
  if (accumulates_in_double(problem)) {
    run_staged<typename Isa::Double, kOperation>(problem, begin, end);
  } else {
    run_staged<typename Isa::Float, kOperation>(problem, begin, end);
  }
}

template <class V, class input_t, class output_t, Operation kOperation>
bool run_if(const Problem& problem, ElementType input, ElementType output, int64_t begin, int64_t end) {
  if (problem.inputs[0].type != input || problem.output.type != output) {
    return false;
  }
  run_rows<V, DirectAccess<V, input_t, output_t>, kOperation>(problem, begin, end);
  return true;
}

// The types that are read and written directly: one type throughout, and what autocast makes of the 16-bit types, which
// goes from them in a forward pass and back to them in a gradient. False where the problem has others.
template <class Isa, Operation kOperation>
bool run_direct(const Problem& problem, int64_t begin, int64_t end) {
  using Float = typename Isa::Float;
  constexpr auto kFloat = ElementType::kFloat32;
  constexpr auto kDouble = ElementType::kFloat64;
  constexpr auto kBfloat = ElementType::kBFloat16;
  constexpr auto kHalf = ElementType::kFloat16;
  if (run_if<Float, float, float, kOperation>(problem, kFloat, kFloat, begin, end) ||
      run_if<typename Isa::Double, double, double, kOperation>(problem, kDouble, kDouble, begin, end)) {
    return true;
  }
  if constexpr (Isa::kLoads16Bit) {
    if (run_if<Float, bfloat16_t, bfloat16_t, kOperation>(problem, kBfloat, kBfloat, begin, end) ||
        run_if<Float, float16_t, float16_t, kOperation>(problem, kHalf, kHalf, begin, end)) {
      return true;
    }
    if constexpr (is_forward(kOperation)) {
      return run_if<Float, bfloat16_t, float, kOperation>(problem, kBfloat, kFloat, begin, end) ||
             run_if<Float, float16_t, float, kOperation>(problem, kHalf, kFloat, begin, end);
    } else {
      return run_if<Float, float, bfloat16_t, kOperation>(problem, kFloat, kBfloat, begin, end) ||
             run_if<Float, float, float16_t, kOperation>(problem, kFloat, kHalf, begin, end);
    }
  }
  return false;
}

template <class Isa, Operation kOperation>
void run_operation(const Problem& problem, int64_t begin, int64_t end) {
  if constexpr (has_direct_kernel(kOperation)) {
    const bool may_be_direct = columns_are_adjacent(problem) && input_types_agree(problem) &&
                               !is_scale_extreme(problem) && input_factor(problem) == 1;
    if (may_be_direct && run_direct<Isa, kOperation>(problem, begin, end)) {
      return;
    }
  }
  run_indirect<Isa, kOperation>(problem, begin, end);
}

template <class Isa>
void run(const Problem& problem, int64_t begin, int64_t end) {
  switch (problem.operation) {
    case Operation::kSoftmax: return run_operation<Isa, Operation::kSoftmax>(problem, begin, end);
    case Operation::kLogSoftmax: return run_operation<Isa, Operation::kLogSoftmax>(problem, begin, end);
    case Operation::kSoftmaxBackward: return run_operation<Isa, Operation::kSoftmaxBackward>(problem, begin, end);
    case Operation::kLogSoftmaxBackward: return run_operation<Isa, Operation::kLogSoftmaxBackward>(problem, begin, end);
    case Operation::kLogSoftmaxJvp: return run_operation<Isa, Operation::kLogSoftmaxJvp>(problem, begin, end);
    case Operation::kSoftmaxBackwardWrtY:
      return run_operation<Isa, Operation::kSoftmaxBackwardWrtY>(problem, begin, end);
    case Operation::kLogSoftmaxBackwardWrtY:
      return run_operation<Isa, Operation::kLogSoftmaxBackwardWrtY>(problem, begin, end);
    case Operation::kSoftmaxBackwardJvpWrtY:
      return run_operation<Isa, Operation::kSoftmaxBackwardJvpWrtY>(problem, begin, end);
    case Operation::kLogSoftmaxJvpJvpWrtY:
      return run_operation<Isa, Operation::kLogSoftmaxJvpJvpWrtY>(problem, begin, end);
  }
}

}  // namespace masked_softmax
