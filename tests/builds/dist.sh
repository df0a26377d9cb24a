#!/usr/bin/env bash
# What `make dist` runs: builds the source distribution, and from it the wheel for the torch of the environment; checks
# them; installs the wheel in an environment on top of that one and runs tests of the source distribution there. What has
# passed goes to dist/. The argument: the environment's Python (.venv/bin/python). A checker that it lacks is skipped
# visibly.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=$(realpath --no-symlinks "${1:-.venv/bin/python}")
BUILT=$PWD/build/dist/built
TREE=$PWD/build/dist/tree
VENV=$PWD/build/dist/venv

step() { printf '\n== %s\n' "$*"; }

check_with() {
  local module=$1
  shift
  step "$module"
  if "$PYTHON" -c "import $module" 2>/dev/null; then
    "$PYTHON" -m "$module" "$@"
  else
    echo "SKIPPED: $module is not installed"
  fi
}

rm -rf build/dist
mkdir -p build/dist

step "build"
# Without isolation: torch is the environment's own, and no build requirement.
MASKED_SOFTMAX_EXT_LOCAL_VERSION=1 "$PYTHON" -m build --no-isolation --outdir "$BUILT"

check_with twine check --strict "$BUILT"/*
check_with check_wheel_contents "$BUILT"/*.whl

step "the wheel, installed"
"$PYTHON" -m venv --without-pip "$VENV"
# The packages of the environment, without those that are editable: they are not in a folder of packages.
"$PYTHON" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
  >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/below.pth"
"$PYTHON" -m pip --quiet --python "$VENV/bin/python" install --ignore-installed --no-deps "$BUILT"/*.whl
mkdir "$TREE"
tar -xzf "$BUILT"/*.tar.gz -C "$TREE" --strip-components 1
# Nothing but the installed package is there to import.
rm -r "$TREE/masked_softmax_ext"
export MASKED_SOFTMAX_EXT_TEST_DIST=$BUILT
(cd build/dist && "$VENV/bin/python" -m pytest ../../tests/packaging/test_distribution.py)

step "the source distribution's tests"
(cd "$TREE" && "$VENV/bin/python" -m pytest --quiet --collect-only tests | tail -n 3)
(cd "$TREE" && "$VENV/bin/python" -m pytest tests/numerics/test_article.py tests/packaging/test_{build,demo,package}.py)

mkdir -p dist
cp "$BUILT"/* dist
step "dist"
ls -l dist
