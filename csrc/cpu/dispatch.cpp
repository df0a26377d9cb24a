#include "cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace masked_softmax {
namespace {

bool supports_Scalar() { return true; }

#if defined(__x86_64__)
bool supports_Avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool supports_Avx512() {
  return supports_Avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(__aarch64__)
bool supports_Neon() { return true; }  // part of the base architecture
#endif

constexpr CpuCapability kCompiled[] = {
#define MASKED_SOFTMAX_ISA(Name, name) {name, run_##Name, supports_##Name},
#include "cpu/isa_table.inc"
#undef MASKED_SOFTMAX_ISA
};

constexpr const char* kKnownNames[] = {"scalar", "avx2", "avx512", "neon"};

std::atomic<const CpuCapability*>& chosen() {
  static std::atomic<const CpuCapability*> capability{&supported_cpu_capabilities().back()};
  return capability;
}

std::string supported_names() {
  std::string names;
  for (const CpuCapability& capability : supported_cpu_capabilities()) {
    names += (names.empty() ? "" : ", ") + std::string(capability.name);
  }
  return names;
}

}  // namespace

const std::vector<CpuCapability>& supported_cpu_capabilities() {
  static const std::vector<CpuCapability> supported = [] {
    std::vector<CpuCapability> found;
    std::copy_if(std::begin(kCompiled), std::end(kCompiled), std::back_inserter(found),
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
    throw std::invalid_argument("expected one of the CPU capabilities scalar, avx2, avx512, neon, but got '" + name +
                                "'");
  }
  throw std::runtime_error("the CPU capability '" + name +
                           "' was asked for, but this processor and build have: " + supported_names());
}

}  // namespace masked_softmax
