#!/usr/bin/env bash
# Fuzzes the kernel layer or the Python interface:
#   tests/fuzz/run.sh kernel [SECONDS]             libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer
#   tests/fuzz/run.sh python [SECONDS]             atheris
#   tests/fuzz/run.sh replay kernel|python FILE... runs these inputs
#   tests/fuzz/run.sh keep kernel|python FILE...   adds these inputs to the regressions
#   tests/fuzz/run.sh merge kernel|python          adds new inputs to the corpus: the fewest that reach the same edges
# A run lasts 60 seconds unless SECONDS is given, and starts from the corpus and the regressions; 0 only replays them.
# These are archives, corpus/*.tar.gz and regressions/*.tar.gz. New inputs stay in build/fuzz/*_found; an input that
# breaks a promise is written to build/fuzz/*_broken-...
#
# FUZZ_SEED is libFuzzer's seed (1 by default; 0 picks a new one each time). With FUZZ_RUNS=COUNT, a run ends after that
# many inputs, not after SECONDS, and starts without the inputs that earlier runs have found. In one folder on one
# machine, the same seed then gives the same inputs every time, so that continuous integration fails because of a
# change, not by chance. FUZZ_OPTIONS go to libFuzzer, CLANG and PYTHON name the tools. If a tool is missing, the run is
# reported as skipped.
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

# Sets `fuzzer` to the target's command.
prepare() {
  case $1 in
    kernel)
      [[ -n $clang ]] || skip "the kernel layer: clang++ is not installed"
      echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' >"$folder/empty.cpp"
      "$clang" -fsanitize=fuzzer,address,undefined "$folder/empty.cpp" -o "$folder/empty" ||
        skip "the kernel layer: $clang lacks libFuzzer or the sanitizers (Debian: libclang-rt-14-dev)"
      make --silent --jobs=2 --file=tests/fuzz/kernel.mk CLANG="$clang"
      fuzzer=("$folder/kernel_fuzzer" -max_len=256 -len_control=0)
      ;;
    python)
      "$python" -c "import atheris" 2>/dev/null || skip "the Python interface: atheris is not installed for $python"
      fuzzer=(env PYTHONPATH="tests/helpers${PYTHONPATH:+:$PYTHONPATH}" "$python" tests/fuzz/python_fuzzer.py -max_len=256 -len_control=0)
      ;;
    *) echo "expected kernel or python, but got '$1'" >&2 && exit 2 ;;
  esac
}

# unpack corpus|regressions TARGET: the archive's inputs, in a folder of their own under build/fuzz.
unpack() {
  local archive=tests/fuzz/$1/$2.tar.gz unpacked=$folder/$1/$2
  rm -rf "$unpacked"
  mkdir -p "$unpacked"
  if [[ -e $archive ]]; then
    tar -xzf "$archive" -C "$unpacked"
  fi
}

# The reverse of unpack. The same inputs give the same bytes: sorted names, no times, no owners.
pack() {
  local archive=tests/fuzz/$1/$2.tar.gz unpacked=$folder/$1/$2
  mkdir -p "$(dirname "$archive")"
  (cd "$unpacked" && find . -type f -printf '%P\n' | LC_ALL=C sort |
    tar --create --format=ustar --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=644 --files-from=-) |
    gzip --no-name --best >"$archive"
  echo "$archive: $(find "$unpacked" -type f | wc -l) inputs"
}

options=(-timeout=60 -rss_limit_mb=8192 -print_final_stats=1 -seed="${FUZZ_SEED:-1}")
read -ra more <<<"${FUZZ_OPTIONS:-}"

case ${1:-} in
  merge)
    target=${2:-}
    prepare "$target"
    unpack corpus "$target"
    corpus=$folder/corpus/$target merged=$folder/${target}_merged
    rm -rf "$merged"
    mkdir -p "$merged" "$folder/${target}_found"
    # Edges only: counting how often each was taken, and operands of comparisons, would keep ten times as many inputs.
    "${fuzzer[@]}" -set_cover_merge=1 -use_counters=0 -use_cmp=0 "${options[@]}" "${more[@]}" "$merged" \
      "$corpus" "$folder/${target}_found"
    rm -rf "$corpus"
    mv "$merged" "$corpus"
    pack corpus "$target"
    ;;
  keep)
    target=${2:-}
    [[ $target == kernel || $target == python ]] || { echo "expected kernel or python, but got '$target'" >&2 && exit 2; }
    unpack regressions "$target"
    cp "${@:3}" "$folder/regressions/$target"
    pack regressions "$target"
    ;;
  replay)
    prepare "${2:-}"
    "${fuzzer[@]}" "${options[@]}" "${more[@]}" "${@:3}"
    ;;
  *)
    target=${1:-}
    prepare "$target"
    unpack corpus "$target"
    unpack regressions "$target"
    seconds=${2:-60}
    limit=(-max_total_time="$seconds")
    found=$folder/${target}_found
    if ((seconds == 0)); then
      limit=(-runs=0)
    elif [[ -n ${FUZZ_RUNS:-} ]]; then
      limit=(-runs="$FUZZ_RUNS" -reload=0)  # else it runs its own new inputs again, from time to time
      found=$folder/${target}_found_in_runs
      rm -rf "$found"
      # libFuzzer learns from what the code compares, addresses and hashes too.
      export PYTHONHASHSEED=0
      setarch --addr-no-randomize true && fuzzer=(setarch --addr-no-randomize "${fuzzer[@]}")
    fi
    # New inputs go to the first folder; the others are only read.
    mkdir -p "$found"
    "${fuzzer[@]}" "${limit[@]}" "${options[@]}" -artifact_prefix="$folder/${target}_broken-" "${more[@]}" \
      "$found" "$folder/corpus/$target" "$folder/regressions/$target"
    ;;
esac
