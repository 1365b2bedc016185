# Each target sets up its own .venv. Python 3.11 or newer: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet

.PHONY: aot bench campaign capture check compiled demo gpu lint regress step style test

demo: .venv/.run  ## distil the tiny Wan teacher to 3 steps: table, runs/tiny_dmd/report.html
	$(BIN)/fastdmd train configs/tiny_dmd.toml

# PYTEST: more of its options; CI requires what the dev extra installs, where a developer may lack a package
PYTEST ?=
test: .venv/.dev lint  ## everything that runs without a GPU, and the slowest 15 tests
	$(BIN)/python -m pytest -n 2 --durations=15 $(PYTEST)

capture: .venv/.dev  ## every method and phase as one graph per exit step: 15 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --campaign tests/test_capture.py

compiled: .venv/.dev  ## every tiny configuration compiled, six to machine code, two warmed: 20 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --campaign -m campaign tests/test_compiled.py tests/test_warm_graphs.py tests/bench/test_block.py

campaign: .venv/.dev  ## every test that takes minutes, those of capture and compiled too: an hour on 2 cores
	$(BIN)/python -m pytest -n 2 --campaign -m campaign

check: .venv/.dev lint  ## what a push is held to, in less than a minute: style, types, rules, methods, configurations
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not full_size" tests/methods tests/config tests/test_layering.py

# `make gpu PY=python3` takes a python that has torch, triton, pytest and pytest-benchmark already, and sets up nothing
PY ?= $(BIN)/python
HERE := PYTHONPATH=.:kernels $(PY)
BENCH := $(HERE) -m pytest bench/kernels.py --benchmark-quiet

bench: .venv/.dev  ## on this CPU: the torch backends beside their references, bench/results/<cpu>.jsonl
	$(BENCH) --plan cpu
	$(HERE) -m bench.report

regress: .venv/.dev  ## counts of launches, bytes, calls, graphs, peaks, registers against bench/results/regress.json
	$(HERE) -m bench.regress

gpu: $(if $(filter $(BIN)/%,$(PY)),.venv/.dev)  ## on this GPU: correctness, then all benchmarks; build/gpu, bench/results
	@mkdir -p build/gpu
	@$(HERE) -m pytest --noconftest -m gpu tests/kernels/test_gpu.py > build/gpu/tests.log 2>&1; tests=$$?; \
	tail -n 40 build/gpu/tests.log; \
	$(BENCH) --plan gpu --minutes 4.5 --results build/gpu --results bench/results > build/gpu/bench.log 2>&1; bench=$$?; \
	tail -n 40 build/gpu/bench.log; \
	$(HERE) -m bench.report build/gpu/*.jsonl > build/gpu/report.txt; cat build/gpu/report.txt; \
	exit $$((tests + bench))

# a cycle of Wan 1.3B at 81x480x832 before and after each measure, then 14B on one card; config.json alone
STEP := $(HERE) -m bench.step
ONCE := run.grad_accum=1 --cycles 1
WAN := configs/wan1_3b_dmd_full.toml model.path="'bench/models/wan1_3b'"
FAST := memory.checkpointing="'selective'"
VSA := vsa.sparsity=0.8 model.attention.student="'vsa'" model.attention.critic="'vsa'"

step: $(if $(filter $(BIN)/%,$(PY)),.venv/.dev)  ## on this GPU: a cycle of a run, bench/results/step.jsonl
	$(STEP) $(WAN) compile.mode="'off'" $(ONCE) --diffusers
	$(STEP) $(WAN) $(FAST) $(ONCE)
	$(STEP) $(WAN) $(FAST) precision.linear="'float8'" $(ONCE)
	$(STEP) $(WAN) $(FAST) $(VSA) $(ONCE)
	$(STEP) configs/wan14b_dmd.toml model.path="'bench/models/wan14b'" $(ONCE)

# `make aot TRITON=3.9.0` compiles with another triton than .venv's, which it installs beside, in build/triton-3.9.0
BUILD := build$(TRITON:%=/triton-%)
BESIDE := $(TRITON:%=$(BUILD)/site)
WITH := $(BESIDE:%=PYTHONPATH=$(CURDIR)/%)

aot: .venv/.dev $(BESIDE)  ## every kernel to machine code for six GPU targets, its checks, and the table
	$(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	$(WITH) $(BIN)/cmake --build $(BUILD)
	$(WITH) $(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	$(WITH) $(BIN)/python -m fastdmd_kernels.aot --out $(BUILD)/aot --check

build/triton-%/site:
	$(PIP) --target $@ --no-deps triton==$*

lint: style
	$(BIN)/pyright

style: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The torch that is tested, before the rest: of a newer one the registry has no build without CUDA.
TORCH ?= 2.13.0

.venv/.run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) torch==$(TORCH)
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.run
	$(PIP) --editable ".[dev]"
	touch $@
