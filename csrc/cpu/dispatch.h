// The choice of an instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/problem.h"

namespace masked_softmax {

// Computes rows [begin, end) of the problem.
using RunRows = void (*)(const Problem& problem, int64_t begin, int64_t end);

struct CpuCapability {
  const char* name;
  RunRows run_rows;
  bool (*is_supported)();
};

#define MASKED_SOFTMAX_ISA(Name, name) void run_##Name(const Problem& problem, int64_t begin, int64_t end);
#include "cpu/isa_table.inc"
#undef MASKED_SOFTMAX_ISA

// Those that this processor runs, the plainest first.
const std::vector<CpuCapability>& supported_cpu_capabilities();

// The one in use: the best one, unless another was asked for.
const CpuCapability& cpu_capability();

// Takes another one into use from the next call on. Throws std::invalid_argument for a name that no build knows, and
// std::runtime_error for one that this processor, or this build, lacks.
void set_cpu_capability(const std::string& name);

}  // namespace masked_softmax
