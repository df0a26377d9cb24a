#!/usr/bin/env bash
# Measures which lines the tests run: of Python with coverage, of C++ with gcov. The extension is built in a copy of the
# tree, where the Python tests run. The kernels of csrc/cpu are measured in their own tests (tests/kernel), because
# their code without optimization would make the Python tests ten times as slow.
# Fails only if the build does, or if pytest does not run the tests.
# Usage: run.sh [PYTEST ARGUMENT]...   PYTHON names the interpreter, which has torch, pytest, coverage and gcovr.
# Without arguments: all tests but those that repeat others for a vector instruction set, whose kernels are not measured
# there, and those that need much memory; in two processes at a time, because most tests use one core.
#
# Not seen: the CUDA kernels, lines of Python that torch.compile traces without running them, and what a process did that
# a signal ended.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
FOLDER=$ROOT/build/coverage
TREE=$FOLDER/tree

step() { printf '\n== after %s s: %s\n' "$SECONDS" "$*"; }

# The compiler that setup.py is given. Several threads count, so the counters must be atomic.
mkdir -p "$TREE"
cat >"$FOLDER/g++" <<'WRAPPER'
#!/bin/sh
case "$*" in
  *csrc/cpu/isa_*.cpp*) exec g++ "$@" -O1 ;;
  *) exec g++ "$@" -O0 --coverage -fprofile-update=atomic ;;
esac
WRAPPER
chmod +x "$FOLDER/g++"

rm -rf "$TREE/csrc" "$TREE/tests" "$TREE/masked_softmax_ext" # files that are gone
git ls-files -z | xargs -0 cp --parents --preserve=timestamps -t "$TREE"
find "$FOLDER" -name '*.gcda' -delete
rm -rf "$FOLDER/python" "$FOLDER/html"
mkdir -p "$FOLDER/python" "$FOLDER/html"

cd "$TREE"
# Meanwhile, on another core.
tests/kernel/run.sh coverage >"$FOLDER/kernel.log" 2>&1 &
kernel=$!
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

step "the extension"
export CXX=$FOLDER/g++ MASKED_SOFTMAX_EXT_CUDA=0
"$PYTHON" setup.py --quiet build_ext --inplace >"$FOLDER/build.log" 2>&1 || {
  cat "$FOLDER/build.log"
  exit 1
}
unset CXX MASKED_SOFTMAX_EXT_CUDA

step "the Python tests"
export COVERAGE_FILE=$FOLDER/python/data
python_tests() {
  local status=0
  "$PYTHON" -m coverage run -m pytest -q -p no:cacheprovider "$@" || status=$?
  case $status in
    0) ;;
    1) echo "Some tests fail here: make test says whether they should." ;;
    *) return "$status" ;; # pytest did not run the tests: wrong arguments, or an error inside pytest
  esac
}
if (($#)); then
  python_tests "$@"
else
  selection=(-m "not large" -k "not avx2 and not avx512 and not neon")
  python_tests tests/pytorch "${selection[@]}" >"$FOLDER/pytorch.log" 2>&1 &
  pytorch=$! pytorch_status=0
  python_tests tests --ignore=tests/pytorch "${selection[@]}"
  wait "$pytorch" || pytorch_status=$?
  cat "$FOLDER/pytorch.log"
  ((pytorch_status == 0)) || exit "$pytorch_status"
fi

step "the kernel layer's tests"
kernel_status=0
wait "$kernel" || kernel_status=$?
((kernel_status == 0)) || { cat "$FOLDER/kernel.log" && exit 1; }
tail -n 1 "$FOLDER/kernel.log"

step "Python"
"$PYTHON" -m coverage combine --quiet
"$PYTHON" -m coverage html --quiet --directory "$FOLDER/html/python"
"$PYTHON" -m coverage report

step "C++"
# setup.py strips the folders of torch's headers from their names.
"$PYTHON" -m gcovr --root . --filter csrc/ --merge-lines --gcov-ignore-errors=source_not_found \
  --html-details "$FOLDER/html/cpp.html" --txt - build
