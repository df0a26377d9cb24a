#include "cpu/sink.h"

#include <limits>

namespace masked_softmax {

double sink_term(double sink, double scale, double offset, double r) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (sink == kInfinity || sink != sink) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (offset != 0) {
    return std::exp(std::fma(-scale, offset, sink));
  }
  constexpr double kLarge = 0x1p1000;  // its product with log2(e) is finite, and r is far smaller
  if (std::fabs(sink) > kLarge) {
    return sink < 0 ? 0 : kInfinity;
  }
  // The product with log2(e) in two parts, whose first is exact beside r: the error does not grow with |sink|.
  constexpr double kLog2e = 0x1.71547652b82fep0;
  constexpr double kLog2eLow = 0x1.777d0ffda0d24p-56;
  const double product = sink * kLog2e;
  const double rest = std::fma(sink, kLog2e, -product) + sink * kLog2eLow;
  return std::exp2((product - r) + rest);
}

SumWithSink add_sink_term(double sum, double term) { return {sum + term, term == 0 ? 0 : 1 / (1 + sum / term)}; }

SumWithSink add_sink_to_log_sum(double log_sum, double row_max, double sink, double scale) {
  if (sink == std::numeric_limits<double>::infinity()) {
    return {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::quiet_NaN()};
  }
  const double log_term = std::fma(-scale, row_max, sink);
  const double difference = log_term - log_sum;
  const double larger = difference > 0 ? log_term : log_sum;
  return {larger + std::log1p(std::exp(-std::fabs(difference))), 1 / (1 + std::exp(-difference))};
}

}  // namespace masked_softmax
