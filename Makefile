# `make demo`, `make test`, `make check`: each makes the virtual environment first if need be.
# Needs python >= 3.11, make and git. Another interpreter: make PYTHON=python3.12; an environment you have: make VENV=path.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
RUN := $(VENV)/bin/python
# In the environment, so that it goes with it: the install runs again only when pyproject.toml changes.
STAMP := $(VENV)/.powerhouse-installed

export OMP_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

install: $(STAMP) ## make the virtual environment and install everything into it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "python >= 3.11 is needed, this is " + sys.version.split()[0] + "; another one: make PYTHON=python3.12 ...")'
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "no virtual environment could be made; on Debian: apt install python3-venv" >&2; exit 1; }
	$(RUN) -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## collect, fit and compare on the embedded digits; the report is in $(OUT)
	$(RUN) -m train_generators demo --out $(OUT)

test: $(STAMP) ## run all tests
	$(RUN) -m pytest

check: $(STAMP) ## lint, formatting, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP) ## repair what `check` finds, where a tool can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## remove the environment, caches and build outputs; results in runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
