"""The learner in bf16 on a GPU, one rank, ZeRO 0, 2 and 3: it learns, and micro-batches don't change what it learns."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import pytest

from tests.gpu.device import DEVICE, PRECISION, free_port, gpu_model
from tests.jobs import embedded
from tests.learner_ranks import random_samples

pytestmark = pytest.mark.gpu

UPDATES = 6
STAGES = [0, 2, 3]
PROMPTS, COMPLETIONS = random_samples([60, 7, 90, 33], [[48, 12], [20, 20], [48, 1], [5, 30]], seed=5)


def train(stage: int, budget: int, checkpointing: bool = False) -> dict[str, Any]:
    """Updates on one batch, in a process of its own: torch.distributed and ZeRO-3 leave traces in a process."""
    import torch

    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.data.batching import plan_ranks
    from rlaif_ray.learner.engine import RankSpec
    from rlaif_ray.learner.ppo import RlRank
    from tests.learner_ranks import make_experience

    job = embedded(
        TrainJob,
        {
            "policy": {"model": gpu_model(), "precision": PRECISION},
            "algorithm": {"type": "ppo", "clip": 10.0, "value_clip": None},
            "learner": {"zero_stage": stage, "lr": 1e-4, "gradient_checkpointing": checkpointing},
        },
    )
    rank = RlRank(job, RankSpec(0, 1, 0, "127.0.0.1", free_port(), DEVICE, threads=2), PRECISION)
    lengths = [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    plan = plan_ranks(range(len(PROMPTS)), lengths, ranks=1, budget=budget)[0]
    found = rank.annotate(PROMPTS, COMPLETIONS, plan, with_policy=True)
    rows = {name: [found[i][name] for i in range(len(PROMPTS))] for name in ("policy", "ref", "values")}
    generator = torch.Generator().manual_seed(0)

    def noise() -> list[torch.Tensor]:
        return [torch.randn(len(c), generator=generator) for c in COMPLETIONS]

    experience = make_experience(
        PROMPTS,
        COMPLETIONS,
        finished=torch.ones(len(PROMPTS), dtype=torch.bool),
        scores=torch.zeros(len(PROMPTS)),
        sampler_logprobs=rows["policy"],
        logprobs=rows["policy"],
        ref_logprobs=rows["ref"],
        values=rows["values"],
        advantages=noise(),
        returns=[1.0 + row for row in noise()],
    )
    count = sum(map(len, COMPLETIONS))
    sums = [rank.update(experience, [(count, plan)]) for _ in range(UPDATES)]
    return {
        "micro_batches": len(plan),
        "policy": torch.cat(rows["policy"]).tolist(),
        "ref": torch.cat(rows["ref"]).tolist(),
        "values": torch.cat(rows["values"]).tolist(),
        "sums": sums,
        "dtypes": sorted({dtype for _, dtype, _ in rank.weights.metadata()}),
        "tokens": count,
    }


@cache
def trained(stage: int, budget: int = 4096, checkpointing: bool = False) -> dict[str, Any]:
    gpu_model()  # here, so that the child need not
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, stage, budget, checkpointing).result(timeout=400)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_fall_and_gradients_are_finite(stage: int) -> None:
    run = trained(stage)
    assert run["dtypes"] == ["bfloat16" if PRECISION == "bf16" else "float32"]
    for sums in run["sums"]:
        assert sums["tokens"] == run["tokens"]
        for name in ("grad_norm", "value_grad_norm"):
            assert math.isfinite(sums[name]) and sums[name] > 0, (name, sums)
    for name in ("policy_loss", "value_loss"):
        losses = [sums[name] / run["tokens"] for sums in run["sums"]]
        assert all(math.isfinite(loss) for loss in losses)
        assert losses[-1] < losses[0] - 0.02, (name, losses)


@pytest.mark.parametrize("stage", STAGES)
def test_policy_starts_as_its_reference(stage: int) -> None:
    run = trained(stage)
    assert max(abs(a - b) for a, b in zip(run["policy"], run["ref"], strict=True)) < 0.02
    assert not any(run["values"])  # the critic starts at 0
    assert run["sums"][0]["first_ratio_error"] < 0.02


@pytest.mark.parametrize("stage", STAGES)
def test_token_budget_changes_nothing_but_rounding(stage: int) -> None:
    whole, split = trained(stage), trained(stage, budget=128)
    assert split["micro_batches"] > whole["micro_batches"]
    gaps = [abs(a - b) for a, b in zip(whole["policy"], split["policy"], strict=True)]
    assert sum(gaps) / len(gaps) < 0.03 and max(gaps) < 0.3
    for name in ("policy_loss", "value_loss", "grad_norm", "value_grad_norm"):
        a, b = whole["sums"][0][name], split["sums"][0][name]
        assert a == pytest.approx(b, rel=0.05, abs=1.0 if name == "policy_loss" else 1e-3), name


def test_stages_agree() -> None:
    for stage in STAGES[1:]:
        for name in ("grad_norm", "value_grad_norm", "value_loss"):
            assert trained(stage)["sums"][0][name] == pytest.approx(trained(0)["sums"][0][name], rel=0.05), (
                stage,
                name,
            )


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = trained(0)["sums"][0], trained(0, checkpointing=True)["sums"][0]
    assert saving["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.05)
    assert saving["value_grad_norm"] == pytest.approx(plain["value_grad_norm"], rel=0.05)
