# make demo   replace the layers of a model, train it on real data, print the report
# make test   every operation on eager, cpu, simt and interpreted triton
# Both set up everything they need in .venv. Variables: PYTHON, TORCH (what pip installs), MAX_JOBS, PYOPS_CUDA,
# PYOPS_CUDA_ARCHS.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
JOBS := $(or $(MAX_JOBS),$(shell nproc))
GPU_OUT ?= out/gpu

.PHONY: FORCE help demo test test-all build bench lint format gpu sdist clean
help:
	@sed -n 's/^# //p' Makefile | head -4; echo "Other targets: build, test-all, bench, lint, format, gpu, sdist, clean"

# Changes when TORCH does.
$(VENV)/.torch: FORCE
	@mkdir -p $(VENV); echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
FORCE:

$(VENV)/.ready: requirements-dev.txt $(VENV)/.torch
	$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The editable install once; afterwards ninja alone decides what a source edit rebuilds.
$(VENV)/.installed: $(VENV)/.ready setup.py pyproject.toml
	@echo "building the kernels: minutes with CUDA (where nvcc is found; PYOPS_CUDA=0 leaves it out), else two"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

build: $(VENV)/.installed
	@$(PY) setup.py --quiet build_ext --inplace

test: build
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "not full and not nvcc" tests

test-all: build
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "full or nvcc" tests

demo: build
	$(PY) -m examples.demo --out out/demo

bench: build
	$(PY) -m bench all --json out/bench.json --plot out/bench

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | grep -v csrc/dlpack.h)

format: $(VENV)/.ready
	$(PY) -m ruff check --fix --quiet .
	$(PY) -m ruff format --quiet .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | grep -v csrc/dlpack.h)

# Offline, with the python3 in use: build, test and measure on the GPU that is present. Results in $(GPU_OUT).
gpu:
	bash bench/gpu.sh $(PYTHON) $(GPU_OUT)

sdist: $(VENV)/.ready
	$(PY) setup.py --quiet sdist

clean:
	rm -rf build dist out pyops/*.so *.egg-info
