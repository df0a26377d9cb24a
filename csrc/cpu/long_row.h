// One row that does not fit the scratch buffer, tile by tile.
//
// The exponentials wait for their sum in the output itself where it is contiguous and of the computing type. Elsewhere
// they are evaluated twice: same values, same bits, and still no memory beyond the output.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax {

template <class V, class T>
MASKED_SOFTMAX_NOINLINE typename V::acc_t tile_max(const T* x, int64_t count) {
  return find_max<V>(x, count);
}

template <class V, class T>
MASKED_SOFTMAX_NOINLINE V tile_exponentials(const T* x, int64_t count, V row_max, V exponent,
                                            typename V::acc_t* e) {
  return sum_tile<V, 1>(count, [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    return exponential(x + i, row_max, exponent, e + i, lanes);
  }).sums[0];
}

template <class V, class T>
MASKED_SOFTMAX_NOINLINE LaneSums<V, 2> tile_rests(const T* x, int64_t count, V row_max, V exponent,
                                                  V exponent_low) {
  return sum_tile<V, 2>(count, [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    return rest_and_maxima(x + i, row_max, exponent, exponent_low, lanes);
  });
}

template <class V, Operation kOperation, class Source, class Sink>
void forward_long_row(Source x, Sink y, int64_t length, const RowScale<typename V::acc_t>& scale) {
  using acc_t = typename V::acc_t;
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    const acc_t tile = tile_max<V>(x.tile(first, count), count);
    largest = tile > largest ? tile : largest;
  });
  const V row_max = V::broadcast(largest);
  const V exponent = V::broadcast(scale.exponent.high);

  if constexpr (kOperation == Operation::kLogSoftmax) {
    const V exponent_low = V::broadcast(scale.exponent.low);
    RowSum<V> rest;
    RowSum<V> maxima;
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      const LaneSums<V, 2> tile = tile_rests(x.tile(first, count), count, row_max, exponent, exponent_low);
      rest.add_tile(first, tile.sums[0]);
      maxima.add_tile(first, tile.sums[1]);
    });
    const acc_t log_sum = log_of_sum(rest.total(), maxima.total());
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      subtract_log(x.tile(first, count), count, row_max, scale.scale, log_sum, y.tile(first));
      y.finish_tile(first, count);
    });
  } else {
    constexpr bool kOutputHolds = !Sink::kStaged && std::is_same_v<typename Sink::element_t, acc_t>;
    alignas(64) acc_t tile_scratch[kOutputHolds ? 1 : kTileElems<V>];
    const auto place = [&](int64_t first) {
      if constexpr (kOutputHolds) {
        return y.tile(first);
      } else {
        (void)first;
        return tile_scratch;
      }
    };
    RowSum<V> sum;
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      sum.add_tile(first, tile_exponentials(x.tile(first, count), count, row_max, exponent, place(first)));
    });
    const acc_t factor = 1 / sum.total();
    for_each_tile<V>(length, [&](int64_t first, int64_t count) {
      if constexpr (!kOutputHolds) {
        tile_exponentials(x.tile(first, count), count, row_max, exponent, tile_scratch);
      }
      multiply<V>(place(first), count, factor, y.tile(first));
      y.finish_tile(first, count);
    });
  }
}

template <class V, Operation kOperation, class T>
MASKED_SOFTMAX_NOINLINE auto tile_derivative_sums(const T* const* inputs, int64_t count,
                                                  const DerivativeTerms<V>& shared) {
  using D = Derivative<V, kOperation>;
  return sum_tile<V, D::kSums>(count, [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    return D::terms(shared, InputVectors<V, D::kInputs>(inputs, i, lanes).in);
  });
}

template <class V, Operation kOperation, class Source, class Sink>
void derivative_long_row(Source* inputs, Sink output, int64_t length, const DerivativeTerms<V>& shared) {
  using D = Derivative<V, kOperation>;
  typename Source::tile_t tiles[D::kInputs];
  const auto bring_tiles = [&](int64_t first, int64_t count) {
    for (int k = 0; k < D::kInputs; ++k) {
      tiles[k] = inputs[k].tile(first, count);
    }
  };

  RowSum<V> row_sums[D::kSums];
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    bring_tiles(first, count);
    const auto tile = tile_derivative_sums<V, kOperation>(tiles, count, shared);
    for (int s = 0; s < D::kSums; ++s) {
      row_sums[s].add_tile(first, tile.sums[s]);
    }
  });

  V sums[D::kSums];
  for (int s = 0; s < D::kSums; ++s) {
    sums[s] = V::broadcast(row_sums[s].total());
  }
  for_each_tile<V>(length, [&](int64_t first, int64_t count) {
    bring_tiles(first, count);
    derivative_values<V, kOperation>(tiles, count, shared, sums, output.tile(first));
    output.finish_tile(first, count);
  });
}

}  // namespace masked_softmax
