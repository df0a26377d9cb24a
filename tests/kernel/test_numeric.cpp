// The 16-bit types: every pattern to float32, float32 and float64 to 16 bits rounded once, in the scalar functions and
// in each instruction set's own conversions.
#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

// The parameters of a 16-bit format.
template <class T>
struct Format;
template <>
struct Format<bfloat16_t> {
  static constexpr const char* kName = "bfloat16";
  static constexpr ElementType kType = ElementType::kBFloat16;
  static constexpr int kFractionBits = 7;
  static constexpr int kBias = 127;
};
template <>
struct Format<float16_t> {
  static constexpr const char* kName = "float16";
  static constexpr ElementType kType = ElementType::kFloat16;
  static constexpr int kFractionBits = 10;
  static constexpr int kBias = 15;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The value of a pattern, from sign, exponent and fraction.
template <class T>
double decode(uint32_t bits) {
  using F = Format<T>;
  const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  const int exponent = static_cast<int>((bits & 0x7fffu) >> F::kFractionBits);
  const uint32_t fraction = bits & ((1u << F::kFractionBits) - 1u);
  if (exponent == 2 * F::kBias + 1) {
    return fraction == 0 ? sign * kInfinity : std::numeric_limits<double>::quiet_NaN();
  }
  const uint32_t leading = exponent == 0 ? 0u : 1u << F::kFractionBits;
  const int power = (exponent == 0 ? 1 : exponent) - F::kBias - F::kFractionBits;
  return sign * std::ldexp(static_cast<double>(leading + fraction), power);
}

// The nearest value of the format, ties to even: the value in units of its last place, rounded to an integer.
template <class T>
double nearest(double value) {
  using F = Format<T>;
  if (value == 0 || !std::isfinite(value)) {
    return value;
  }
  const int last_place = std::max(std::ilogb(value), 1 - F::kBias) - F::kFractionBits;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -last_place)), last_place);
  return std::fabs(rounded) >= std::ldexp(1.0, F::kBias + 1) ? std::copysign(kInfinity, value) : rounded;
}

bool same_value(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class T>
void check_narrowing(double from, uint16_t got_bits, const char* what) {
  const double got = decode<T>(got_bits);
  const double want = nearest<T>(from);
  CHECK(same_value(got, want),
        Format<T>::kName << " of " << what << ' ' << std::hexfloat << from << " is " << got << ", expected " << want);
}

// Every value of the format, everything halfway to the next one, and their neighbours in float32: the places where
// rounding decides.
template <class T>
std::vector<float> deciding_floats() {
  std::vector<float> values;
  const auto push_with_neighbours = [&](double value) {
    const auto narrowed = static_cast<float>(value);
    values.push_back(narrowed);
    values.push_back(std::nextafter(narrowed, std::numeric_limits<float>::infinity()));
    values.push_back(std::nextafter(narrowed, -std::numeric_limits<float>::infinity()));
  };
  for (uint32_t bits = 0; bits < 0x8000u; ++bits) {
    const double value = decode<T>(bits);
    if (!std::isfinite(value)) {
      continue;
    }
    const double next = decode<T>(bits + 1);
    const double end = std::isfinite(next) ? next : std::ldexp(1.0, Format<T>::kBias + 1);
    for (double sign : {1.0, -1.0}) {
      push_with_neighbours(sign * value);
      push_with_neighbours(sign * (value + (end - value) / 2));
    }
  }
  return values;
}

template <class T>
void check_all_patterns_to_float() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const T pattern{static_cast<uint16_t>(bits)};
    const float got = to_acc<float>(pattern);
    CHECK(same_value(got, decode<T>(bits)),
          Format<T>::kName << " 0x" << std::hex << bits << " is " << got << ", expected " << decode<T>(bits));
    CHECK(same_value(to_acc<double>(pattern), decode<T>(bits)), Format<T>::kName << " 0x" << std::hex << bits);
    if (!std::isnan(got)) {
      CHECK(from_acc<T>(got).bits == bits,
            Format<T>::kName << " 0x" << std::hex << bits << " there and back is 0x" << from_acc<T>(got).bits);
    }
  }
}

template <class T>
void check_floats_to_16_bits() {
  for (float value : deciding_floats<T>()) {
    check_narrowing<T>(value, from_acc<T>(value).bits, "float32");
  }
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 16381) {  // a prime: all low bits occur
    const auto value = bit_cast<float>(static_cast<uint32_t>(bits));
    check_narrowing<T>(value, from_acc<T>(value).bits, "float32");
  }
  // A NaN whose payload is all in the bits that are cut must not become an infinity.
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu}) {
    const uint16_t got = from_acc<T>(bit_cast<float>(bits)).bits;
    CHECK(std::isnan(decode<T>(got)), Format<T>::kName << " of NaN 0x" << std::hex << bits << " is 0x" << got);
  }
}

