// The choice of an instruction set: the table's order, by name, and words for a name that it does not hold.
#include <algorithm>
#include <stdexcept>

#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

// Before any test asks for another one.
const std::string kInUseAtFirst = cpu_capability().name;

const std::vector<std::string> kTable = {
#define MASKED_SOFTMAX_ISA(Name, name) name,
#include "cpu/isa_table.inc"
#undef MASKED_SOFTMAX_ISA
};

std::vector<std::string> supported_names() {
  std::vector<std::string> names;
  for (const CpuCapability& capability : supported_cpu_capabilities()) {
    names.push_back(capability.name);
  }
  return names;
}

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

TEST("dispatch: the table's order, the plainest first, and the best one in use") {
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
  for (const char* name : {"scalar", "avx2", "avx512", "neon"}) {
    if (!holds(names, name)) {
      ++lacking;
      check_refused<std::runtime_error>(name);
    }
  }
  CHECK(lacking > 0, "no build has them all: x86 and aarch64 differ");
}

// A processor that lacks an instruction set skips its half of every other test: said here, once.
#if defined(__x86_64__)
TEST("dispatch: this processor runs every one that was compiled") {
  std::string missing;
  for (const char* name : {"avx2", "avx512"}) {
    bool found = false;
    for (const CpuCapability& capability : supported_cpu_capabilities()) {
      found = found || std::string(capability.name) == name;
    }
    missing += found ? "" : std::string(missing.empty() ? "" : ", ") + name;
  }
  if (!missing.empty()) {
    skip("this processor lacks " + missing);
  }
}
#endif

}  // namespace kernel_tests
