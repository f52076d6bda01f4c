PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Compiled once and kept: SGLang's processes start in half the time.
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE = 1

# Sizes of the long counts; `make test` runs a small slice of each.
FAULT_ROUNDS ?= 200
SERVER_KILLS ?= 50
KILLS        ?= 50
FUZZ_FRAMES  ?= 1000000
FLIPS        ?= 10000
IO_ERRORS    ?= 20000
MINUTES      ?= 20
BENCH_ARGS   ?=
TRAINED      := .cache/SmolLM2-135M-Instruct
E2E_ALONE    := $(patsubst %,tests/e2e/test_%.py,architectures identity)
KERNEL_TESTS := rows packing quantize project_kv

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types imports unit e2e unit-and-e2e-alone e2e-shared e2e-alone faults ranks rehearse fuzz soak bench gpu format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## make .venv with stock SGLang and this package; does nothing the second time

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --prerelease=allow --editable ".[dev]"
	touch $@

demo: setup ## run the main job on the real server and print what was restored
	$(BIN)/python -m bench.demo

test: check ## lint, types, import contracts and all tests, the real server included
	@echo "Tests with and without a server, side by side: about half an hour. Each says how it went when it has ended."
	@$(MAKE) --no-print-directory --jobs 2 --output-sync unit-and-e2e-alone e2e-shared

unit-and-e2e-alone:
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory e2e-alone

check: lint types imports ## what needs no test run

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

unit: export OMP_NUM_THREADS = 1
unit: setup ## tests without a server
	$(BIN)/python -m pytest tests --durations=15 --ignore tests/e2e --ignore tests/triton_kernels
	$(BIN)/python -m pytest tests/triton_kernels

# Tests that look at the clock, which are those without a server, have the right of way.
e2e: e2e-shared e2e-alone ## tests against the real server

e2e-shared: setup
	nice $(BIN)/python -m pytest tests/e2e --durations=15 $(E2E_ALONE:%=--ignore %)

e2e-alone: setup
	nice $(BIN)/python -m pytest --durations=15 $(E2E_ALONE)

faults: setup ## the full counts: kills of writer, prefetcher and clients, flipped bits, failing transfers, damaged files
	HCACHE_FAULT_ROUNDS=$(FAULT_ROUNDS) HCACHE_FLIPS=$(FLIPS) HCACHE_IO_ERRORS=$(IO_ERRORS) $(BIN)/python -m pytest tests/storage
	HCACHE_KILLS=$(KILLS) $(BIN)/python -m pytest tests/prefetch/test_kills.py
	HCACHE_DAMAGE_ALL=1 $(BIN)/python -m pytest tests/e2e/test_damage.py
	HCACHE_SERVER_KILLS=$(SERVER_KILLS) $(BIN)/python -m pytest tests/e2e/test_prefetcher.py -k killed_prefetcher

ranks: setup ## replicas and data-parallel attention with two ranks each
	HCACHE_GROUP_RANKS=2 $(BIN)/python -m pytest tests/e2e/test_data_parallel.py

rehearse: setup ## the GPU's path on an emulated GPU, with the real server; needs g++, takes half an hour
	$(BIN)/python -m tests.emulated_gpu.rehearse

fuzz: setup ## FUZZ_FRAMES hostile frames at the prefetcher's socket
	HCACHE_FUZZ_FRAMES=$(FUZZ_FRAMES) $(BIN)/python -m pytest tests/prefetch/test_fuzz.py -s

soak: setup ## MINUTES of mixed load on a real server: memory, arena and disk stay flat
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

bench: setup ## all benches that need no GPU; more than two hours, on a quiet machine (BENCH_ARGS=--save keeps their figures)
	$(BIN)/python -m bench.ttft --json $(BENCH_ARGS)
	$(BIN)/python -m bench.together --json $(BENCH_ARGS)
	$(BIN)/python -m bench.replay --modes none,auto --rounds 3 --json $(BENCH_ARGS)
	$(BIN)/python -m bench.prefetch --json $(BENCH_ARGS)
	$(BIN)/python -m bench.storage --json $(BENCH_ARGS)
	$(BIN)/python -m bench.planner --json $(BENCH_ARGS)
	$(BIN)/python -m bench.paper --json $(BENCH_ARGS)
	$(BIN)/python -m bench.codec --json $(BENCH_ARGS)
	$(BIN)/python -m bench.codec_logprobs --json $(BENCH_ARGS)
	$(BIN)/python -m bench.trained $(TRAINED)
	$(BIN)/python -m bench.codec --model $(TRAINED) --json $(BENCH_ARGS)
	$(BIN)/python -m bench.codec_logprobs --model $(TRAINED) --json $(BENCH_ARGS)
	$(BIN)/python -m bench.regimes --json $(BENCH_ARGS)
	$(BIN)/python -m bench.wrong_rates --json $(BENCH_ARGS)
	$(BIN)/python -m bench.layerwise --json $(BENCH_ARGS)
	$(BIN)/python -m bench.kernels --compile-only --json $(BENCH_ARGS)

gpu: setup ## all that needs an NVIDIA GPU, correctness first; twenty minutes (BENCH_ARGS=--save, as above)
	$(BIN)/python -m pytest $(KERNEL_TESTS:%=tests/triton_kernels/test_%.py)
	$(BIN)/python -m bench.gpu_restore --tiny
	$(BIN)/python -m bench.kernels --tune $(BENCH_ARGS)
	$(BIN)/python -m bench.codec $(BENCH_ARGS)
	$(BIN)/python -m bench.gpu_restore $(BENCH_ARGS)

format: setup ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and what tests and benches left in .cache
	rm -rf $(VENV) .cache
