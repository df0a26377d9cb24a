#!/usr/bin/env bash
# Builds the kernel layer and its tests without torch, and runs them:
#   native      as they are
#   sanitizers  under AddressSanitizer and UndefinedBehaviorSanitizer
#   qemu        for aarch64 (NEON), cross-compiled, under qemu-aarch64
#   coverage    with g++'s counters of executed lines: tests/coverage/run.sh
# Without an argument: the first three. CXX names the compiler of the first two. Modes whose tools are missing print
# SKIPPED.
set -euo pipefail
cd "$(dirname "$0")/../.."

build_and_run() {
  local mode=$1 runner=$2 compiler=$3
  shift 3
  local folder=build/kernel_tests/$mode
  rm -rf "$folder"
  mkdir -p "$folder"
  echo "== the kernel layer: $mode, $compiler"
  # shellcheck disable=SC2016 # expanded by the inner shell, which compiles one file
  printf '%s\n' csrc/common/*.cpp csrc/cpu/*.cpp tests/kernel/*.cpp |
    xargs -P 1 -I{} sh -c 'out=$1/$(echo "$2" | tr / _).o; shift 2; "$@" -o "$out"' _ "$folder" {} \
      "$compiler" -std=c++17 -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno "$@" -Icsrc -Itests/kernel -c {}
  "$compiler" "$@" "$folder"/*.o -o "$folder/kernel_tests"
  $runner "$folder/kernel_tests"
}

native() { build_and_run native "" "${CXX:-g++}" -O2; }

sanitizers() {
  build_and_run sanitizers "" "${CXX:-g++}" -O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
}

# Optimized, and with counters that threads may miscount: they only have to tell 0 from more.
coverage() { build_and_run coverage "" g++ -O1 --coverage -fprofile-update=single; }

qemu() {
  local tool
  for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
    if ! command -v "$tool" >/dev/null; then
      echo "SKIPPED: the kernel layer on aarch64: $tool is not installed"
      return
    fi
  done
  build_and_run qemu qemu-aarch64 aarch64-linux-gnu-g++ -O2 -static
}

(($#)) || set -- native sanitizers qemu
for mode in "$@"; do
  case $mode in
    native | sanitizers | qemu | coverage) "$mode" ;;
    *) echo "expected native, sanitizers, qemu or coverage, but got '$mode'" >&2 && exit 2 ;;
  esac
done
