#!/usr/bin/env bash
# Gate for a machine with a GPU: build, tests, compute-sanitizer, benchmark; within 9 minutes.
#
#   tests/gpu/gate.sh [OUT]              writes its reports to OUT (default: build/gpu_gate)
#   tests/gpu/gate.sh --rehearse [OUT]   on the CPU, with the existing build: every step that needs no GPU
#
# PYTHON names an interpreter with torch (2.11 or later), numpy, pybind11, ninja and pytest. Needs no network.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

rehearse=
if [[ ${1-} == --rehearse ]]; then
  rehearse=1
  shift
fi
OUT=${1:-${OUT:-build/gpu_gate}}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
summary=$OUT/summary.md
failed=0
echo "# GPU gate, $(date -u +%Y-%m-%d)" >"$summary"

# record STEP RESULT: adds a line to the summary.
record() { echo "- $1: $2" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: runs the command with a time limit; its output goes to OUT/NAME.log.
step() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  if ((status == 0)); then
    record "$name" "passed in $((SECONDS - begin)) s. $(tail -n 1 "$OUT/$name.log")"
  elif grep -q "Device not supported" "$OUT/$name.log"; then
    record "$name" "SKIPPED: compute-sanitizer does not support this machine's device"
  else
    failed=1
    record "$name" "FAILED ($status) after $((SECONDS - begin)) s"
    tail -n 25 "$OUT/$name.log"
  fi
}

environment() {
  "$PYTHON" - <<'PYTHON'
import platform, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(f"Python {platform.python_version()}, torch {torch.__version__}, {gpu or 'no GPU'}")
PYTHON
}

sanitize() {
  local tool=$1
  shift
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    --kernel-regex kns=masked_softmax "$@" "$PYTHON" tests/gpu/smoke.py
}

record environment "$(environment)"
if [[ -n $rehearse ]]; then
  export MASKED_SOFTMAX_EXT_TEST_DEVICE=cpu
  step smoke 120 "$PYTHON" tests/gpu/smoke.py cpu
  step tests 600 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_cuda.py
  step benchmark 120 "$PYTHON" bench/gpu_bench.py --rehearse --json "$OUT/benchmark.json"
else
  MASKED_SOFTMAX_EXT_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} step build 200 "$PYTHON" setup.py build_ext --inplace
  step smoke 60 "$PYTHON" tests/gpu/smoke.py
  step tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_cuda.py
  if command -v compute-sanitizer >/dev/null; then
    sanitize memcheck
    sanitize racecheck
    sanitize initcheck
    sanitize synccheck
  else
    record compute-sanitizer "SKIPPED: not installed"
  fi
  step benchmark 220 "$PYTHON" bench/gpu_bench.py --seconds 150 --json "$OUT/benchmark.json"
fi
{ echo; grep '^|' "$OUT/benchmark.log"; } >>"$summary"
exit $failed
