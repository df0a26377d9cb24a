// The 16-bit types' conversions: exact one way, rounded once to nearest even the other way, for every pattern.
#include <cmath>

#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

// The definition, from the bits: sign, exponent field, fraction.
double decode(uint16_t bits, int fraction_bits, int bias) {
  const int exponent_bits = 15 - fraction_bits;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const double fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * INFINITY : NAN;
  }
  const double significand = std::ldexp(fraction, -fraction_bits) + (exponent == 0 ? 0.0 : 1.0);
  return sign * std::ldexp(significand, (exponent == 0 ? 1 : exponent) - bias);
}

template <class T>
void check_conversions(const char* name, int fraction_bits, int bias) {
  for (int pattern = 0; pattern < 0x10000; ++pattern) {
    const T element{static_cast<uint16_t>(pattern)};
    const double value = decode(element.bits, fraction_bits, bias);
    const auto widened = to_acc<float>(element);
    if (std::isnan(value)) {
      const auto back = to_acc<float>(from_acc<T>(widened));
      CHECK(std::isnan(widened) && std::isnan(back), name << " NaN " << pattern);
      continue;
    }
    CHECK(static_cast<double>(widened) == value && std::signbit(widened) == std::signbit(value),
          name << ' ' << pattern);
    CHECK(from_acc<T>(widened).bits == element.bits, name << ' ' << pattern << " from float");
    CHECK(from_acc<T>(value).bits == element.bits, name << ' ' << pattern << " from double");

    // Between this number and the next one away from zero: below the middle, the middle, above it.
    const T next{static_cast<uint16_t>(pattern + 1)};
    const double above = decode(next.bits, fraction_bits, bias);
    if (!std::isfinite(value) || !std::isfinite(above)) {
      continue;
    }
    const double middle = (value + above) / 2;
    const T even = pattern % 2 == 0 ? element : next;
    CHECK(from_acc<T>(middle).bits == even.bits, name << " tie after " << pattern);
    CHECK(from_acc<T>(std::nextafter(middle, value)).bits == element.bits, name << " below the tie, " << pattern);
    CHECK(from_acc<T>(std::nextafter(middle, above)).bits == next.bits, name << " above the tie, " << pattern);
    const auto narrow = static_cast<float>(middle);
    if (static_cast<double>(narrow) == middle) {
      CHECK(from_acc<T>(narrow).bits == even.bits, name << " tie from float after " << pattern);
    }
  }
  CHECK(std::isinf(to_acc<float>(from_acc<T>(1e300))), name << " overflow");
  CHECK(std::isinf(to_acc<float>(from_acc<T>(std::numeric_limits<float>::max()))), name << " overflow from float");
}

}  // namespace

TEST("bfloat16: every pattern, and the ties between them") { check_conversions<bfloat16_t>("bfloat16", 7, 127); }

TEST("float16: every pattern, and the ties between them") { check_conversions<float16_t>("float16", 10, 15); }

TEST("16-bit vectors convert as the scalar functions do") {
  // log_softmax's gradient is g - exp(y) * sum(g): with y = -inf it carries g through, rounded once.
  for_each_capability([&](const CpuCapability& capability) {
    for (ElementType type : {ElementType::kBFloat16, ElementType::kFloat16}) {
      constexpr int64_t kCols = 0x10000 / 16;
      const Bounds bounds{std::vector<int64_t>(16, 0), std::vector<int64_t>(16, kCols)};
      std::vector<Matrix> inputs{Matrix(ElementType::kFloat32, 16, kCols), Matrix(ElementType::kFloat32, 16, kCols)};
      Matrix output(type, 16, kCols);
      Matrix expected(type, 16, kCols);
      for (int64_t row = 0; row < 16; ++row) {
        for (int64_t col = 0; col < kCols; ++col) {
          // Floats whose lower half varies: ties, and both sides of them.
          const auto upper = static_cast<uint32_t>(row * kCols + col) << 16;
          const uint32_t lower[] = {0x8000u, 0x7fffu, 0x8001u, 0u};
          const float value = bit_cast<float>(upper | lower[col % 4]);
          inputs[0].set(row, col, std::fabs(value) < 0x1p100f ? static_cast<double>(value) : 0.0);  // no sum overflows
          inputs[1].set(row, col, -INFINITY);
          expected.set(row, col, inputs[0].get(row, col));
        }
      }
      capability.run_rows(make_problem(Operation::kLogSoftmaxBackward, output, inputs, bounds), 0, 16);
      for (int64_t row = 0; row < 16; ++row) {
        for (int64_t col = 0; col < kCols; ++col) {
          CHECK(output.get(row, col) == expected.get(row, col), capability.name << ' ' << name_of(type) << " of "
                                                                                << inputs[0].get(row, col) << ": "
                                                                                << output.get(row, col));
        }
      }
    }
  });
}

}  // namespace kernel_tests
