// The choice of an instruction set: the table, the choice by name, and the errors for names that cannot be chosen.
#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <stdexcept>

#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

// Before any test selects another one.
const std::string kInUseAtFirst = cpu_capability().name;

// isa_table.inc, which knows the names of every architecture.
const std::vector<std::string> kTable = {
#define MASKED_SOFTMAX_ISA(name, architecture, is_supported) #name,
#include "cpu/isa_table.inc"
#undef MASKED_SOFTMAX_ISA
};

#if defined(__x86_64__)
const std::vector<std::string> kOfThisArchitecture = {"scalar", "avx2", "avx512"};
#elif defined(__aarch64__)
const std::vector<std::string> kOfThisArchitecture = {"scalar", "neon"};
#else
const std::vector<std::string> kOfThisArchitecture = {"scalar"};
#endif

std::vector<std::string> names_of(const std::vector<CpuCapability>& capabilities) {
  std::vector<std::string> names;
  for (const CpuCapability& capability : capabilities) {
    names.push_back(capability.name);
  }
  return names;
}

std::vector<std::string> supported_names() { return names_of(supported_cpu_capabilities()); }

bool holds(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

template <class Exception>
void check_refused(const std::string& name) {
  const std::string before = cpu_capability().name;
  bool refused = false;
  try {
    set_cpu_capability(name);
  } catch (const Exception& error) {
    refused = true;
    CHECK(std::string(error.what()).find("'" + name + "'") != std::string::npos, "the message: " << error.what());
  } catch (const std::exception& error) {
    CHECK(false, "'" << name << "' is refused with another type of exception: " << error.what());
    return;
  }
  CHECK(refused, "'" << name << "' is taken");
  CHECK(before == cpu_capability().name, "after '" << name << "' was refused, in use: " << cpu_capability().name);
}

}  // namespace

TEST("store hint: non-temporal for operands of 96 MiB on every machine, cached for small ones and in place") {
  float first = 0;
  float second = 0;
  const auto hint_of = [](int64_t rows, float* input, float* output) {
    Problem problem;
    problem.rows = rows;
    problem.cols = 1024;
    problem.inputs[0].data = input;
    problem.output.data = output;
    return store_hint_of(problem);
  };
  constexpr int64_t kRowsOf96MiB = 12 << 10;  // 8 bytes for each element
  CHECK(hint_of(kRowsOf96MiB, &first, &second) == StoreHint::kNonTemporal, "large operands");
  CHECK(hint_of(kRowsOf96MiB, &first, &first) == StoreHint::kCached, "in place");
  CHECK(hint_of(16, &first, &second) == StoreHint::kCached, "small operands");
}

TEST("dispatch: the table knows every name, the plainest first; a build has those of its architecture") {
  CHECK(kTable == std::vector<std::string>({"scalar", "avx2", "avx512", "neon"}), "the table's names or their order");
  CHECK(names_of(compiled_cpu_capabilities()) == kOfThisArchitecture, "compiled names or their order");
}

TEST("dispatch: the supported ones are in the table's order, and the last of them is in use") {
  const std::vector<std::string> names = supported_names();
  CHECK(names.front() == "scalar", "first: " << names.front());
  size_t position = 0;
  for (const std::string& name : names) {
    const auto found = static_cast<size_t>(std::find(kTable.begin(), kTable.end(), name) - kTable.begin());
    CHECK(found < kTable.size(), name << " is not in the table");
    CHECK(found >= position, name << " is out of order");
    position = found + 1;
  }
  CHECK(kInUseAtFirst == names.back(), "in use: " << kInUseAtFirst << ", the best: " << names.back());
}

#if defined(__x86_64__) && defined(__linux__)
TEST("dispatch: an instruction set is supported where the system lists its flags, and nowhere else") {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line) && line.rfind("flags", 0) != 0) {
  }
  std::istringstream words(line);
  const std::set<std::string> flags{std::istream_iterator<std::string>(words), {}};
  if (flags.count("flags") == 0) {
    skip("/proc/cpuinfo lists no flags");
    return;
  }
  const auto has_all = [&](const std::vector<std::string>& needed) {
    return std::all_of(needed.begin(), needed.end(), [&](const std::string& flag) { return flags.count(flag) > 0; });
  };
  const bool has_avx2 = has_all({"avx2", "fma", "f16c"});
  const bool has_avx512 = has_avx2 && has_all({"avx512f", "avx512bw", "avx512dq", "avx512vl"});
  CHECK(holds(supported_names(), "avx2") == has_avx2, "avx2");
  CHECK(holds(supported_names(), "avx512") == has_avx512, "avx512");
}
#endif

TEST("dispatch: each one can be forced") {
  for_each_capability([](const CpuCapability&) {});
}

TEST("dispatch: an unknown name is an invalid argument, and changes nothing") {
  for (const char* name : {"", "sse2", "AVX2", "avx2 ", " scalar", "avx", "avx5122"}) {
    check_refused<std::invalid_argument>(name);
  }
}

TEST("dispatch: a known name that the processor or the build lacks is a runtime error, and changes nothing") {
  const std::vector<std::string> names = supported_names();
  int lacking = 0;
  for (const std::string& name : kTable) {
    if (!holds(names, name)) {
      ++lacking;
      check_refused<std::runtime_error>(name);
    }
  }
  CHECK(lacking > 0, "no build has them all: x86 and aarch64 differ");
}

// A processor that lacks an instruction set cannot test it, in any of the tests: this one reports that, once.
TEST("dispatch: this processor runs every instruction set that was compiled") {
  std::string missing;
  for (const std::string& name : kOfThisArchitecture) {
    if (!holds(supported_names(), name)) {
      missing += (missing.empty() ? "" : ", ") + name;
    }
  }
  if (!missing.empty()) {
    skip("this processor lacks " + missing);
  }
}

}  // namespace kernel_tests
