#!/usr/bin/env bash
# Other ways to build than `make build`, with warnings as errors:
#   clang      the extension with clang++ as C++20 and the oldest build requirements that pyproject.toml allows
#   no-ninja   the extension with g++ as C++17 and without ninja
#   standards  the kernel layer with each compiler and each C++ standard
# The extension is built in its own environment on top of .venv, and short tests run on it. Without an argument: all
# three. If a compiler is missing, its part is reported as skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=$PWD/.venv/bin/python
TESTS=(
  tests/numerics/test_article.py
  tests/semantics/test_threads.py
  tests/packaging/test_build.py::test_one_openmp_library
)

# A copy of the tree, and an environment that falls back to the packages of .venv.
make_environment() {
  local folder=$1
  rm -rf "$folder"
  mkdir -p "$folder/tree"
  # Without pip, and so without the old setuptools that Python 3.11 and older install with it, which would hide .venv's.
  "$PYTHON" -m venv --without-pip "$folder/venv"
  local packages='import sysconfig; print(sysconfig.get_path("platlib"))'
  "$PYTHON" -c "$packages" >"$("$folder/venv/bin/python" -c "$packages")/below.pth"
  git ls-files -z | xargs -0 cp --parents -t "$folder/tree"
}

build_and_test() (
  local folder=$1
  echo "== the extension: $(basename "$folder"), CXX=$CXX CFLAGS=$CFLAGS"
  cd "$folder/tree"
  if ! ../venv/bin/python setup.py build_ext --inplace >../build.log 2>&1; then
    grep -E "error|warning" ../build.log | grep -v " -c "
    tail -3 ../build.log
    return 1
  fi
  ../venv/bin/python -m pytest -q "${TESTS[@]}"
)

clang() {
  if ! command -v clang++ >/dev/null; then
    echo "SKIPPED: the extension with clang: clang++ is not installed"
    return
  fi
  local folder=$PWD/build/builds/clang oldest
  make_environment "$folder"
  oldest=$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '" ' | tr ',' '\n' | sed -n 's/>=/==/p')
  # shellcheck disable=SC2086 # one word a requirement
  "$folder/venv/bin/python" -m pip install --quiet $oldest
  CXX=clang++ CFLAGS="-Werror -std=c++20" build_and_test "$folder"
}

no-ninja() {
  local folder=$PWD/build/builds/no-ninja compiler
  make_environment "$folder"
  mkdir "$folder/programs"
  printf '#!/bin/sh\nexit 1\n' >"$folder/programs/ninja"
  # Unoptimized, because files are compiled one after another.
  compiler=$(command -v g++)
  printf '#!/bin/sh\nexec %s "$@" -O0\n' "$compiler" >"$folder/programs/g++"
  chmod +x "$folder"/programs/*
  local TESTS=(tests/numerics/test_article.py)
  PATH=$folder/programs:$PATH CXX=g++ CFLAGS="-Werror -std=c++17" build_and_test "$folder"
}

standards() {
  local compiler standard
  for compiler in g++ clang++; do
    if ! command -v "$compiler" >/dev/null; then
      echo "SKIPPED: the kernel layer with $compiler: it is not installed"
      continue
    fi
    for standard in 17 20; do
      echo "== the kernel layer: $compiler, C++$standard"
      printf '%s\n' csrc/common/*.cpp csrc/cpu/*.cpp |
        xargs -P 2 -I{} "$compiler" "-std=c++$standard" -Wall -Wextra -Werror -O0 -Icsrc -c {} -o /dev/null
    done
  done
}

(($#)) || set -- standards clang no-ninja
for way in "$@"; do
  case $way in
    standards | clang | no-ninja) "$way" ;;
    *) echo "expected standards, clang or no-ninja, but got '$way'" >&2 && exit 2 ;;
  esac
done
