// What the kernels must compute: the formulas of common/formulas.h and of row_kernel.h in long double, with an error
// bound for each result. The one C++ reference, for the tests of the kernels, of the CUDA kernels in the emulator, and
// the fuzzer.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cases.h"

namespace kernel_tests {

using real = long double;

// A value, and the largest error that a result may have.
struct Expected {
  real value;
  real tolerance;
};

inline real epsilon_of(bool accumulates_in_double) {
  return accumulates_in_double ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

// The error of the conversion to the output's type: half a unit in the last place where it is narrower than the
// accumulation type. At least the smallest normal number, below which no relative accuracy is promised.
inline real rounding_of(ElementType type, bool accumulates_in_double, real value) {
  const real magnitude = std::fabs(value);
  switch (type) {
    case ElementType::kBFloat16: return std::fmax(magnitude * 0x1p-8L, 0x1p-126L);
    case ElementType::kFloat16: return std::fmax(magnitude * 0x1p-11L, 0x1p-25L);
    case ElementType::kFloat32: return std::fmax(accumulates_in_double ? magnitude * 0x1p-24L : 0, 0x1p-126L);
    case ElementType::kFloat64: return std::numeric_limits<double>::min();
    case ElementType::kInt64:
    case ElementType::kInt32:
    case ElementType::kInt16:
    case ElementType::kInt8:
    case ElementType::kUInt8:
    case ElementType::kUInt16:
    case ElementType::kUInt32:
    case ElementType::kBool: break;  // no output has these types
  }
  return 0;
}

// The largest number of an output's type.
inline real largest_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat64: return std::numeric_limits<double>::max();
    case ElementType::kFloat32: return std::numeric_limits<float>::max();
    case ElementType::kBFloat16: return 0x1.fep127L;
    case ElementType::kFloat16: return 65504;
    case ElementType::kInt64:
    case ElementType::kInt32:
    case ElementType::kInt16:
    case ElementType::kInt8:
    case ElementType::kUInt8:
    case ElementType::kUInt16:
    case ElementType::kUInt32:
    case ElementType::kBool: break;  // no output has these types
  }
  return 0;
}

// One row's inputs over its valid columns, in the order of common/operations.inc.
using RowValues = std::vector<std::vector<real>>;

// One row of softmax or log_softmax, with a sink where it is not -inf.
struct ExpectedForward {
  std::vector<Expected> y;
  Expected sink_weight;
  Expected logsumexp;
};

// Precondition: the row has an element, and one above -inf if the sink is -inf; nothing is +inf or NaN.
inline ExpectedForward expected_forward_and_row_numbers(const std::vector<real>& x, bool is_log, double scale, real eps,
                                                        real sink) {
  real largest = scale < 0 ? -x[0] : x[0];
  for (real value : x) {
    largest = std::fmax(largest, scale < 0 ? -value : value);
  }
  const real row_max = scale < 0 ? -largest : largest;
  // All terms are relative to the largest, which is the sink's or that of a maximum. The sum without it, of which it is
  // 1: log1p of it keeps a log_softmax near 0 accurate.
  const bool has_scores = std::isfinite(row_max);
  const real sink_distance = has_scores ? sink - scale * row_max : 0;
  const bool is_sink_largest = !has_scores || sink_distance > 0;
  const real shift = is_sink_largest ? sink_distance : 0;
  const auto distance = [&](real value) {
    return has_scores ? scale * (value - row_max) - shift : -std::numeric_limits<real>::infinity();
  };
  real rest = is_sink_largest ? 0 : std::exp(sink_distance);
  bool is_skipped = is_sink_largest;
  for (real value : x) {
    if (value == row_max && !is_skipped) {
      is_skipped = true;
    } else {
      rest += std::exp(distance(value));
    }
  }
  ExpectedForward row;
  for (real value : x) {
    const real d = distance(value);
    const real y = is_log ? d - std::log1p(rest) : std::exp(d) / (1 + rest);
    row.y.push_back({y, y == 0 || !has_scores ? 0 : (4 + std::fabs(d)) * eps * std::fabs(y)});
  }
  const real weight = (is_sink_largest ? 1 : std::exp(sink_distance)) / (1 + rest);
  row.sink_weight = {weight, 8 * eps * weight};
  const real scaled_max = has_scores ? scale * row_max : 0;
  const real logsumexp = (is_sink_largest ? sink : scaled_max) + std::log1p(rest);
  row.logsumexp = {logsumexp, 4 * eps * (std::fabs(logsumexp) + std::fabs(scaled_max))};
  return row;
}

inline std::vector<Expected> expected_forward(const std::vector<real>& x, bool is_log, double scale, real eps) {
  return expected_forward_and_row_numbers(x, is_log, scale, eps, -std::numeric_limits<real>::infinity()).y;
}

