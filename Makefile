# Every target works alone on a fresh clone: it fetches what it needs into .uv/ and .venv/.
# Settings: UV_PYTHON=3.12 (another Python), ARGS="-m slow" (more for pytest), WORKERS=4.

SHELL   := /bin/bash
VENV    := .venv
BIN     := $(VENV)/bin
LOCK    := locks/all.txt
UV      := .uv/uv
WORKERS ?= auto

# Everything that goes together on any platform; cuda and tpu are for the machine that has one.
EXTRAS := data track lab plan ray harness mkl
GROUPS := test lint parity
DEVICE_EXTRAS := cuda tpu

comma := ,
with_commas = $(subst $() ,$(comma),$(1))
# The lock's hashes hold for what is installed and for what builds the package.
PIP = $(UV) pip install --compile-bytecode --python $(BIN)/python \
  --constraints $(LOCK) --build-constraints $(LOCK)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev test lint format lock build clean lab demo compare bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.core  ## the library and its command, into .venv

dev: $(VENV)/.dev  ## every extra that goes together, and what tests, lint and parity need (9 GB)

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python scripts/fetch_smollm2.py || true  # the test that needs it then says so
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 $(ARGS)

lint: $(VENV)/.lint  ## check style and formatting, change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.lint  ## put style and formatting right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(BIN)/python  ## wheel and sdist, into dist/
	$(UV) build --python $(BIN)/python --build-constraints $(LOCK) --out-dir dist

lab: $(VENV)/.lab  ## JupyterLab with Assay in it
	$(BIN)/jupyter lab

demo: $(VENV)/.core  ## a small model trained, scored beside a bigram, and let write: minutes on a CPU
	$(BIN)/assay demo

compare: $(VENV)/.core  ## dense, grouped-query or experts: trains 9 models, writes runs/quick/report.html
	$(BIN)/assay compare examples/compare/quick.toml --out runs/quick

bench: $(VENV)/.dev  ## speed and memory against PyTorch, and a plot of growth: minutes
	$(BIN)/assay bench train tiny-gpt --against torch
	$(BIN)/assay bench decode smollm-135m --against torch --rounds 3
	$(BIN)/assay bench memory gpt2 --batch-size 4 --seq-len 256 --against torch
	$(BIN)/assay bench loop tiny-gpt
	$(BIN)/assay bench growth --plot runs/growth-$$(date +%Y%m%d-%H%M%S).png

lock: $(UV)  ## resolve every dependency anew, to the newest stable versions
	$(UV) pip compile pyproject.toml --universal --python-version 3.12 --upgrade \
	  $(foreach extra,$(EXTRAS) $(DEVICE_EXTRAS),--extra $(extra)) \
	  $(foreach group,$(GROUPS) build,--group $(group)) \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file $(LOCK)

clean:  ## remove what was built and cached; runs and .venv stay
	rm -rf dist build .uv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- the environment; a stamp in .venv for each thing installed, older than none of its causes

$(VENV)/.core: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) --editable '.[$(call with_commas,$(EXTRAS))]' $(foreach group,$(GROUPS),--group $(group))
	@touch $@ $(VENV)/.core $(VENV)/.lint $(VENV)/.lab

$(VENV)/.lab: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) --editable '.[lab]'
	@touch $@

$(VENV)/.lint: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) --group lint
	@touch $@

# UV_PYTHON, else the first that uv knows or pyenv keeps, else uv downloads one.
$(BIN)/python: | $(UV)
	@for version in 3.13 3.12 3.14; do \
	  python=$${UV_PYTHON:-$$($(UV) python find --system --no-project $$version 2>/dev/null)} && break; \
	  prefix=$$(pyenv prefix $$version 2>/dev/null) && python=$$prefix/bin/python && break; \
	done; $(UV) venv --python "$${python:-3.13}" --allow-existing $(VENV)

# A uv that runs (a pyenv shim may not), else one of our own: a venv takes pip everywhere.
$(UV):
	@mkdir -p .uv; \
	if uv --version >/dev/null 2>&1; then uv=uv; \
	elif python3 -m uv --version >/dev/null 2>&1; then uv='python3 -m uv'; \
	elif python3 -m venv .uv/env && .uv/env/bin/python -m pip install --quiet uv; then uv='$(CURDIR)/.uv/env/bin/uv'; \
	else echo "make needs uv, or a python3 that has venv and pip (on Debian: apt install python3-venv)." >&2; exit 1; fi; \
	printf '#!/bin/sh\nexec %s "$$@"\n' "$$uv" > $@; chmod +x $@
