"""DpoRank on real DeepSpeed: the paper's loss by transformers' log-probabilities, whatever the layout or the ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.algorithm.losses import ipo_loss
from rlaif_ray.config.jobs import DpoJob
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.learner.dpo import DpoExample
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.supervised import PairExample
from tests.learner_ranks import RankProcesses, full_weights, plain_logprobs
from tests.tiny import cached_tiny_model

pytestmark = pytest.mark.slow

EPS, STEP = 1e3, 0.02  # AdamW that is all but SGD, as in test_update.py
BETA = 0.3


def dpo_job(**sections: Any) -> DpoJob:
    sgd = {"lr": STEP * EPS, "eps": EPS, "betas": (0.0, 0.0), "grad_clip": 1e9, "tokens_per_micro_batch": 60}
    learner = sgd | sections.pop("learner", {})
    policy = {"model": str(cached_tiny_model(tied=True))} | sections.pop("policy", {})
    dpo = {"beta": BETA} | sections.pop("dpo", {})
    return DpoJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner, "dpo": dpo, **sections})


def random_pairs(count: int, seed: int = 0) -> list[PairExample]:
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 320) for _ in range(draw.randint(least, most)))

    labels = [0.0, 1.0, 0.5, 0.8, 0.3]
    return [PairExample(tokens(2, 9), tokens(1, 12), tokens(1, 12), labels[i % 5]) for i in range(count)]


PAIRS = random_pairs(7)


def plan_of(spec: RankSpec, job: DpoJob, examples: Sequence[Any]) -> Any:
    lengths = [len(e) for e in examples]
    budget = job.learner.tokens_per_micro_batch
    return plan_ranks(range(len(examples)), lengths, ranks=spec.world_size, budget=budget)[spec.rank]


def trained(
    spec: RankSpec, job: DpoJob, pairs: Sequence[PairExample], references: Sequence[tuple[float, float]], steps: int
) -> dict[str, Any]:
    """A few steps over all pairs, with log-probabilities before and after."""
    from rlaif_ray.learner.dpo import DpoRank

    rank = DpoRank(job, spec, "fp32", total_steps=steps)
    before = rank.logprobs(pairs, plan_of(spec, job, pairs))
    examples = [DpoExample(pair, *said) for pair, said in zip(pairs, references, strict=True)]
    sums = [rank.train(examples, plan_of(spec, job, examples)) for _ in range(steps)]
    after = rank.logprobs(pairs, plan_of(spec, job, pairs))
    return {"before": before, "sums": sums, "after": after, "weights": full_weights(rank)}


def plain_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True), dtype=torch.float32)


def totals(model: Any, pairs: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
    """(E,) log-probabilities of whole responses a and b, sequence by sequence."""
    prompts = [pair.prompt for pair in pairs]
    return tuple(  # type: ignore[return-value]
        torch.stack([row.sum() for row in plain_logprobs(model, prompts, responses)])
        for responses in ([p.response_a for p in pairs], [p.response_b for p in pairs])
    )


# References that are not the policy's own, or the first gradient would not depend on them.
REFERENCES = [(-20.0 - i, -25.0 + 2 * i) for i in range(len(PAIRS))]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_loss_and_step_are_those_written_down(one_rank: RankProcesses, loss: str) -> None:
    [found] = one_rank.run(trained, dpo_job(dpo={"loss": loss}), PAIRS, REFERENCES, 1)
    model = plain_model()
    a, b = totals(model, PAIRS)
    for i in range(len(PAIRS)):
        assert found["before"][i] == pytest.approx((a[i].item(), b[i].item()), abs=2e-4)
    p = torch.tensor([pair.p_a for pair in PAIRS])
    ref_a, ref_b = torch.tensor(REFERENCES).T
    h = (a - ref_a) - (b - ref_b)
    if loss == "sigmoid":  # Rafailov et al., equation 7, weighed by the label
        softplus = torch.nn.functional.softplus  # -log sigmoid(x) = softplus(-x)
        expected = p * softplus(-BETA * h) + (1 - p) * softplus(BETA * h)
    else:  # Azar et al., equation 17
        expected = p * (h - 1 / (2 * BETA)) ** 2 + (1 - p) * (h + 1 / (2 * BETA)) ** 2
    assert found["sums"][0]["loss"] == pytest.approx(expected.sum().item(), rel=2e-5)
    expected.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        stepped = parameter.detach() - STEP * EPS * parameter.grad / (parameter.grad.abs() + EPS)
        torch.testing.assert_close(found["weights"][name], stepped, atol=3e-5, rtol=1e-4)


def test_what_is_logged(one_rank: RankProcesses) -> None:
    [found] = one_rank.run(trained, dpo_job(), PAIRS, REFERENCES, 1)
    rewards = [
        (BETA * (a - ra), BETA * (b - rb))
        for (a, b), (ra, rb) in zip([found["before"][i] for i in range(len(PAIRS))], REFERENCES, strict=True)
    ]
    decided = [(r, pair.p_a) for r, pair in zip(rewards, PAIRS, strict=True) if pair.p_a != 0.5]
    sums = found["sums"][0]
    assert sums["decided"] == len(decided)
    assert sums["correct"] == sum((a > b) == (p > 0.5) for (a, b), p in decided)
    assert sums["better"] == pytest.approx(sum(a if p > 0.5 else b for (a, b), p in decided), rel=1e-4)
    assert sums["worse"] == pytest.approx(sum(b if p > 0.5 else a for (a, b), p in decided), rel=1e-4)
    margins = [(a - b) * (2 * pair.p_a - 1) for (a, b), pair in zip(rewards, PAIRS, strict=True)]
    assert sums["margin"] == pytest.approx(sum(margins), rel=1e-4)


def test_swapped_pairs_are_the_same_step(one_rank: RankProcesses) -> None:
    [base] = one_rank.run(trained, dpo_job(), PAIRS, REFERENCES, 1)
    mirrored = [PairExample(p.prompt, p.response_b, p.response_a, 1.0 - p.p_a) for p in PAIRS]
    [other] = one_rank.run(trained, dpo_job(), mirrored, [(b, a) for a, b in REFERENCES], 1)
    for name, weights in base["weights"].items():
        torch.testing.assert_close(other["weights"][name], weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("budget", "attention"), [(1, "packed"), (30, "sdpa"), (10_000, "packed")])
def test_packing_and_batching_change_nothing(one_rank: RankProcesses, budget: int, attention: str) -> None:
    [base] = one_rank.run(trained, dpo_job(), PAIRS, REFERENCES, 1)
    changed = dpo_job(learner={"tokens_per_micro_batch": budget}, policy={"attention": attention})
    [other] = one_rank.run(trained, changed, PAIRS, REFERENCES, 1)
    for name, weights in base["weights"].items():
        torch.testing.assert_close(other["weights"][name], weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_and_shards_change_nothing(one_rank: RankProcesses, two_ranks: RankProcesses, stage: int) -> None:
    [base] = one_rank.run(trained, dpo_job(), PAIRS, REFERENCES, 1)
    parts = two_ranks.run(trained, dpo_job(learner={"ranks": 2, "zero_stage": stage}), PAIRS, REFERENCES, 1)
    for name, weights in base["weights"].items():
        torch.testing.assert_close(parts[0]["weights"][name], weights, atol=1e-5, rtol=1e-5)


def test_soft_labels_are_reached_and_not_passed(one_rank: RankProcesses, tmp_path: Path) -> None:
    """The optimum of the soft loss is h = logit(p) / beta; with hard labels h would grow without end."""
    pairs = [PairExample(p.prompt, p.response_a, p.response_b, 0.8) for p in random_pairs(4, seed=5)]
    adam = {"lr": 2e-3, "eps": 1e-8, "betas": (0.9, 0.99), "grad_clip": 1.0, "tokens_per_micro_batch": 4096}
    job = dpo_job(learner=adam)
    [start] = one_rank.run(trained, job, pairs, [(0.0, 0.0)] * 4, 0)
    references = [start["before"][i] for i in range(4)]
    [found] = one_rank.run(trained, job, pairs, references, 150)
    assert found["sums"][0]["loss"] / 4 == pytest.approx(math.log(2), abs=1e-4)  # policy = reference: h = 0
    for i, (ra, rb) in enumerate(references):
        a, b = found["after"][i]
        assert (a - ra) - (b - rb) == pytest.approx(math.log(0.8 / 0.2) / BETA, abs=0.3)


def test_ipo_by_hand() -> None:
    h, p = torch.tensor([0.0, 5.0, -1.0]), torch.tensor([1.0, 1.0, 0.25])
    # beta 0.1: the margin is 5
    assert ipo_loss(h, p, 0.1).tolist() == pytest.approx([25.0, 0.0, 0.25 * 36 + 0.75 * 16])
    assert ipo_loss(-h, 1 - p, 0.1).tolist() == pytest.approx(ipo_loss(h, p, 0.1).tolist())
