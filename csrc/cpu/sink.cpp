#include "cpu/sink.h"

#include <limits>

#include "common/exponential.h"

namespace masked_softmax {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// An unevaluated sum: an exponent in one double would put its exponential off by half an eps for each unit of its size.
struct Exponent {
  double high;
  double low;

  // 0 for the low part of an infinity, where the errors are NaN.
  static Exponent of(double high, double low) { return {high, std::isfinite(high) ? low : 0}; }
};

// TwoSum: Knuth, The Art of Computer Programming, vol. 2, 4.2.2.
Exponent operator+(const Exponent& a, double b) {
  const double high = a.high + b;
  const double part = high - a.high;
  return Exponent::of(high, ((a.high - (high - part)) + (b - part)) + a.low);
}

Exponent product(double a, double b) { return Exponent::of(a * b, std::fma(a, b, -(a * b))); }

// sink - scale * offset
Exponent distance(double sink, double scale, double offset) { return product(-scale, offset) + sink; }

// value * (1 + error)
double corrected(double value, double error) { return std::isfinite(value) ? value + value * error : value; }

double exp_of(const Exponent& e) { return corrected(std::exp(e.high), e.low); }

}  // namespace

double sink_term(double sink, double scale, double offset, double r) {
  if (sink == kInfinity || sink != sink) {
    return kNaN;
  }
  if (offset != 0) {
    return exp_of(distance(sink, scale, offset));
  }
  constexpr double kLarge = 0x1p1000;  // its product with log2(e) is finite, and r is far smaller
  if (std::fabs(sink) > kLarge) {
    return sink < 0 ? 0 : kInfinity;
  }
  const Exponent z = product(sink, kLog2e) + -r;
  return corrected(std::exp2(z.high), (z.low + sink * kLog2eLow) * kLog2);
}

SumWithSink add_sink_term(double sum, double term) {
  return {sum + term, term == 0 && sum == sum ? 0 : 1 / (1 + sum / term)};
}

SumWithSink add_sink_to_log_sum(double log_sum, double row_max, double sink, double scale) {
  if (sink == kInfinity) {
    return {kNaN, kNaN};
  }
  const Exponent log_term = distance(sink, scale, row_max);
  const Exponent difference = log_term + -log_sum;
  if (difference.high > 0) {
    const double ratio = exp_of({-difference.high, -difference.low});
    return {log_term.high + (log_term.low + std::log1p(ratio)), 1 / (1 + ratio)};
  }
  const double ratio = exp_of(difference);
  return {log_sum + std::log1p(ratio), ratio / (1 + ratio)};
}

}  // namespace masked_softmax
