# make demo and make test are all that a newcomer types: they create .venv, install what they need and build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint kernel-test emulator-test build clean

demo: build
	$(BIN)/python -m masked_softmax_ext

test: build
	$(BIN)/python -m pytest

# The kernel layer alone, without torch: natively, under sanitizers, and for aarch64 under qemu where it is installed.
kernel-test:
	tests/kernel/run.sh

# The CUDA kernels, run on the CPU: every strategy, the emulator's own tests, and planted faults that must be found.
emulator-test: build
	tests/emulator/run.sh checked machine: checker: plan: lengths:
	$(BIN)/python -m pytest tests/emulator

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
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" "ninja>=1.11" "pybind11>=2.13" \
		"pytest>=8" "numpy>=1.26" "matplotlib>=3.8"
	touch $@

$(VENV)/dev.stamp: $(VENV)/tools.stamp
	$(BIN)/python -m pip install --quiet ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info masked_softmax_ext/*.so masked_softmax_ext/_built_for.py
