#!/usr/bin/env bash
# Builds the whole extension with a sanitizer of g++'s, in a folder of its own, and runs the Python tests on it:
#   address   AddressSanitizer and UndefinedBehaviorSanitizer: the tests that reach every path of binding and kernels
#   thread    ThreadSanitizer: many Python threads, and torch's own below them
# Before that, faults planted in a copy of single files must be reported.
# Usage: run.sh MODE [ARGUMENT OF PYTEST]...   PYTHON names the interpreter; it has torch and pytest.
#
# Sanitized are binding/, common/ and the plain kernels (scalar), which are what runs. The other instruction sets take
# ten times as long to compile so; under sanitizers they are tested by tests/kernel/run.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}

mode=${1-}
case $mode in
  address)
    FLAGS="-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
    # What reaches every path. Those that repeat a path for many numbers prove nothing more here; those that measure
    # memory have other needs, torch's compilers take minutes, and threads are the other mode's.
    TESTS=(tests/numerics/test_{article,edges,gradients}.py
      tests/semantics/test_{strides,errors,padding,broadcasting,packed}.py
      -k "not avx2 and not avx512 and not neon and not compiled")
    ;;
  thread)
    FLAGS="-O1 -g1 -fsanitize=thread"
    TESTS=(tests/sanitizers/test_races.py tests/semantics/test_threads.py -k "at_once")
    ;;
  *) echo "expected address or thread, but got '$mode'" >&2 && exit 2 ;;
esac
shift
FOLDER=$ROOT/build/sanitizers/$mode

# The compiler that setup.py is given: its own flags come first, ours win.
COMPILER=$FOLDER/g++
wrapper="#!/bin/sh
case \"\$*\" in
  *csrc/cpu/isa_avx*.cpp*) exec g++ \"\$@\" -O0 ;;
  *) exec g++ \"\$@\" $FLAGS ;;
esac"
if [[ $(cat "$COMPILER" 2>/dev/null) != "$wrapper" ]]; then
  rm -rf "$FOLDER" # what other flags have made
  mkdir -p "$FOLDER"
  echo "$wrapper" >"$COMPILER"
  chmod +x "$COMPILER"
fi

LINK=()
if [[ $mode == thread ]]; then
  g++ -O1 -fPIC -c tests/sanitizers/openmp.cpp -o "$FOLDER/openmp.o"
  LINK=(-Wl,--wrap=GOMP_parallel "$FOLDER/openmp.o")
fi

build() {
  echo "== the extension: $mode"
  CXX=$COMPILER LDFLAGS="${LINK[*]}" MASKED_SOFTMAX_EXT_CUDA=0 "$PYTHON" setup.py --quiet build \
    --build-base "$FOLDER" --build-lib "$FOLDER/lib" >"$FOLDER/build.log" 2>&1 || {
    cat "$FOLDER/build.log"
    return 1
  }
}

# Runs Python on the extension in a folder; the current one comes first in its search path, so no other is found.
sanitized() {
  local folder=$1 preload
  shift
  if [[ $mode == address ]]; then
    # Without libstdc++ there AddressSanitizer finds nothing to throw exceptions with: Python has none.
    preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
  else
    preload=$(g++ -print-file-name=libtsan.so)
  fi
  # A read of unreadable pages ends the process as ever: tests look for that. Leaks are tests/semantics/test_leaks.py's: at its
  # end Python leaves much behind. What torch allocates in one way and frees in another is its own affair.
  # ThreadSanitizer knows no code that it did not compile: that of Python and torch is left alone, its locks count.
  # Address randomisation is more than its shadow memory bears.
  (cd "$folder" && env \
    LD_PRELOAD="$preload" \
    ASAN_OPTIONS=handle_segv=0:handle_sigbus=0:detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:second_deadlock_stack=1 \
    MASKED_SOFTMAX_EXT_CPU_CAPABILITY=scalar PYTHONDONTWRITEBYTECODE=1 \
    setarch --addr-no-randomize "$PYTHON" "$@")
}

# plant FILE EDIT CODE REPORT PLACE: the file, edited by sed, in an extension that is otherwise the same. Running the code
# must end in that report of that place.
plant() {
  local file=$1 edit=$2 code=$3 report=$4 place=$5 name folder=$FOLDER/planted output torch_libs
  name=$(basename "$file" .cpp)
  rm -rf "$folder"
  cp -r "$FOLDER/lib" "$folder"
  sed "$edit" "$file" >"$folder/$name.cpp"
  if cmp -s "$file" "$folder/$name.cpp"; then
    echo "the fault does not fit $file any more: $edit" >&2
    return 1
  fi
  "$COMPILER" -std=c++20 -fPIC -ffp-contract=off -Icsrc -c "$folder/$name.cpp" -o "$folder/$name.o"
  torch_libs=$("$PYTHON" -c 'import torch; print(torch.__path__[0] + "/lib")')
  find "$FOLDER"/torch-* -name '*.o' ! -name "$name.o" -print0 |
    xargs -0 "$COMPILER" -shared "$folder/$name.o" "${LINK[@]}" -L"$torch_libs" -lc10 -ltorch -ltorch_cpu -ltorch_python \
      -o "$(ls "$folder"/masked_softmax_ext/_C.*.so)"
  if output=$(sanitized "$folder" -c "import torch, threading, masked_softmax_ext as m; $code" 2>&1); then
    echo "a fault planted in $file was not found: $edit" >&2
    return 1
  fi
  if ! grep -q "$report" <<<"$output" || ! grep -q "$place" <<<"$output"; then
    echo "a fault planted in $file ended otherwise than in '$report' of $place:" >&2
    echo "$output" >&2
    return 1
  fi
  echo "found what was planted in $file: $report"
}

plant_for_address() {
  plant csrc/cpu/staging.cpp '/^void scatter_any/,/^}/ s/i < count/i <= count/' \
    'm.masked_softmax(torch.ones(3, 5), 5, dtype=torch.float64)' heap-buffer-overflow staging.cpp
  plant csrc/cpu/partition.cpp 's/return problem.rows \* kRowCost/return INT64_MAX - 1 + problem.rows * kRowCost/' \
    'm.masked_softmax(torch.ones(3, 5), 5)' 'runtime error: signed integer overflow' partition.cpp
}

plant_for_thread() {
  plant csrc/cpu/writing.cpp \
    's/static const int64_t last_cache_bytes = \(.*\);/static int64_t last_cache_bytes = 0; last_cache_bytes = \1;/' \
    'x = torch.ones(3, 5)
calls = [threading.Thread(target=lambda: [m.masked_softmax(x, 5) for _ in range(1000)]) for _ in range(4)]
[call.start() for call in calls]; [call.join() for call in calls]' 'data race' writing.cpp
  plant csrc/cpu/partition.cpp 's/  boundaries.resize(/  std::swap(boundaries[1], boundaries[2]);\n&/' \
    'torch.set_num_threads(3)
[m.masked_softmax(torch.ones(3000, 64), 64) for _ in range(100)]' 'data race' run_rows
}

build
"plant_for_$mode"
if (($# == 0)); then
  set -- "${TESTS[@]}"
fi
# --capture=sys: pytest would keep a report to itself, and die with it.
sanitized "$FOLDER/lib" -m pytest -q --capture=sys -p no:cacheprovider -c "$ROOT/pyproject.toml" --rootdir "$ROOT" "${@/#tests/$ROOT/tests}"
