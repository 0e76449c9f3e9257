# Everything happens in a virtual environment inside this folder; nothing else is touched.
# A GPU user names the torch build that fits the driver:  make test TORCH='torch==2.13.0 --index-url ...'
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Processes that share the tests; 0: none but pytest's own.
WORKERS ?= 2

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml MANIFEST.in $(shell find csrc -type f)
# What pip was asked for; another TORCH on the command line installs again.
TORCH_STAMP := $(VENV)/.torch
ifneq ($(shell cat $(TORCH_STAMP) 2>/dev/null),$(strip $(TORCH)))
TORCH_CHANGED := torch-changed
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint sanitize fuzz cuda-report clean torch-changed

help:
	@echo 'make demo   install and train a 64-128-128-10 net on the digits by exact back-matching'
	@echo 'make test   install with the development tools and run every test'
	@echo 'make lint   install with the development tools, check style and types'
	@echo 'make sanitize   run the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make fuzz   ten minutes of random calls against float64: benchmarks/results/fuzz.json'
	@echo 'make cuda-report   compile the CUDA kernels with nvcc, no GPU needed: docs/cuda-resources.md'
	@echo 'make clean  remove builds and caches (the virtual environment stays)'
	@echo ''
	@echo 'variables: PYTHON ($(PYTHON)), VENV ($(VENV)), TORCH ($(TORCH)), WORKERS ($(WORKERS))'

demo: $(VENV)/.built
	@rm -rf demo
	@$(BIN)/backmatch train --data digits --model mlp --out demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(VENV)/.dev
	$(BIN)/python -m pytest -v tests/test_native_sanitizers.py

fuzz: $(VENV)/.dev
	$(BIN)/python benchmarks/fuzz.py --seconds 600 --seed 0 --out benchmarks/results/fuzz.json

cuda-report: $(VENV)/.built
	@$(BIN)/python benchmarks/cuda_report.py

clean:
	rm -rf $(VENV)/.built build dist *.egg-info backmatch/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The build tools come from pip's isolated build environment, so that the machine needs none.
$(VENV)/.built: $(TORCH_STAMP) $(SOURCES)
	@echo 'building and installing backmatch'
	@$(BIN)/python -m pip install --quiet --editable '.[cli]'
	@touch $@

# The package is there already, so this only adds the tools of the extra.
$(VENV)/.dev: $(VENV)/.built
	@echo 'installing the development tools'
	@$(BIN)/python -m pip install --quiet 'backmatch[dev]'
	@touch $@

$(TORCH_STAMP): $(BIN)/python $(TORCH_CHANGED)
	@echo 'installing $(strip $(TORCH)) into $(VENV)'
	@$(BIN)/python -m pip install $(TORCH)
	@echo '$(strip $(TORCH))' > $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "backmatch needs Python 3.10 or newer; name one: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
