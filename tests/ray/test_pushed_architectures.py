"""vLLM on CPU computes what was pushed: experts under other names and packed, a shared head, a padded vocabulary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pace import scaled

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]


# Experts that transformers fuses and renames, one beside a shared expert and buffers; heads tied under other names; and
# projections whose rows vLLM puts in another order.
MODELS = ["qwen3_moe", "mixtral", "glm4_moe", "gpt2", "opt", "falcon", "gpt_neox"]


def test_experts_and_shared_heads_follow_the_learner() -> None:
    """One process for all, not this one: closing an engine closes the process's distributed state."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "tests.benchmarks.zoo_push", *MODELS]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=scaled(300 + 60 * len(MODELS))
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == MODELS, done.stdout + done.stderr
    for name, *gaps in rows:
        load, push, again, moved = (float(gap) for gap in gaps)
        assert max(load, push, again) < 1e-3 < 0.1 < moved, f"{name}: {gaps}"
    assert done.returncode == 0
