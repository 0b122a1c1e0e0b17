# `make` shows the targets. Each makes its own environment first, from the exact pins in constraints.txt.
#   make test PYTHON=python3.12 VENV=.venv-3.12     another interpreter (3.11 or newer), beside the first
#   make test PYTEST_ARGS="-n 0 -x tests/data"      any pytest argument; -n 0: in this process, without workers
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# A worker per CPU, of one thread each. `worksteal` keeps the tests of a file together, for the sake of shared fixtures,
# until a worker has nothing left to do.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist worksteal

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile
# Packages hold files that only a newer Python can compile.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
CACHE := .cache
ROOMS := bd3lm_hf modeling training hub_upload
TORCH = $(shell grep '^torch==' constraints.txt)
TRANSFORMERS = $(shell grep '^transformers==' constraints.txt)
OLDEST := .venv-oldest
# transformers' own model tests are in its source distribution only.
SOURCE := $(CACHE)/transformers-source

# Waiting threads sleep instead of spinning, which is slow and erratic on a busy machine (see BENCHMARKS.md).
export OMP_WAIT_POLICY ?= PASSIVE
test test-slow test-oldest: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-oldest gpu-check check clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(READY) ## make or refresh the environment

# What a user installs, with pictures and the server: all that the demo needs. torch first and alone, so that nothing
# that depends on it picks another build. Compiling the modules takes as long as downloading them, so all CPUs do it.
$(INSTALLED): constraints.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --constraint constraints.txt --editable '.[plots,serve]'
	$(COMPILE)
	touch $@

$(READY): $(INSTALLED)
	$(PIP) --constraint constraints.txt --editable '.[test,dev,plots,harness,serve]'
	$(COMPILE)
	touch $@

demo: $(INSTALLED) ## train, score and write text on this machine, in minutes, without a download
	$(BIN)/python training/train.py training/recipes/demo.yaml

test: $(READY) ## the quick tests
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

test-slow: $(READY) ## the slow tests: three ways of installing, transformers' common model tests, ...
	@$(MAKE) --no-print-directory $(SOURCE)/.ready || echo "transformers' tests could not be had; theirs will fail below"
	@$(BIN)/python -m pip install --quiet --no-deps bitsandbytes torchao trl || echo "their tests will be skipped"
	BD3LM_TRANSFORMERS_SOURCE=$(abspath $(SOURCE)) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.ready ## the core suite with the oldest supported transformers, in an environment of its own
	$(OLDEST)/bin/python $(PYTEST) tests/modeling tests/training/test_trainer.py \
		tests/training/test_trainer_saving.py tests/test_auto_classes.py \
		tests/test_private_api.py $(PYTEST_ARGS)

$(OLDEST)/.ready: constraints.txt setup.cfg
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH)
	$(OLDEST)/bin/python -m pip install --quiet 'transformers==5.12.*' --editable '.[test]'
	touch $@

# Without an environment of its own, so that it runs on a borrowed machine: PYTHON=.venv/bin/python takes ours.
gpu-check: ## on a CUDA machine: the tests marked gpu and all measurements, in nine minutes, into gpu-check/
	$(PYTHON) tests/gpu/check.py

$(SOURCE)/.ready: constraints.txt | $(READY)
	rm -rf $(SOURCE)
	mkdir -p $(SOURCE)/download
	$(BIN)/python -m pip download --quiet --no-binary :all: --no-deps --dest $(SOURCE)/download $(TRANSFORMERS)
	tar -xzf $(SOURCE)/download/*.tar.gz -C $(SOURCE) --strip-components=1 --wildcards '*/tests/*'
	touch $@

# The type check sees what a user gets: an installed wheel. A stale build/ would bring deleted modules back into it.
check: $(READY) ## lint, formatting, and types of the installed wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build $(CACHE)/wheel $(CACHE)/installed
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(CACHE)/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target $(CACHE)/installed $(CACHE)/wheel/*.whl
	cd $(CACHE)/installed && $(abspath $(BIN))/mypy --config-file $(CURDIR)/setup.cfg \
		--cache-dir $(CURDIR)/.mypy_cache --python-executable $(abspath $(BIN))/python -p bd3lm_hf
	rm -rf build

clean: ## remove builds and caches, keep the environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache $(CACHE)
	find $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
