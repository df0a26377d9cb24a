# No target needs another one first: each creates .venv, installs its requirements and builds. make help lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
# Built for one release of torch; make bench FBGEMM= goes without.
FBGEMM ?= fbgemm-gpu-cpu==1.8.0
MXNET_VENV := build/mxnet-venv
# uv and poetry, apart from the packages of $(VENV).
INSTALLERS := build/installers

# $(call pip-install,VENV,NAMES,REQUIREMENTS): installs what pyproject.toml lists under NAMES, and REQUIREMENTS.
define pip-install
$(1)/bin/python tools/requirements.py $(2) >$(1)/$(firstword $(2)).txt
$(1)/bin/python -m pip install --quiet --requirement $(1)/$(firstword $(2)).txt $(3)
endef

# $(call if-available,PROGRAM,ARGUMENTS): for programs that their packages download, which a machine may not allow.
define if-available
@if $(BIN)/$(1) --version >/dev/null 2>&1; then $(BIN)/$(1) $(2); else echo "SKIPPED: $(1) cannot be had here"; fi
endef

.PHONY: demo help test bench bench-quick bench-mxnet docs dist lint clang-tidy coverage kernel-test sanitizer-test fuzz \
	build-test mutation-test emulator-test cuda-test gpu-kernels gate-rehearsal build clean

# The demo needs no numpy, and torch warns that it is missing.
demo: export PYTHONWARNINGS := ignore:Failed to initialize NumPy

# Shows what the package does, and how fast: the default target.
demo: $(VENV)/build.stamp
	$(BIN)/python -m masked_softmax_ext

# Prints the targets, each with the first sentence of its comment here.
help:
	@awk '/^# /{text = text substr($$0, 2)} /^[a-z-]+:/ && !/: export/{sub(/:.*/, ""); sub(/\. .*/, ".", text); \
		printf "%-16s%s\n", $$0, text} /^$$/{text = ""}' Makefile

# The Python tests.
test: build
	$(BIN)/python -m pytest

# Compares this package with the baselines: bench/README.md.
bench: build $(VENV)/bench.stamp
	$(BIN)/python bench/run.py $(BENCH)

# The same with fewer cases, to try it out.
bench-quick: build $(VENV)/bench.stamp
	$(BIN)/python bench/run.py --quick $(BENCH)

# MXNet, a further baseline of make bench. It needs Python 3.8 to 3.11 and, for numpy 1.23, a separate environment.
bench-mxnet:
	$(PYTHON) -m venv $(MXNET_VENV)
	$(MXNET_VENV)/bin/python -m pip install --quiet "mxnet==1.9.1" "numpy<1.24"

# Builds the documentation in build/docs/html, with warnings as errors, and tests the examples of the docstrings.
docs: build $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs/html
	$(BIN)/python -m sphinx -W --keep-going -b doctest docs build/docs/doctest

# The CPU kernels without torch: native, under sanitizers, and for aarch64 under qemu if it is installed.
kernel-test:
	tests/kernel/run.sh

# The extension under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
SANITIZER_TESTS := sanitizer-test-address sanitizer-test-thread
.PHONY: $(SANITIZER_TESTS)
sanitizer-test: $(SANITIZER_TESTS)
$(SANITIZER_TESTS): sanitizer-test-%: build
	tests/sanitizers/run.sh $*

# Fuzzes the CPU kernels and the Python interface, each for FUZZ_SECONDS. FUZZ_RUNS=COUNT in the environment: that many
# inputs, the same every time on one machine.
FUZZ_SECONDS ?= 30
fuzz: build $(VENV)/fuzz.stamp
	tests/fuzz/run.sh kernel $(FUZZ_SECONDS)
	tests/fuzz/run.sh python $(FUZZ_SECONDS)

# The extension with clang, without ninja, and with the oldest build requirements; each way to install it.
build-test: build $(VENV)/dist.stamp $(INSTALLERS)/stamp
	tests/builds/run.sh
	PATH=$$PATH:$(abspath $(INSTALLERS))/bin $(BIN)/python -m pytest tests/builds

# Mutation testing of the CPU kernels: the tests must detect each mutation. Takes an hour.
mutation-test:
	$(PYTHON) tests/kernel/mutations.py