// The bounds: 8 eps times the sum of the terms' magnitudes; terms with exp(y) have (1 + |y|) times that.
inline std::vector<Expected> expected_derivative(Operation operation, const RowValues& in, double scale, real eps) {
  const std::vector<real>& y = in.back();
  const size_t length = y.size();
  const auto p = [&](size_t i) { return std::exp(y[i]); };
  const auto sum = [&](const auto& term) {
    real total = 0;
    for (size_t i = 0; i < length; ++i) {
      total += term(i);
    }
    return total;
  };
  const auto dot = [&](const std::vector<real>& a) { return sum([&](size_t i) { return a[i] * y[i]; }); };
  const auto magnitude_of_dot = [&](const std::vector<real>& a) {
    return sum([&](size_t i) { return std::fabs(a[i] * y[i]); });
  };
  const auto magnitude_of_sum = [&](const std::vector<real>& a) {
    return sum([&](size_t i) { return std::fabs(a[i]); });
  };

  std::vector<Expected> row(length);
  const auto set = [&](size_t i, real value, real magnitude) {
    row[i] = {scale * value, 8 * eps * std::fabs(static_cast<real>(scale)) * magnitude};
  };
  const std::vector<real>& a = in[0];
  switch (operation) {
    case Operation::kSoftmax:
    case Operation::kLogSoftmax: break;  // expected_forward()
    case Operation::kLogSumExp:
    case Operation::kRowDot:
    case Operation::kRowScale: break;  // one number a row: test_row_numbers.cpp
    case Operation::kSoftmaxBackward: {
      const real inner = dot(a);
      const real magnitude = magnitude_of_dot(a);
      for (size_t i = 0; i < length; ++i) {
        set(i, y[i] * (a[i] - inner), y[i] * (std::fabs(a[i]) + magnitude));
      }
      break;
    }
    case Operation::kLogSoftmaxBackward: {
      const real total = sum([&](size_t i) { return a[i]; });
      const real magnitude = magnitude_of_sum(a);
      for (size_t i = 0; i < length; ++i) {
        set(i, a[i] - p(i) * total, std::fabs(a[i]) + (1 + std::fabs(y[i])) * p(i) * magnitude);
      }
      break;
    }
    case Operation::kLogSoftmaxJvp: {
      const real inner = sum([&](size_t i) { return a[i] * p(i); });
      const real magnitude = sum([&](size_t i) { return (1 + std::fabs(y[i])) * std::fabs(a[i]) * p(i); });
      for (size_t i = 0; i < length; ++i) {
        set(i, a[i] - inner, std::fabs(a[i]) + magnitude);
      }
      break;
    }
    case Operation::kSoftmaxBackwardWrtY: {
      const std::vector<real>& g = in[1];
      const real with_g = dot(g);
      const real with_v = dot(a);
      const real magnitude_g = magnitude_of_dot(g);
      const real magnitude_v = magnitude_of_dot(a);
      for (size_t i = 0; i < length; ++i) {
        set(i, a[i] * (g[i] - with_g) - g[i] * with_v,
            std::fabs(a[i]) * (std::fabs(g[i]) + magnitude_g) + std::fabs(g[i]) * magnitude_v);
      }
      break;
    }
    case Operation::kLogSoftmaxBackwardWrtY: {
      const std::vector<real>& g = in[1];
      const real total = sum([&](size_t i) { return g[i]; });
      const real magnitude = magnitude_of_sum(g);
      for (size_t i = 0; i < length; ++i) {
        set(i, -a[i] * p(i) * total, (1 + std::fabs(y[i])) * std::fabs(a[i]) * p(i) * magnitude);
      }
      break;
    }
    case Operation::kSoftmaxBackwardJvpWrtY: {
      const std::vector<real>& g = in[1];
      const real with_y = dot(g);
      const real with_v = sum([&](size_t i) { return a[i] * g[i]; });
      const real magnitude_y = magnitude_of_dot(g);
      const real magnitude_v = sum([&](size_t i) { return std::fabs(a[i] * g[i]); });
      for (size_t i = 0; i < length; ++i) {
        set(i, a[i] * (g[i] - with_y) - y[i] * with_v,
            std::fabs(a[i]) * (std::fabs(g[i]) + magnitude_y) + y[i] * magnitude_v);
      }
      break;
    }
    case Operation::kLogSoftmaxJvpJvpWrtY: {
      const std::vector<real>& u = in[1];
      const real total = sum([&](size_t i) { return a[i] * u[i] * p(i); });
      const real magnitude = sum([&](size_t i) { return (1 + std::fabs(y[i])) * std::fabs(a[i] * u[i]) * p(i); });
      for (size_t i = 0; i < length; ++i) {
        set(i, -total, magnitude);
      }
      break;
    }
  }
  return row;
}

// The results of one row's valid columns.
inline std::vector<Expected> expected_row(Operation operation, const std::vector<Matrix>& inputs, int64_t row,
                                          const Bounds& bounds, double scale, ElementType output_type) {
  bool accumulates_in_double = output_type == ElementType::kFloat64;
  RowValues values(inputs.size());
  for (size_t k = 0; k < inputs.size(); ++k) {
    accumulates_in_double = accumulates_in_double || inputs[k].type() == ElementType::kFloat64;
    for (int64_t i = 0; i < bounds.lengths[static_cast<size_t>(row)]; ++i) {
      values[k].push_back(inputs[k].get(row, bounds.starts[static_cast<size_t>(row)] + i));
    }
  }
  const real eps = epsilon_of(accumulates_in_double);
  std::vector<Expected> results;
  if (!values[0].empty()) {
    results = is_forward(operation) ? expected_forward(values[0], operation == Operation::kLogSoftmax, scale, eps)
                                    : expected_derivative(operation, values, scale, eps);
  }
  for (Expected& result : results) {
    result.tolerance += rounding_of(output_type, accumulates_in_double, result.value);
  }
  return results;
}

}  // namespace kernel_tests
