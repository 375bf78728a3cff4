"""`rlaif train` in bf16 from end to end, with the arithmetic of GPUs: fp32 weights in the learner, else bf16.

CPUs without AMX emulate bf16: slowly, and with the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlaif_ray.pipelines.agreement import BF16_GAP
from tests.runs import Program, finish_train, rows, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

IN_BF16 = ("policy.precision=bf16", "feedback.judge.precision=bf16")
SHORT = ("checkpoint.every=1", "evaluation.held_out.path=null", "tracking.wandb=disabled", "guard.every=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Program]]]:
    """Two steps, and a third by a second program that goes on from the checkpoint."""
    folder = tmp_path_factory.mktemp("bf16")
    config, run_dir = tiny_config(folder), folder / "run"
    found = []
    for steps in (2, 3):
        program = finish_train(config, *IN_BF16, *SHORT, f"steps={steps}", run_dir=run_dir, timeout_s=1800)
        assert program.exit_code == 0, program.stdout[-3000:] + program.stderr[-3000:]
        found.append(program)
    yield run_dir, found


def test_engine_learner_and_saved_folder_agree(runs: tuple[Path, list[Program]]) -> None:
    run_dir, programs = runs
    for row in rows(run_dir / "metrics.jsonl"):
        # Above 0, since they round differently: in fp32 it is 1e-6. Bounded as on GPUs.
        assert 1e-4 < row["rollout/logprob_gap"] < BF16_GAP
        assert 1e-4 < row["guard/engine_gap"] < BF16_GAP
    assert json.loads((run_dir / "summary.json").read_text())["guard/saved_gap"] < BF16_GAP
    assert all("Traceback" not in program.stderr for program in programs)


def test_importance_weights_are_on(runs: tuple[Path, list[Program]]) -> None:
    for row in rows(runs[0] / "metrics.jsonl"):
        assert 0 <= row["policy/importance_clipped"] < 0.05  # a quotient beyond 2 is a gap of 0.69 nats
        assert row["policy/skipped_updates"] == row["value/skipped_updates"] == 0
        assert math.isfinite(row["policy/grad_norm"]) and row["policy/grad_norm"] > 0


def test_it_goes_on_from_a_checkpoint(runs: tuple[Path, list[Program]]) -> None:
    run_dir, (_, second) = runs
    assert "resumed from" in second.stdout
    assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert "current_rank_sd" not in second.stdout  # what DeepSpeed prints
    for step in (2, 3):
        masters = [
            tensor
            for file in (run_dir / "checkpoints" / f"step-{step}" / "policy").glob("*optim_states*.safetensors")
            for tensor in load_file(file).values()
            if tensor.is_floating_point() and tensor.numel() > 10_000
        ]
        assert len(masters) >= 3 and all(tensor.dtype == torch.float32 for tensor in masters)  # weights, two moments