# The CUDA kernels, emulated on the CPU: every strategy, the tests of the emulator, and mutations that must be detected.
emulator-test: build
	tests/emulator/run.sh checked machine: checker: plan: lengths: "plain rows" "packed rows" strategies:
	tests/emulator/run.sh sanitizers lengths: "plain rows" "rows at the sizes"
	$(BIN)/python -m pytest tests/emulator

# What tests/gpu/gate.sh runs on a GPU, without one: the same scripts with the CUDA kernels emulated, and the plans of all
# cases for an H200.
gate-rehearsal: build
	PYTHON=$(abspath $(BIN)/python) tests/gpu/gate.sh --rehearse

# The kernels of tests/gpu/gate.sh, to be carried with build/gpu to a machine with a GPU of GPU_ARCHITECTURE. Needs nvcc,
# but no torch.
GPU_ARCHITECTURE ?= 90
gpu-kernels:
	$(PYTHON) tests/gpu/build_kernel_library.py --architecture $(GPU_ARCHITECTURE)

# Builds, links and imports the extension with CUDA, and disassembles its kernels. Needs nvcc and a CUDA build of torch
# (5 GB), but no GPU.
cuda-test:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(call pip-install,$(CUDA_VENV),build,"$(CUDA_TORCH)" pytest numpy)
	MASKED_SOFTMAX_EXT_CUDA=1 $(CUDA_BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	$(CUDA_BIN)/pytest tests/packaging/test_cuda_build.py tests/numerics/test_article.py tests/gpu/test_triton.py
	$(CUDA_BIN)/python tests/gpu/inspect_kernels.py --write build/cuda_kernels.md

# Builds and checks the source distribution and the wheel for TORCH, in dist/. Another torch needs a separate
# environment: make dist VENV=.venv-2.11 TORCH=torch==2.11.0. Tests run on the installed wheel.
dist: $(VENV)/dist.stamp $(VENV)/test.stamp
	tests/builds/dist.sh $(BIN)/python

# Style and types. Types are checked against the packages that the tests need.
lint: $(VENV)/lint.stamp $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(call if-available,pyright,--pythonpath $(BIN)/python)
	$(call if-available,shellcheck,.ci/run $$(git ls-files '*.sh'))
	$(BIN)/actionlint -shellcheck=$(BIN)/shellcheck
	git ls-files '*.h' '*.cpp' '*.inc' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# Static analysis of the C++. Apart from lint, which needs no build.
clang-tidy: build $(VENV)/lint.stamp
	$(BIN)/python tools/clang_tidy.py

# Which lines of Python and C++ the tests run: a report, and pages in build/coverage/html. COVERAGE may name some tests.
coverage: build $(VENV)/coverage.stamp
	tests/coverage/run.sh $(COVERAGE)

# The extension in .venv, with what the tests need. make demo goes without the latter.
build: $(VENV)/build.stamp $(VENV)/test.stamp

# __init__.py has the version.
SOURCES := setup.py pyproject.toml $(wildcard masked_softmax_ext/__init__.py) \
	$(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/build.stamp: $(VENV)/tools.stamp $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/tools.stamp: pyproject.toml tools/requirements.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(call pip-install,$(VENV),build,"$(TORCH)")
	touch $@

$(VENV)/bench.stamp: $(VENV)/tools.stamp
	$(call pip-install,$(VENV),bench)
	$(if $(FBGEMM),$(BIN)/python -m pip install --quiet --no-deps "$(FBGEMM)")
	touch $@

STAMPS := $(patsubst %,$(VENV)/%.stamp,test docs lint dist coverage)
$(STAMPS): $(VENV)/%.stamp: $(VENV)/tools.stamp
	$(call pip-install,$(VENV),$*)
	touch $@

$(INSTALLERS)/stamp: pyproject.toml tools/requirements.py
	$(PYTHON) -m venv $(INSTALLERS)
	$(call pip-install,$(INSTALLERS),installers)
	touch $@

$(VENV)/fuzz.stamp: $(VENV)/tools.stamp
	$(BIN)/python -m pip install --quiet "atheris>=3,<4"
	touch $@

# Deletes the environments and everything that was built.
clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info masked_softmax_ext/*.so masked_softmax_ext/_built_for.py
