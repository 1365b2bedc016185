# Each target sets up its own .venv. Python 3.11 or newer: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet

.PHONY: demo test lint

demo: .venv/.run  ## distil the tiny Wan teacher to 3 steps: table, runs/tiny_dmd/report.html
	$(BIN)/fastdmd train configs/tiny_dmd.toml

test: .venv/.dev lint  ## everything that runs without a GPU
	$(BIN)/python -m pytest -n 2

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/.run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.run
	$(PIP) --editable ".[dev,tensorboard]"
	touch $@
