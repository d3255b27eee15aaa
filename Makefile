# Everything runs in .venv, which is created when it is first needed.
PYTHON ?= python3
TEXT ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart install test test-slow check clean

help:
	@echo "make quickstart            train a small Reformer on real text, evaluate it, sample from it"
	@echo "make quickstart TEXT=PATH  the same on your own file or folder"
	@echo "make install               create .venv with the package and its dependencies"
	@echo "make test                  run the tests (minutes)"
	@echo "make test-slow             run the slow tests"
	@echo "make check                 run ruff and mypy"
	@echo "make clean                 remove .venv, build outputs and caches"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/installed

quickstart: $(VENV)/installed
	@$(BIN)/python tools/quickstart.py $(if $(TEXT),--text "$(TEXT)")

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
