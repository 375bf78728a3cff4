"""SftRank on real DeepSpeed: transformers' own loss with masked labels, whatever the layout, order or ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.jobs import SftJob
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from tests.learner_ranks import RankProcesses, full_weights
from tests.tiny import cached_tiny_model
from tests.zoo import zoo_model

pytestmark = pytest.mark.slow

EPS, STEP = 1e3, 0.02  # AdamW that is all but SGD, as in test_update.py


def sft_job(**sections: Any) -> SftJob:
    sgd = {"lr": STEP * EPS, "eps": EPS, "betas": (0.0, 0.0), "grad_clip": 1e9, "tokens_per_micro_batch": 40}
    learner = sgd | sections.pop("learner", {})
    policy = {"model": str(cached_tiny_model(tied=True))} | sections.pop("policy", {})
    return SftJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner, **sections})


def random_turns(count: int, seed: int = 0) -> list[SftExample]:
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 320) for _ in range(draw.randint(least, most)))

    return [SftExample(tokens(2, 12), tokens(1, 15)) for _ in range(count)]


TURNS = random_turns(7)


def plan_of(spec: RankSpec, job: SftJob, examples: Sequence[SftExample]) -> Any:
    lengths = [len(e) for e in examples]
    budget = job.learner.tokens_per_micro_batch
    return plan_ranks(range(len(examples)), lengths, ranks=spec.world_size, budget=budget)[spec.rank]


def steps(spec: RankSpec, job: SftJob, batches: Sequence[Sequence[SftExample]], folder: str | None = None) -> Any:
    from rlaif_ray.learner.finetune import SftRank

    rank = SftRank(job, spec, "fp32", total_steps=len(batches))
    before = rank.losses(TURNS, plan_of(spec, job, TURNS))
    sums = [rank.train(batch, plan_of(spec, job, batch)) for batch in batches]
    if folder is not None:
        rank.save_model(folder)
    return {"before": before, "sums": sums, "weights": full_weights(rank)}


def hand_loss(model: Any, examples: Sequence[SftExample]) -> torch.Tensor:
    """transformers' own loss of one padded batch, labels masked outside the responses."""
    width = max(len(e) for e in examples)
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    mask = torch.zeros_like(tokens)
    for i, e in enumerate(examples):
        tokens[i, : len(e)] = torch.tensor([*e.prompt, *e.response])
        labels[i, len(e.prompt) : len(e)] = torch.tensor(e.response)
        mask[i, : len(e)] = 1
    loss: torch.Tensor = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    return loss


def test_loss_and_step_are_those_of_transformers(one_rank: RankProcesses) -> None:
    from transformers import AutoModelForCausalLM

    [found] = one_rank.run(steps, sft_job(), [TURNS])
    model = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True), dtype=torch.float32)
    loss = hand_loss(model, TURNS)
    count = sum(len(e.response) for e in TURNS)
    assert found["sums"][0]["tokens"] == count
    assert found["sums"][0]["loss"] / count == pytest.approx(loss.item(), abs=1e-6, rel=1e-6)
    assert sum(found["before"].values()) / count == pytest.approx(loss.item(), abs=1e-6, rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - STEP * EPS * parameter.grad / (parameter.grad.abs() + EPS)
        torch.testing.assert_close(found["weights"][name], expected, atol=2e-6, rtol=1e-5)


def settled(spec: RankSpec, job: SftJob) -> Any:
    from rlaif_ray.learner.finetune import SftRank

    rank = SftRank(job, spec, "fp32", total_steps=2)
    sums = rank.train(TURNS, plan_of(spec, job, TURNS))  # after the probe, which takes no part in training
    return rank._packed, rank.notes, sums, rank.losses(TURNS, plan_of(spec, job, TURNS))


@pytest.mark.parametrize(
    ("name", "packed"),
    [("arcee", True), ("lfm2", False)],  # nobody tried it: probed; of layers that carry a state
)
def test_the_layout_of_other_architectures_is_found_out_sharded_too(
    one_rank: RankProcesses, two_ranks: RankProcesses, tmp_path: Path, name: str, packed: bool
) -> None:
    plain = zoo_model(name)
    plain.save_pretrained(tmp_path)
    policy = {"model": str(tmp_path)}
    loss = hand_loss(plain, TURNS).item() * sum(len(e.response) for e in TURNS)
    [alone] = one_rank.run(settled, sft_job(policy=policy))
    shared = two_ranks.run(settled, sft_job(policy=policy, learner={"zero_stage": 3}))
    after = {}
    for found in (alone, *shared):
        assert found[0] == packed
        assert [str(tmp_path) in note and "conv layers" in note for note in found[1]] == ([] if packed else [True])
    assert alone[2]["loss"] == pytest.approx(loss, rel=1e-5)
    assert sum(found[2]["loss"] for found in shared) == pytest.approx(loss, rel=1e-5)
    for found in shared:
        after |= found[3]
    assert after == pytest.approx(alone[3], rel=1e-4)


@pytest.mark.parametrize("budget", [1, 30, 10_000])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_packing_batching_and_order_change_nothing(one_rank: RankProcesses, budget: int, attention: str) -> None:
    [base] = one_rank.run(steps, sft_job(), [TURNS])
    changed = sft_job(learner={"tokens_per_micro_batch": budget}, policy={"attention": attention})
    [other] = one_rank.run(steps, changed, [TURNS[::-1]])
    for name, weights in base["weights"].items():
        torch.testing.assert_close(other["weights"][name], weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_and_shards_change_nothing(one_rank: RankProcesses, two_ranks: RankProcesses, stage: int) -> None:
    [base] = one_rank.run(steps, sft_job(), [TURNS])
    parts = two_ranks.run(steps, sft_job(learner={"ranks": 2, "zero_stage": stage}), [TURNS])
    for name, weights in base["weights"].items():
        torch.testing.assert_close(parts[0]["weights"][name], weights, atol=1e-5, rtol=1e-5)


def test_a_model_learns_32_records_by_heart(one_rank: RankProcesses, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    records = random_turns(32, seed=3)
    adam = {"lr": 3e-3, "eps": 1e-8, "betas": (0.9, 0.99), "grad_clip": 1.0, "tokens_per_micro_batch": 4096}
    policy = {"model": str(cached_tiny_model(tied=True, spread=0.04))}
    [found] = one_rank.run(steps, sft_job(learner=adam, policy=policy), [records] * 300, str(tmp_path))
    first, last = (s["loss"] / s["tokens"] for s in (found["sums"][0], found["sums"][-1]))
    print(f"loss {first:.3f} -> {last:.5f}")
    assert first > 5 and last < 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path)  # and what is saved says it by heart
    with torch.no_grad():
        assert hand_loss(model, records).item() == pytest.approx(last, abs=0.02)
