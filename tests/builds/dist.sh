#!/usr/bin/env bash
# Builds and checks what `make dist` distributes:
#   1. the source distribution, and from it the wheel for the environment's torch;
#   2. the checks of twine and check-wheel-contents, which are reported as skipped if they are not installed;
#   3. the wheel is installed on top of the environment, and tests of the source distribution run on it.
# The files go to dist/ if everything passed. The argument is the environment's Python (default .venv/bin/python).
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
# Without isolation, because the build uses the environment's torch.
MASKED_SOFTMAX_EXT_LOCAL_VERSION=1 "$PYTHON" -m build --no-isolation --outdir "$BUILT"

check_with twine check --strict "$BUILT"/*
check_with check_wheel_contents "$BUILT"/*.whl

step "the wheel, installed"
"$PYTHON" -m venv --without-pip "$VENV"
# The environment's packages except the editable ones, which are not in its site-packages.
"$PYTHON" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
  >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/below.pth"
"$PYTHON" -m pip --quiet --python "$VENV/bin/python" install --ignore-installed --no-deps "$BUILT"/*.whl
mkdir "$TREE"
tar -xzf "$BUILT"/*.tar.gz -C "$TREE" --strip-components 1
# Leaves only the installed package to import.
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
