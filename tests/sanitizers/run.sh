#!/usr/bin/env bash
# Builds the extension with g++'s sanitizers under build/sanitizers and runs Python tests on it:
#   address   AddressSanitizer and UndefinedBehaviorSanitizer: tests that reach every path of binding and kernels
#   thread    ThreadSanitizer: calls from many Python threads, each of which uses torch's threads
# First, planted faults must be reported: each is an edit of one file in a copy of the extension.
# Usage: run.sh MODE [PYTEST ARGUMENT]...   PYTHON names the interpreter, which has torch and pytest.
#
# The binding, csrc/common and the scalar kernels are instrumented, and the tests run those. Instrumented, the other
# instruction sets take ten times as long to compile; tests/kernel/run.sh tests them under sanitizers.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}

mode=${1-}
case $mode in
  address)
    FLAGS="-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
    # These reach every path. Left out are tests that repeat a path with other numbers, that measure memory, that wait
    # minutes for torch's compilers, and those of threads (the other mode).
    TESTS=(tests/numerics/test_{article,edges,gradients,sink}.py
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

# The compiler that setup.py is given. Our flags follow its own, so they take precedence.
COMPILER=$FOLDER/g++
wrapper="#!/bin/sh
case \"\$*\" in
  *csrc/cpu/isa_avx*.cpp*) exec g++ \"\$@\" -O0 ;;
  *) exec g++ \"\$@\" $FLAGS ;;
esac"
if [[ $(cat "$COMPILER" 2>/dev/null) != "$wrapper" ]]; then
  rm -rf "$FOLDER" # built with other flags
  mkdir -p "$FOLDER"
  echo "$wrapper" >"$COMPILER"
  chmod +x "$COMPILER"
fi

LINK=()
if [[ $mode == thread ]]; then
  g++ -O1 -fPIC -c tests/sanitizers/openmp.cpp -o "$FOLDER/openmp.o"
  LINK=("-Wl,--wrap=GOMP_parallel" "$FOLDER/openmp.o")
fi

build() {
  echo "== the extension: $mode"
  CXX=$COMPILER LDFLAGS="${LINK[*]}" MASKED_SOFTMAX_EXT_CUDA=0 "$PYTHON" setup.py --quiet build \
    --build-base "$FOLDER" --build-lib "$FOLDER/lib" >"$FOLDER/build.log" 2>&1 || {
    cat "$FOLDER/build.log"
    return 1
  }
}

# sanitized FOLDER ARGUMENT...: runs Python there, so that FOLDER comes first in the module search path.
sanitized() {
  local folder=$1 preload
  shift
  if [[ $mode == address ]]; then
    # AddressSanitizer needs libstdc++ loaded to intercept exceptions, and Python does not link it.
    preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
  else
    preload=$(g++ -print-file-name=libtsan.so)
  fi
  # ASAN_OPTIONS: SIGSEGV and SIGBUS keep their default action, which tests expect. LeakSanitizer would report what
  # Python never frees (tests/semantics/test_leaks.py looks for leaks), and torch frees some memory with another
  # function than it was allocated with.
  # TSAN_OPTIONS: accesses in Python and torch, which are not instrumented, are ignored; their locks are not.
  # setarch: ThreadSanitizer's shadow memory does not support address space randomization.
  (cd "$folder" && env \
    LD_PRELOAD="$preload" \
    ASAN_OPTIONS=handle_segv=0:handle_sigbus=0:detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:second_deadlock_stack=1 \
    MASKED_SOFTMAX_EXT_CPU_CAPABILITY=scalar PYTHONDONTWRITEBYTECODE=1 \
    setarch --addr-no-randomize "$PYTHON" "$@")
}

# plant FILE EDIT CODE REPORT PLACE: edits a copy of FILE with sed and links it into a copy of the extension. Running
# CODE must then end in a report that contains REPORT and PLACE.
plant() {
  local file=$1 edit=$2 code=$3 report=$4 place=$5 name folder=$FOLDER/planted output torch_libs
  name=$(basename "$file" .cpp)
  rm -rf "$folder"
  cp -r "$FOLDER/lib" "$folder"
  sed "$edit" "$file" >"$folder/$name.cpp"
  if cmp -s "$file" "$folder/$name.cpp"; then
    echo "expected sed to change $file, but it changed nothing: $edit" >&2
    return 1
  fi
  "$COMPILER" -std=c++20 -fPIC -ffp-contract=off -Icsrc -c "$folder/$name.cpp" -o "$folder/$name.o"
  torch_libs=$("$PYTHON" -c 'import torch; print(torch.__path__[0] + "/lib")')
  find "$FOLDER"/torch-* -name '*.o' ! -name "$name.o" -print0 |
    xargs -0 "$COMPILER" -shared "$folder/$name.o" "${LINK[@]}" -L"$torch_libs" -lc10 -ltorch -ltorch_cpu -ltorch_python \
      -o "$(ls "$folder"/masked_softmax_ext/_C.*.so)"
  if output=$(sanitized "$folder" -c "import torch, threading, masked_softmax_ext as m; $code" 2>&1); then
    echo "the fault planted in $file was not reported: $edit" >&2
    return 1
  fi
  if ! grep -q "$report" <<<"$output" || ! grep -q "$place" <<<"$output"; then
    echo "expected a report of '$report' in $place for the fault planted in $file, but got:" >&2
    echo "$output" >&2
    return 1
  fi
  echo "reported: the fault planted in $file ($report)"
}

plant_for_address() {
  plant csrc/cpu/gather.cpp '/^void scatter(/,/^}/ s/i < count/i <= count/' \
    'm.masked_softmax(torch.ones(3, 5).double(), 5, dtype=torch.float32)' heap-buffer-overflow 'scatter<double>'
  plant csrc/cpu/partition.cpp 's/return problem.rows \* kRowCost/return INT64_MAX - 1 + problem.rows * kRowCost/' \
    'm.masked_softmax(torch.ones(3, 5), 5)' 'runtime error: signed integer overflow' partition.cpp
}

plant_for_thread() {
  plant csrc/cpu/store_hint.cpp \
    's/static const int64_t llc_bytes = \(.*\);/static int64_t llc_bytes = 0; if (llc_bytes >= 0) llc_bytes = \1;/' \
    'x = torch.ones(3, 5)
calls = [threading.Thread(target=lambda: [m.masked_softmax(x, 5) for _ in range(1000)]) for _ in range(4)]
[call.start() for call in calls]; [call.join() for call in calls]' 'data race' store_hint.cpp
  plant csrc/cpu/partition.cpp 's/  boundaries.resize(/  std::swap(boundaries[1], boundaries[2]);\n&/' \
    'torch.set_num_threads(3)
[m.masked_softmax(torch.ones(3000, 64), 64) for _ in range(100)]' 'data race' run_rows
}

build
"plant_for_$mode"
if (($# == 0)); then
  set -- "${TESTS[@]}"
fi
# --capture=sys: a report goes to the file descriptor; if pytest captured that, the report would die with the process.
sanitized "$FOLDER/lib" -m pytest -q --capture=sys -p no:cacheprovider -c "$ROOT/pyproject.toml" --rootdir "$ROOT" "${@/#tests/$ROOT/tests}"
