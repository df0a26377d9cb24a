#!/usr/bin/env bash
# Builds the CUDA kernels for the emulator with g++, links them with the tests of tests/kernel and those here, and runs
# them:
#   plain       the kernels as they are: values, bits, unreadable pages
#   checked     every load and store checked: bounds, initialization, races
#   sanitizers  under AddressSanitizer and UndefinedBehaviorSanitizer: local arrays, shifts, overflow
# Usage: run.sh MODE [PART OF A PROMISE]...; without arguments: all three. CXX names the compiler.
# shellcheck disable=SC2119,SC2120 # the functions' arguments are those of the script
set -euo pipefail
cd "$(dirname "$0")/../.."

FLAGS=(-std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -g1 -Itests/emulator/include -Icsrc -Itests/kernel
  -Itests/emulator)
KERNEL_TESTS=(main test_values test_rows test_bits test_layouts test_guard test_packed
  test_row_numbers)

build_and_run() {
  local mode=$1 is_checked=$2 kernel_flags=$3 test_flags=$4
  shift 4
  local folder=build/emulator/$mode
  rm -rf "$folder"
  mkdir -p "$folder"
  echo "== the CUDA kernels in the emulator: $mode"
  {
    for file in csrc/cuda/*.cu csrc/cuda/*.cpp; do
      echo "$folder/$(basename "$file").o $kernel_flags -x c++ -c $file"
    done
    for file in csrc/cpu/store_hint.cpp tests/emulator/*.cpp $(printf 'tests/kernel/%s.cpp ' "${KERNEL_TESTS[@]}"); do
      echo "$folder/$(basename "$file").o $test_flags -DMASKED_SOFTMAX_EMULATOR_IS_CHECKED=$is_checked -c $file"
    done
  } | xargs -P 2 -L 1 "${CXX:-g++}" "${FLAGS[@]}" -o
  # strategies.cpp comes last: tests run in link order, and it counts the launches of all others.
  local objects
  objects=$(find "$folder" -maxdepth 1 -name '*.o' ! -name 'strategies*' | sort)
  # shellcheck disable=SC2086 # lists, to be split into words
  "${CXX:-g++}" $test_flags $objects "$folder/strategies.cpp.o" -ldl -lpthread -o "$folder/emulator_tests"
  "$folder/emulator_tests" "$@"
}

plain() { build_and_run plain 0 -O1 -O1 "$@"; }
checked() {
  build_and_run checked 1 "-O1 -fsanitize=thread --param tsan-instrument-func-entry-exit=0" "-O1" "$@"
}
sanitizers() {
  build_and_run sanitizers 0 "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all" \
    "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all" "$@"
}

mode=${1-}
case $mode in
  plain | checked | sanitizers) "$@" ;;
  "") plain && checked && sanitizers ;;
  *) echo "expected plain, checked or sanitizers, but got '$mode'" >&2 && exit 2 ;;
esac
