// One row that does not fit the scratch buffer, tile by tile.
//
// The exponentials wait for their sum in the output itself where it is contiguous, of the computing type, and not the
// input, of which they may not be enough (see exp.h). Elsewhere they are evaluated twice: same values, same bits, and
// still no memory beyond the output.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax {

template <class V, class T>
MASKED_SOFTMAX_NOINLINE typename V::acc_t tile_max(const T* x, int64_t count) {
  return find_maxima<V>(x, count).reduce_max();
}

template <class V, bool kOffset, class T>
MASKED_SOFTMAX_NOINLINE void tile_exponentials(const T* x, int64_t count,
                                               const RowExponent<typename V::acc_t>& exponent, typename V::acc_t* e,
                                               RowSums<V>& sums) {
  sums.add(count, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    using W = typename decltype(as)::type;
    return exponential<W, kOffset, false>(x + i, exponent, e + i, lanes);
  });
}

template <class V, class T>
MASKED_SOFTMAX_NOINLINE void tile_rests(const T* x, int64_t count, typename V::acc_t row_max,
                                        const ScaledLog2e<typename V::acc_t>& exponent, RowSums<V, 2>& sums) {
  sums.add(count, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    using W = typename decltype(as)::type;
    return rest_and_maxima<W>(x + i, row_max, exponent, lanes);
  });
}

template <class V, Operation kOperation, class Source, class Sink>
void forward_long_row(Source& x, Sink& y, int64_t length, const RowScale<typename V::acc_t>& scale) {
  using acc_t = typename V::acc_t;
  const auto find_maximum = [&] {
    acc_t row_max = -std::numeric_limits<acc_t>::infinity();
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      const acc_t tile = tile_max<V>(x.tile(first, count), count);
      row_max = tile > row_max ? tile : row_max;
    });
    return row_max;
  };

  if constexpr (kOperation == Operation::kLogSoftmax) {
    const acc_t row_max = find_maximum();
    RowSums<V, 2> sums;
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      tile_rests(x.tile(first, count), count, row_max, scale.log2e, sums);
    });
    const acc_t log_sum = log_of_sum(sums.total(0), sums.total(1));
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      const LogProbability<acc_t, std::remove_pointer_t<decltype(x.tile(0, 0))>> value{x.tile(first, count), row_max,
                                                                                       scale.scale, log_sum};
      write_row<V>(y.tile(first), count, count, Writing::kToCache, value);
      y.finish_tile(first, count);
    });
  } else {
    alignas(64) acc_t tile_scratch[kTileElems<V>];
    const auto place = [&](int64_t first) -> acc_t* {
      if constexpr (!Sink::kStaged && std::is_same_v<typename Sink::element_t, acc_t>) {
        return x.tile(0, 0) == y.tile(0) ? tile_scratch : y.tile(first);
      } else {
        (void)first;
        return tile_scratch;
      }
    };
    const bool are_held = place(0) != tile_scratch;
    const auto add_exponentials = [&](auto has_offset, const RowExponent<acc_t>& exponent) {
      RowSums<V> sum;
      for_each_tile<V>(length, [&](int64_t first, int64_t count) {
        tile_exponentials<V, has_offset.value>(x.tile(first, count), count, exponent, place(first), sum);
      });
      return sum.total(0);
    };
    const acc_t first = V::element(x.tile(0, 1));
    const acc_t last = V::element(x.tile(length - 1, 1));
    RowExponent<acc_t> exponent = exponent_from_reference<V>(row_reference(first, last), scale.log2e);
    acc_t row_sum = add_exponentials(std::false_type(), exponent);
    if (is_sum_too_large(row_sum)) {
      exponent = exponent_from_maximum<V>(find_maximum(), scale.log2e);
      row_sum = add_exponentials(std::true_type(), exponent);
    }
    const acc_t factor = 1 / row_sum;
    RowSums<V> unused;
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      if (!are_held) {
        tile_exponentials<V, true>(x.tile(first, count), count, exponent, tile_scratch, unused);
      }
      write_row<V>(y.tile(first), count, count, Writing::kToCache, Probability<acc_t>{place(first), factor});
      y.finish_tile(first, count);
    });
  }
}

template <class V, Operation kOperation, class T>
MASKED_SOFTMAX_NOINLINE void tile_derivative_sums(const T* const* inputs, int64_t count,
                                                  const DerivativeTerms<typename V::acc_t>& shared,
                                                  RowSums<V, Derivative<kOperation>::kSums>& sums) {
  using D = Derivative<kOperation>;
  sums.add(count, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    using W = typename decltype(as)::type;
    return D::terms(shared, InputVectors<W, D::kInputs>(inputs, i, lanes).in);
  });
}

template <class V, Operation kOperation, class Source, class Sink>
void derivative_long_row(Source* inputs, Sink& output, int64_t length,
                         const DerivativeTerms<typename V::acc_t>& shared) {
  using D = Derivative<kOperation>;
  typename Source::tile_t tiles[D::kInputs];
  const auto bring_tiles = [&](int64_t first, int64_t count) {
    for (int k = 0; k < D::kInputs; ++k) {
      tiles[k] = inputs[k].tile(first, count);
    }
  };

  RowSums<V, D::kSums> row_sums;
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    bring_tiles(first, count);
    tile_derivative_sums<V, kOperation>(tiles, count, shared, row_sums);
  });

  typename V::acc_t sums[D::kSums];
  for (int s = 0; s < D::kSums; ++s) {
    sums[s] = row_sums.total(s);
  }
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    bring_tiles(first, count);
    derivative_values<V, kOperation>(tiles, count, count, shared, sums, output.tile(first), Writing::kToCache);
    output.finish_tile(first, count);
  });
}

}  // namespace masked_softmax
