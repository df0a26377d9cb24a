# make demo, make test and make bench are all that a newcomer types: they create .venv, install what they need and build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
# FBGEMM is built for one release of torch; empty leaves it out.
FBGEMM ?= fbgemm-gpu-cpu==1.8.0
MXNET_VENV := build/mxnet-venv
BUILD_TOOLS := "setuptools>=77.0.3,<85" "ninja>=1.11.1,<2" "pybind11>=2.13.0,<4" "pytest>=8" "numpy>=1.26"
# For some of the tests: ONNX and its runtime; the samples that torch tests its own functions with; generated cases; an
# example's models.
TEST_TOOLS := "onnx>=1.17,<2" "onnxscript>=0.5,<1" "onnxruntime>=1.20,<2" "expecttest>=0.2,<1" \
	"hypothesis>=6,<7" "transformers>=5.10,<6"
FUZZ_TOOLS := "atheris>=3,<4"
DIST_TOOLS := "build>=1.2,<2" "twine>=6.1,<7" "check-wheel-contents>=0.6.1,<1"

.PHONY: demo test bench bench-quick bench-mxnet docs dist lint kernel-test sanitizer-test fuzz build-test mutation-test \
	emulator-test cuda-test build clean

demo: build
	$(BIN)/python -m masked_softmax_ext

test: build
	$(BIN)/python -m pytest

# This package beside what users would otherwise call: bench/README.md.
bench: build $(VENV)/bench.stamp
	$(BIN)/python bench/run.py $(BENCH)

bench-quick: build $(VENV)/bench.stamp
	$(BIN)/python bench/run.py --quick $(BENCH)

# One more peer for make bench. It needs numpy 1.23, so an environment of its own; Python 3.8 to 3.11.
bench-mxnet:
	$(PYTHON) -m venv $(MXNET_VENV)
	$(MXNET_VENV)/bin/python -m pip install --quiet "mxnet==1.9.1" "numpy<1.24"

# The pages, in build/docs/html, with warnings as errors; and the examples of the docstrings.
docs: build $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs/html
	$(BIN)/python -m sphinx -W --keep-going -b doctest docs build/docs/doctest

# The kernel layer alone, without torch: natively, under sanitizers, and for aarch64 under qemu where it is installed.
kernel-test:
	tests/kernel/run.sh

# The extension under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
SANITIZER_TESTS := sanitizer-test-address sanitizer-test-thread
.PHONY: $(SANITIZER_TESTS)
sanitizer-test: $(SANITIZER_TESTS)
$(SANITIZER_TESTS): sanitizer-test-%: build
	tests/sanitizers/run.sh $*

# Inputs that nobody thought of, for so many seconds each: the kernel layer, and the Python interface.
FUZZ_SECONDS ?= 30
fuzz: build $(VENV)/fuzz.stamp
	tests/fuzz/run.sh kernel $(FUZZ_SECONDS)
	tests/fuzz/run.sh python $(FUZZ_SECONDS)

# The extension with clang, without ninja, and with the oldest build requirements.
build-test: build
	tests/builds/run.sh

# Small faults, planted in the kernels one by one: each must be found. Half an hour.
mutation-test:
	$(PYTHON) tests/kernel/mutations.py

# The CUDA kernels, run on the CPU: every strategy, the emulator's own tests, and planted faults that must be found.
emulator-test: build
	tests/emulator/run.sh checked machine: checker: plan: lengths: "packed rows"
	tests/emulator/run.sh sanitizers lengths: "rows at the sizes"
	$(BIN)/python -m pytest tests/emulator

# With nvcc and a CUDA build of torch (5 GB), without a GPU: the whole extension is built, linked and imported, and its
# kernels are disassembled.
cuda-test:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(CUDA_BIN)/python -m pip install --quiet "$(CUDA_TORCH)" $(BUILD_TOOLS)
	MASKED_SOFTMAX_EXT_CUDA=1 $(CUDA_BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	$(CUDA_BIN)/pytest tests/packaging/test_cuda_build.py tests/numerics/test_article.py
	$(CUDA_BIN)/python bench/inspect_cuda.py --write build/cuda_kernels.md

# The source distribution and the wheel for TORCH, into dist/, once they are checked. For another torch, an environment of
# its own: make dist VENV=.venv-2.11 TORCH=torch==2.11.0
dist: $(VENV)/dist.stamp
	tests/builds/dist.sh $(BIN)/python

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.inc' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

build: $(VENV)/build.stamp

SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/build.stamp: $(VENV)/tools.stamp $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/tools.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(BUILD_TOOLS) $(TEST_TOOLS) "matplotlib>=3.8"
	touch $@

# The package is there already, so pip installs the extra's packages alone; torch is named so that it stays as it is.
$(VENV)/bench.stamp: $(VENV)/build.stamp
	$(BIN)/python -m pip install --quiet "$(TORCH)" "masked_softmax_ext[bench]"
	$(if $(FBGEMM),$(BIN)/python -m pip install --quiet --no-deps "$(FBGEMM)")
	touch $@

$(VENV)/docs.stamp: $(VENV)/build.stamp
	$(BIN)/python -m pip install --quiet "$(TORCH)" "masked_softmax_ext[docs]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/tools.stamp
	$(BIN)/python -m pip install --quiet ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@

$(VENV)/fuzz.stamp: $(VENV)/tools.stamp
	$(BIN)/python -m pip install --quiet $(FUZZ_TOOLS)
	touch $@

$(VENV)/dist.stamp: $(VENV)/tools.stamp
	$(BIN)/python -m pip install --quiet $(DIST_TOOLS)
	touch $@

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info masked_softmax_ext/*.so masked_softmax_ext/_built_for.py
