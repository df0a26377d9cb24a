// What a sink adds to a row's sum. In double, for every accumulation type: it is a few operations a row.
#pragma once

#include <cmath>

namespace masked_softmax {

// exp(sink - scale * offset) * 2^-r: the sink's term beside the exponentials of ExponentialParams
// (common/exponential.h). NaN for a sink of +inf, as in torch.softmax. One of offset and r is 0.
double sink_term(double sink, double scale, double offset, double r);

// A row's sum and the share of its sink in it.
struct SumWithSink {
  double sum;     // of a softmax, the sum of the exponentials; of a log_softmax, the logarithm of that
  double weight;  // exp(sink - logsumexp)
};

SumWithSink add_sink_term(double sum, double term);

// log_sum: the logarithm of the sum of exponentials relative to row_max; -inf where the row has none.
SumWithSink add_sink_to_log_sum(double log_sum, double row_max, double sink, double scale);

// The weight of a row that has a sink and no exponential above 0: 1, or NaN where the sink is not a number.
inline double weight_of_lone_sink(double sink) { return 1 + (sink - sink); }

// The weight of a sink of -inf beside elements whose sum, or its logarithm, is `sum`: 0, or NaN in a row of NaN.
inline double weight_of_no_sink(double sum) { return sum - sum; }

}  // namespace masked_softmax
