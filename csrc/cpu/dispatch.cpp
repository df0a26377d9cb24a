#include "cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace masked_softmax {

// isa_<name>.cpp defines it.
#define MASKED_SOFTMAX_ISA(name, architecture, is_supported) \
  MASKED_SOFTMAX_IF_##architecture(                          \
      namespace name { void run_rows(const Problem& problem, int64_t begin, int64_t end); })
#include "cpu/isa_table.inc"
#undef MASKED_SOFTMAX_ISA

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Of every architecture.
constexpr const char* kKnownNames[] = {
#define MASKED_SOFTMAX_ISA(name, architecture, is_supported) #name,
#include "cpu/isa_table.inc"
#undef MASKED_SOFTMAX_ISA
};

template <class Names, class NameOf>
std::string joined(const Names& names, const NameOf& name_of) {
  std::string result;
  for (const auto& name : names) {
    result += (result.empty() ? "" : ", ") + std::string(name_of(name));
  }
  return result;
}

std::atomic<const CpuCapability*>& chosen() {
  static std::atomic<const CpuCapability*> capability{&supported_cpu_capabilities().back()};
  return capability;
}

}  // namespace

const std::vector<CpuCapability>& compiled_cpu_capabilities() {
  static const std::vector<CpuCapability> compiled{
#define MASKED_SOFTMAX_ISA(name, architecture, is_supported) \
  MASKED_SOFTMAX_IF_##architecture({#name, name::run_rows, [] { return is_supported; }}, )
#include "cpu/isa_table.inc"
#undef MASKED_SOFTMAX_ISA
  };
  return compiled;
}

const std::vector<CpuCapability>& supported_cpu_capabilities() {
  static const std::vector<CpuCapability> supported = [] {
    std::vector<CpuCapability> found;
    std::copy_if(compiled_cpu_capabilities().begin(), compiled_cpu_capabilities().end(), std::back_inserter(found),
                 [](const CpuCapability& capability) { return capability.is_supported(); });
    return found;
  }();
  return supported;
}

const CpuCapability& cpu_capability() { return *chosen().load(std::memory_order_relaxed); }

void set_cpu_capability(const std::string& name) {
  for (const CpuCapability& capability : supported_cpu_capabilities()) {
    if (name == capability.name) {
      chosen().store(&capability, std::memory_order_relaxed);
      return;
    }
  }
  if (std::find(std::begin(kKnownNames), std::end(kKnownNames), name) == std::end(kKnownNames)) {
    throw std::invalid_argument("expected one of the CPU capabilities " +
                                joined(kKnownNames, [](const char* known) { return known; }) + ", but got '" + name +
                                "'");
  }
  throw std::runtime_error("expected a CPU capability that this processor and build have (" +
                           joined(supported_cpu_capabilities(), [](const CpuCapability& has) { return has.name; }) +
                           "), but got '" + name + "'");
}

}  // namespace masked_softmax
