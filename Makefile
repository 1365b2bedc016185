# Each target sets up its own .venv. Python 3.11 or newer: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint

demo: $(READY)  ## distil the tiny Wan teacher to 3 steps: table, runs/tiny_dmd/report.html
	$(BIN)/fastdmd train configs/tiny_dmd.toml

test: $(READY) lint  ## everything that runs without a GPU
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,tensorboard]"
	touch $@
