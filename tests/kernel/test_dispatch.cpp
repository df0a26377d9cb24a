// The choice of an instruction set: by name, with words for one that is not there.
#include <stdexcept>

#include "cases.h"
#include "check.h"

namespace kernel_tests {
namespace {

template <class Error>
std::string message_of(const char* name) {
  try {
    set_cpu_capability(name);
  } catch (const Error& error) {
    return error.what();
  } catch (...) {
    return "another kind of error";
  }
  return "no error";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST("instruction sets: the best one is in use, each can be forced") {
  const auto& supported = supported_cpu_capabilities();
  CHECK(std::string(supported.front().name) == "scalar", supported.front().name);
  CHECK(std::string(cpu_capability().name) == supported.back().name, cpu_capability().name);
  for_each_capability([](const CpuCapability&) {});
}

TEST("instruction sets: a wrong name and a missing one are refused in words") {
  const std::string before = cpu_capability().name;
  const std::string unknown = message_of<std::invalid_argument>("sse9");
  CHECK(contains(unknown, "sse9") && contains(unknown, "avx2"), unknown);
#if defined(__aarch64__)
  const char* const missing = "avx2";
#else
  const char* const missing = "neon";
#endif
  const std::string refused = message_of<std::runtime_error>(missing);
  CHECK(contains(refused, missing) && contains(refused, "scalar"), refused);
  CHECK(cpu_capability().name == before, cpu_capability().name);
}

// A processor that lacks an instruction set skips its half of every other test: said here, once.
#if defined(__x86_64__)
TEST("instruction sets: this processor runs every one that was compiled") {
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
