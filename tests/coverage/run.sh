#!/usr/bin/env bash
# Measures which lines the tests run: of Python with coverage, of C++ with gcov. The extension is built in a copy of the
# tree, where the Python tests run. The kernels of csrc/cpu are measured in their own tests (tests/kernel), because
# their code without optimization would make the Python tests ten times as slow.
# Fails only if the build does, or if pytest does not run the tests.
# Usage: run.sh [PYTEST ARGUMENT]...   PYTHON names the interpreter, which has torch, pytest, coverage and gcovr.
# Without arguments: all tests but those that repeat others for a vector instruction set, whose kernels are not measured
# there, and those that need much memory.
#
# Not seen: the CUDA kernels, lines of Python that torch.compile traces without running them, and what a process did that
# a signal ended.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
FOLDER=$ROOT/build/coverage
TREE=$FOLDER/tree

(($#)) || set -- -m "not large" -k "not avx2 and not avx512 and not neon"

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
echo "== the kernel layer's tests"
tests/kernel/run.sh coverage

echo "== the extension"
export CXX=$FOLDER/g++ MASKED_SOFTMAX_EXT_CUDA=0
"$PYTHON" setup.py --quiet build_ext --inplace >"$FOLDER/build.log" 2>&1 || {
  cat "$FOLDER/build.log"
  exit 1
}
unset CXX MASKED_SOFTMAX_EXT_CUDA

echo "== the Python tests"
export COVERAGE_FILE=$FOLDER/python/data
status=0
"$PYTHON" -m coverage run -m pytest -q "$@" || status=$?
case $status in
  0) ;;
  1) echo "Some tests fail here: make test says whether they should." ;;
  *) exit "$status" ;; # pytest did not run the tests: wrong arguments, or an error inside pytest
esac

echo "== Python"
"$PYTHON" -m coverage combine --quiet
"$PYTHON" -m coverage html --quiet --directory "$FOLDER/html/python"
"$PYTHON" -m coverage report

echo "== C++"
# setup.py strips the folders of torch's headers from their names.
"$PYTHON" -m gcovr --root . --filter csrc/ --merge-lines --gcov-ignore-errors=source_not_found \
  --html-details "$FOLDER/html/cpp.html" --txt - build
