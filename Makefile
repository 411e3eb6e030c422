# The commands of the house; HACKING.md says more about each.
.PHONY: demo demo-kvcache demo-inference sim planted test test-slow test-ecosystem fuzz crash-states check format bench clean setup

PYTHON ?= python3
BIN = .venv/bin
# Most tests of real processes wait most of the time: one worker more than there are cores.
WORKERS ?= $(shell n=$$(($$(nproc) + 1)); echo $$((n > 8 ? 8 : n)))
export PYTHON

setup:
	@deploy/bootstrap.sh

demo: setup  ## the main job on real input: a cluster, a mount, copies, a kill, a recovery
	@$(BIN)/kvfs demo

demo-kvcache:  ## KV-cache blocks of a real model's size: put, get, restart, replay a workload, plot
	@deploy/bootstrap.sh plots
	@$(BIN)/kvfs demo-kvcache --plot build/demo-kvcache.png

demo-inference:  ## a small DeepSeek-V3 model over HTTP, its KV cache on kvfs: cold, warm, after a restart, beside transformers
	@deploy/bootstrap.sh inference,oracle
	@$(BIN)/kvfs demo-inference

test: setup check  ## everything but the tests marked slow
	@deploy/bootstrap.sh plots,inference,oracle
	@$(BIN)/pytest -m "not slow and not ecosystem" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: setup
	@$(BIN)/pytest -m slow

FRAMES ?= 1000000
fuzz: setup  ## mutated frames against real services, and wrong answers against clients; FRAMES=... and KVFS_SEED=... choose
	@KVFS_FUZZ_FRAMES=$(FRAMES) KVFS_FUZZ_ANSWERS=$$(($(FRAMES) / 200)) $(BIN)/pytest -s tests/fuzz

test-ecosystem:  ## the connectors under the real SGLang, LMCache and vLLM, without a GPU; installs them into .venv-ecosystem
	@deploy/ecosystem.sh
	@.venv-ecosystem/bin/python -m pytest -m "not slow" tests/connectors tests/ecosystem

sim: setup  ## a whole cluster by seed: SEED=n replays one with its trace, SEEDS=n runs so many (FIRST=n: from there)
	@$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),200) --first $(or $(FIRST),1))

planted: setup  ## mistakes planted in the product, and how many seeds the simulation needs to find each
	@$(BIN)/python -m tests.sim.planted

crash-states: setup  ## 50,000 states that a crash may leave, each opened and checked; `make test` does 5,000
	@$(BIN)/python tests/crash/run.py --states 50000

check: setup  ## style, types, the import table
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/unit/test_house.py

format: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench:  ## ratios to the local disk, measured in the same run
	@deploy/bootstrap.sh inference,oracle
	@$(BIN)/python -m tests.bench

clean:
	rm -rf .venv .venv-ecosystem build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name '*_pb2.py*' -delete -o -name __pycache__ -prune -exec rm -rf {} +
