#!/usr/bin/env bash
# Fuzzes for so many seconds (60 without the argument), beginning with the kept corpus; 0 replays that and stops.
#   tests/fuzz/run.sh kernel [SECONDS]      the kernel layer: libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer
#   tests/fuzz/run.sh python [SECONDS]      the Python interface: atheris
#   tests/fuzz/run.sh merge kernel|python   keeps, of what runs have found, the least that covers as much
#   tests/fuzz/run.sh replay kernel|python FILE...
# FUZZ_SEED makes a run repeatable (1 unless set; 0 is a new one each time), FUZZ_OPTIONS are more of libFuzzer's,
# CLANG and PYTHON name the tools. What runs find stays in build/fuzz/*_found; an input that breaks a promise is written
# to build/fuzz/*_broken-... What the machine lacks is skipped visibly.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=build/fuzz
clang=${CLANG:-$(command -v clang++ || command -v clang++-14 || true)}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"

skip() {
  echo "SKIPPED: fuzzing $*"
  exit 0
}

# Sets `fuzzer` to the command that is one.
prepare() {
  case $1 in
    kernel)
      [[ -n $clang ]] || skip "the kernel layer: clang++ is not installed"
      echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' >"$folder/nothing.cpp"
      "$clang" -fsanitize=fuzzer,address,undefined "$folder/nothing.cpp" -o "$folder/nothing" ||
        skip "the kernel layer: $clang lacks libFuzzer or the sanitizers (Debian: libclang-rt-14-dev)"
      make --silent --jobs=2 --file=tests/fuzz/kernel.mk CLANG="$clang"
      fuzzer=("$folder/kernel_fuzzer" -max_len=256 -len_control=0)
      ;;
    python)
      "$python" -c "import atheris" 2>/dev/null || skip "the Python interface: atheris is not installed for $python"
      fuzzer=(env PYTHONPATH=tests/helpers "$python" tests/fuzz/python_fuzzer.py -max_len=256 -len_control=0)
      ;;
    *) echo "expected kernel or python, but got '$1'" >&2 && exit 2 ;;
  esac
}

options=(-timeout=60 -rss_limit_mb=8192 -print_final_stats=1 -seed="${FUZZ_SEED:-1}")
read -ra more <<<"${FUZZ_OPTIONS:-}"

if [[ ${1:-} == merge ]]; then
  target=${2:-}
  prepare "$target"
  kept=tests/fuzz/corpus/$target
  merged=$folder/${target}_merged
  rm -rf "$merged"
  mkdir -p "$merged" "$kept" "$folder/${target}_found"
  # Edges alone: how often each was taken, and what was compared, would keep ten times as many files.
  "${fuzzer[@]}" -set_cover_merge=1 -use_counters=0 -use_cmp=0 "${options[@]}" "${more[@]}" "$merged" \
    "$kept" "$folder/${target}_found"
  rm -rf "$kept"
  mv "$merged" "$kept"
  exit
fi

if [[ ${1:-} == replay ]]; then
  prepare "${2:-}"
  exec "${fuzzer[@]}" "${options[@]}" "${more[@]}" "${@:3}"
fi

target=${1:-}
prepare "$target"
seconds=${2:-60}
found=$folder/${target}_found
mkdir -p "$found"
folders=("$found")  # new finds go to the first; the others are only read
for kept in tests/fuzz/corpus/$target tests/fuzz/regressions/$target; do
  [[ -d $kept ]] && folders+=("$kept")
done
limit=(-max_total_time="$seconds")
((seconds > 0)) || limit=(-runs=0)
"${fuzzer[@]}" "${limit[@]}" "${options[@]}" -artifact_prefix="$folder/${target}_broken-" "${more[@]}" "${folders[@]}"
