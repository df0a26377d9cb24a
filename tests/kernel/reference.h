// What the kernels must compute, in long double, straight from the formulas of Operation (common/problem.h).
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cases.h"

namespace kernel_tests {

using real = long double;

// A value, and how far from it a result may lie.
struct Expected {
  real value;
  real tolerance;
};

inline real epsilon_of(bool accumulates_in_double) {
  return accumulates_in_double ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

// Half a unit in the last place where the result is narrower than the computing type, which is rounded once; and the
// smallest normal number, below which no relative accuracy is promised.
inline real rounding_of(ElementType type, bool accumulates_in_double, real value) {
  const real magnitude = std::fabs(value);
  switch (type) {
    case ElementType::kBFloat16: return std::fmax(magnitude * 0x1p-8L, 0x1p-126L);
    case ElementType::kFloat16: return std::fmax(magnitude * 0x1p-11L, 0x1p-25L);
    case ElementType::kFloat32: return std::fmax(accumulates_in_double ? magnitude * 0x1p-24L : 0, 0x1p-126L);
    default: return std::numeric_limits<double>::min();
  }
}

// One row's inputs over its valid columns, in the order that Operation names them.
using RowValues = std::vector<std::vector<real>>;

inline std::vector<Expected> expected_forward(const std::vector<real>& x, bool is_log, double scale, real eps) {
  real largest = scale < 0 ? -x[0] : x[0];
  for (real value : x) {
    largest = std::fmax(largest, scale < 0 ? -value : value);
  }
  const real row_max = scale < 0 ? -largest : largest;
  // The sum without one of its maxima, which is 1: log1p of it keeps a log_softmax near 0 exact.
  real rest = 0;
  bool passed_over = false;
  for (real value : x) {
    if (value == row_max && !passed_over) {
      passed_over = true;
    } else {
      rest += std::exp(scale * (value - row_max));
    }
  }
  std::vector<Expected> row;
  for (real value : x) {
    const real d = scale * (value - row_max);
    const real y = is_log ? d - std::log1p(rest) : std::exp(d) / (1 + rest);
    row.push_back({y, (4 + std::fabs(d)) * eps * std::fabs(y)});
  }
  return row;
}

// The bounds: 8 eps of the sum of the terms' magnitudes; an exponential of y is good to (1 + |y|) of that.
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
    default: break;
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
