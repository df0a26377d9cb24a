// The choice of an instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/problem.h"

// Keeps its arguments in builds for that architecture.
#define MASKED_SOFTMAX_IF_ANY(...) __VA_ARGS__
#if defined(__x86_64__)
#define MASKED_SOFTMAX_IF_X86_64(...) __VA_ARGS__
#else
#define MASKED_SOFTMAX_IF_X86_64(...)
#endif
#if defined(__aarch64__)
#define MASKED_SOFTMAX_IF_AARCH64(...) __VA_ARGS__
#else
#define MASKED_SOFTMAX_IF_AARCH64(...)
#endif

namespace masked_softmax {

// Computes rows [begin, end) of the problem.
using RunRows = void (*)(const Problem& problem, int64_t begin, int64_t end);

struct CpuCapability {
  const char* name;
  RunRows run_rows;
  bool (*is_supported)();
};

// The instruction sets that this build has, and those of them that this processor has: the plainest first.
const std::vector<CpuCapability>& compiled_cpu_capabilities();
const std::vector<CpuCapability>& supported_cpu_capabilities();

// The one in use: the last supported one, unless set_cpu_capability() chose another.
const CpuCapability& cpu_capability();

// Selects an instruction set from the next call on. Throws std::invalid_argument for a name that is not in the table,
// and std::runtime_error for one that this processor or this build lacks.
void set_cpu_capability(const std::string& name);

}  // namespace masked_softmax