// Doubles so close to a halfway point that float32 would land on it: rounding to float32 on the way would go wrong.
template <class T>
void check_doubles_to_16_bits(double largest) {
  for (float value : deciding_floats<T>()) {
    if (std::fabs(value) <= largest) {
      for (double factor : {1.0, 1.0 + 0x1p-40, 1.0 - 0x1p-40}) {
        check_narrowing<T>(value * factor, from_acc<T>(value * factor).bits, "float64");
      }
    }
  }
}

// Passes values through the kernels unchanged: the gradient of a log_softmax whose probabilities are all 0 is the
// incoming gradient. Each value is alone in its row, at changing positions, so that full vectors and tails convert it
// and no sum overflows.
template <class Visitor>
void pass_through(ElementType from, ElementType to, const std::vector<double>& values, const Visitor& visit) {
  constexpr int64_t kCols = 19;
  const auto rows = static_cast<int64_t>(values.size());
  std::vector<Matrix> inputs{Matrix(from, rows, kCols), Matrix(from, rows, kCols)};
  Matrix output(to, rows, kCols);
  const Bounds bounds{std::vector<int64_t>(values.size(), 0), std::vector<int64_t>(values.size(), kCols)};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      inputs[0].set(row, col, col == row % kCols ? values[static_cast<size_t>(row)] : 0.0);
      inputs[1].set(row, col, -kInfinity);
    }
  }
  for_each_capability([&](const CpuCapability& capability) {
    capability.run_rows(make_problem(Operation::kLogSoftmaxBackward, output, inputs, bounds), 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      visit(capability.name, values[static_cast<size_t>(row)], output.get(row, row % kCols));
    }
  });
}

// A NaN with any payload, all ones included, which rounding must not carry into the exponent.
template <class T>
void check_kernels_keep_nan() {
  std::vector<double> values;
  for (uint64_t bits : {0x7ff8000000000000u, 0xfff8000000000000u, 0x7fffffffffffffffu, 0xffffffffffffffffu}) {
    values.insert(values.end(), 19, bit_cast<double>(bits));
  }
  pass_through(ElementType::kFloat32, Format<T>::kType, values, [](const char* capability, double, double got) {
    CHECK(std::isnan(got), capability << ": NaN is written as " << Format<T>::kName << ' ' << got);
  });
}

// Zero is left out: g - 0 * sum does not keep its sign.
template <class T>
void check_kernels_widen() {
  std::vector<double> values;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const double value = decode<T>(bits);
    if (std::isfinite(value) && value != 0) {
      values.push_back(value);
    }
  }
  pass_through(Format<T>::kType, ElementType::kFloat32, values, [](const char* capability, double value, double got) {
    CHECK(got == value, capability << ": " << Format<T>::kName << ' ' << value << " is read as " << got);
  });
}

template <class T>
void check_kernels_narrow() {
  std::vector<double> values;
  const std::vector<float> deciding = deciding_floats<T>();
  for (size_t i = 0; i < deciding.size(); i += 3 + i % 2) {  // an odd step now and then: all three neighbours occur
    if (std::isfinite(deciding[i]) && nearest<T>(deciding[i]) != 0) {
      values.push_back(deciding[i]);
    }
  }
  pass_through(ElementType::kFloat32, Format<T>::kType, values, [](const char* capability, double value, double got) {
    CHECK(got == nearest<T>(value), capability << ": " << std::hexfloat << value << " is written as "
                                               << Format<T>::kName << ' ' << got << ", expected " << nearest<T>(value));
  });
}

}  // namespace

TEST("numeric: every 16-bit pattern means its value, and comes back") {
  check_all_patterns_to_float<bfloat16_t>();
  check_all_patterns_to_float<float16_t>();
}

TEST("numeric: float32 to 16 bits rounds to nearest, ties to even; NaN stays NaN") {
  check_floats_to_16_bits<bfloat16_t>();
  check_floats_to_16_bits<float16_t>();
}

TEST("numeric: float64 to 16 bits rounds once") {
  check_doubles_to_16_bits<bfloat16_t>(3.0e38);
  check_doubles_to_16_bits<float16_t>(1e9);
}

TEST("numeric: float64 to bfloat16 rounds once just below the largest number too") {
  check_doubles_to_16_bits<bfloat16_t>(kInfinity);
}

TEST("numeric: the kernels read every 16-bit value exactly") {
  check_kernels_widen<bfloat16_t>();
  check_kernels_widen<float16_t>();
}

TEST("numeric: the kernels round once to 16 bits, to nearest, ties to even") {
  check_kernels_narrow<bfloat16_t>();
  check_kernels_narrow<float16_t>();
  check_kernels_keep_nan<bfloat16_t>();
  check_kernels_keep_nan<float16_t>();
}

}  // namespace kernel_tests
