#!/usr/bin/env bash
# Gate for a machine with a GPU: kernels against float64, timings, tests, compute-sanitizer; within 9 minutes.
#
#   tests/gpu/gate.sh [OUT]              writes its reports to OUT (default: build/gpu_gate)
#   tests/gpu/gate.sh --rehearse [OUT]   without a GPU: the same scripts, with the CUDA kernels emulated
#
# PYTHON names an interpreter with torch (2.11 or later), numpy, pybind11, ninja and pytest. Needs no network.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" tests/gpu/gate.py "$@"
