# Everything runs in .venv, which is created when it is first needed.
PYTHON ?= python3
TEXT ?=
HELDOUT ?=
STEPS ?=
PROMPT ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart install test test-slow check clean stale

help:
	@echo "make quickstart            train a small Reformer on real text, evaluate it, sample from it"
	@echo "make quickstart TEXT=PATH  the same on your own file or folder; also HELDOUT=FILES, STEPS=N, PROMPT=..."
	@echo "make install               create .venv with the package and its dependencies"
	@echo "make test                  run the tests (minutes)"
	@echo "make test-slow             run the slow tests"
	@echo "make check                 run ruff and mypy"
	@echo "make clean                 remove .venv, build outputs and caches"

# a .venv whose Python is gone, or is not the one that PYTHON= names, is made anew
version = $(shell $(1) -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)
ifneq ($(wildcard $(VENV)/installed),)
ifeq ($(call version,$(BIN)/python),)
STALE := stale
else ifneq ($(origin PYTHON),file)
ifneq ($(call version,$(BIN)/python),$(call version,$(PYTHON)))
STALE := stale
endif
endif
endif

$(VENV)/installed: pyproject.toml constraints.txt $(STALE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("error: $(PYTHON) is Python %d.%d, and reformer_dist needs 3.10 or newer: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(if $(STALE),--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/installed

quickstart: $(VENV)/installed
	@$(BIN)/python tools/quickstart.py $(if $(TEXT),--text "$(TEXT)") $(if $(HELDOUT),--heldout $(HELDOUT)) \
		$(if $(PROMPT),--prompt "$(PROMPT)") $(if $(STEPS),trainer.max_steps=$(STEPS))

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
