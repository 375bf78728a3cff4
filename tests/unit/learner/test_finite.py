"""Losses, gradients and weights that are no numbers, on real DeepSpeed: all ZeRO stages and precisions, two ranks."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rlaif_ray.config.jobs import SftJob, TrainJob
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.errors import NotFiniteError
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.finite import Stepped, Tally, finite_weights, require_finite_state, spread
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses, full_weights, make_experience, random_samples
from tests.tiny import cached_tiny_model

TURNS = [SftExample(tuple(range(5 + i, 12 + i)), tuple(range(100 + 3 * i, 109 + 3 * i))) for i in range(4)]
MODES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


# What runs in the learner's processes


def sft_rank(spec: RankSpec, stage: int, precision: Any, **learner: Any) -> Any:
    from rlaif_ray.learner.finetune import SftRank

    learner = {"lr": 1e-2, "zero_stage": stage, "schedule": "linear", "ranks": spec.world_size} | learner
    policy = {"model": str(cached_tiny_model(tied=True))}
    job = SftJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner})
    return SftRank(job, spec, precision, total_steps=10)


def train(rank: Any, spec: RankSpec) -> dict[str, float]:
    plan = plan_ranks(range(len(TURNS)), [len(t) for t in TURNS], ranks=spec.world_size, budget=40)[spec.rank]
    sums: dict[str, float] = rank.train(TURNS, plan)
    return sums


def poisoned(spec: RankSpec, stage: int, precision: str, value: float) -> dict[str, Any]:
    """Four steps; in the second a loss on rank 1 alone is `value`, in the third a gradient is."""
    rank = sft_rank(spec, stage, precision)
    own = rank._losses

    def bad_loss(examples: Any) -> Any:
        losses, sums = own(examples)
        return losses + value, sums

    def bad_gradient(examples: Any) -> Any:
        losses, sums = own(examples)
        losses.register_hook(lambda gradient: gradient * value)
        return losses, sums

    weights, sums = [full_weights(rank)], []
    for losses in (own, bad_loss, bad_gradient, own):
        rank._losses = losses if spec.rank == 1 else own
        sums.append(train(rank, spec))
        weights.append(full_weights(rank))
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(weights)]
    finite = all(bool(tensor.isfinite().all()) for tensor in weights[-1].values())
    return {"moved": moved, "finite": finite, "sums": sums}


def spoiled_weight(spec: RankSpec, stage: int, precision: str) -> list[str]:
    """What is said of a weight that is no number on one rank."""
    from rlaif_ray.learner.finite import require_finite_weights

    rank = sft_rank(spec, stage, precision)
    last = [p for p in rank._model.parameters() if getattr(p, "ds_tensor", p).numel()][-1]
    if spec.rank == 1:
        with torch.no_grad():
            getattr(last, "ds_tensor", last).view(-1)[0] = math.nan
    said = []
    for attempt in (
        lambda: require_finite_weights({"model": rank._model}, "now"),
        lambda: rank.checkpoint.copy(),
    ):
        try:
            attempt()
        except NotFiniteError as error:
            said.append(str(error))
    return said


def padded_weight(spec: RankSpec) -> list[bool]:
    """Of nine weights each of two ranks has five: whether they are finite with NaN after rank 1's four, and in them."""
    import deepspeed

    from rlaif_ray.learner.engine import join_ranks

    join_ranks(spec, 60)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        weight = torch.nn.Linear(3, 3, bias=False).weight
    found = []
    assert weight.ds_tensor.numel() == 5
    for place in (4, 3):
        if spec.rank == 1:
            weight.ds_tensor.data[place] = math.nan
        found.append(finite_weights([weight]))
    with deepspeed.zero.GatheredParameters([weight]):
        assert int(weight.isnan().sum()) == 1  # the padding is no part of it
    return found


def rl_update(spec: RankSpec, spoil: str) -> Any:
    """An update whose advantages, values or learning rate are of no use."""
    from rlaif_ray.learner.ppo import RlRank
    from rlaif_ray.pipelines.experience import add_advantages

    lr = 1e38 if spoil == "lr" else 1e-2
    policy = {"model": str(cached_tiny_model(tied=True))}
    job = embedded(TrainJob, {"policy": policy, "learner": {"lr": lr, "ranks": spec.world_size}})
    rank = RlRank(job, spec, "fp32")
    prompts, completions = random_samples([4, 13], [[5, 9], [14, 3]])
    logprobs = [torch.full((len(c),), -5.0) for c in completions]
    experience = make_experience(
        prompts,
        completions,
        finished=torch.ones(4, dtype=torch.bool),
        scores=torch.tensor([0.5, -0.5, 0.2, 0.9]),
        sampler_logprobs=logprobs,
        logprobs=logprobs,
        ref_logprobs=logprobs,
        values=[torch.zeros(len(c)) for c in completions],
    )
    experience = add_advantages(experience, job.algorithm, 0.1)
    if spoil == "advantages":
        experience.advantages[0, 0] = math.nan  # type: ignore[index]
    before = full_weights(rank)
    lengths = [len(p) + int(n) for p, n in zip(experience.prompt_tokens, experience.mask.sum(1), strict=True)]
    plan = plan_ranks(range(len(lengths)), lengths, ranks=spec.world_size, budget=40)[spec.rank]
    schedule = [(int(experience.mask.sum()), plan)] * 2
    try:
        sums = rank.update(experience, schedule)
    except NotFiniteError as error:
        return str(error)
    after = full_weights(rank)
    return sums, any(not torch.equal(before[k], after[k]) for k in before)


def whole_run(spec: RankSpec, folder: Path, lr: float, nonfinite: str) -> dict[str, Any]:
    """The loop of `rlaif sft` with its checkpoints and rows, without Ray between it and this rank."""
    from rlaif_ray.pipelines.checkpoint import RunState, open_checkpoints
    from rlaif_ray.pipelines.guard import Guard
    from rlaif_ray.pipelines.restarts import with_restarts
    from rlaif_ray.pipelines.supervised import SupervisedRun
    from rlaif_ray.runtime.groups import SftGroup
    from rlaif_ray.tracking import open_tracker

    class Alone(SftGroup):
        def __init__(self, rank: Any, job: SftJob) -> None:
            self._rank, self._job = rank, job

        def _planned(self, verb: str, examples: Any) -> list[Any]:
            plan = plan_ranks(range(len(examples)), [len(e) for e in examples], ranks=1, budget=40)[0]
            return [getattr(self._rank, verb)(examples, plan)]

        def save_checkpoint(self, place: Any) -> Any:
            self._rank.checkpoint.copy({})
            return lambda: self._rank.checkpoint.write(place)

    rank = sft_rank(spec, 0, "fp32", lr=lr, schedule="constant", nonfinite=nonfinite)
    sections = {"checkpoint": {"every": 1, "keep": 20}, "tracking": {"wandb": "disabled"}}
    job = SftJob.model_validate(rank._job.model_dump() | sections)
    checkpoints = open_checkpoints(job, folder)
    said = None
    with (
        open_tracker(folder, config={}, tracking=job.tracking, total_steps=9, name="run") as track,
        checkpoints,
    ):
        learner = Alone(rank, job)
        guard = Guard(job, learner, "fp32", 64)
        start = (RunState(), None, 9, lambda: False)
        run = SupervisedRun(job, folder, track, learner, *start, checkpoints, guard, {})
        try:
            with_restarts(
                lambda found: run.train(TURNS, dict), None, job=job, cluster=None, checkpoints=checkpoints, track=track
            )  # type: ignore[arg-type]
        except NotFiniteError as error:
            said = str(error)
    return {"said": said, "steps": track.last_step, "finite": finite_weights(rank._model.parameters())}


# Tests


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_no_step_is_taken_from_what_is_no_number(stage: int, precision: str, two_ranks: RankProcesses) -> None:
    for result in two_ranks.run(poisoned, stage, precision, math.inf if stage % 2 else math.nan):
        assert result["moved"] == [True, False, False, True] and result["finite"]
        assert [(s["skipped"], s["in_row"]) for s in result["sums"]] == [(0, 0), (1, 1), (1, 2), (0, 0)]
        assert [math.isfinite(s["grad_norm"]) for s in result["sums"]] == [True, False, False, True]
        rates = [s["lr"] for s in result["sums"]]  # a step that was not taken moves no schedule on
        assert rates[1] == rates[2] == rates[3] < rates[0]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_all_ranks_agree_on_a_weight_that_is_no_number(stage: int, precision: str, two_ranks: RankProcesses) -> None:
    for said in two_ranks.run(spoiled_weight, stage, precision):
        assert said == [
            "the model's weights are not finite (NaN or infinite) now",
            "the model's weights are not finite (NaN or infinite) so no checkpoint is written",
        ]


@pytest.mark.slow
def test_what_pads_a_shard_is_no_weight(two_ranks: RankProcesses) -> None:
    assert two_ranks.run(padded_weight) == [[True, False]] * 2


@pytest.mark.slow
def test_an_rl_update(two_ranks: RankProcesses) -> None:
    for sums, moved in two_ranks.run(rl_update, "advantages"):
        assert (sums["skipped"], sums["in_row"], sums["value_skipped"], moved) == (2, 2, 0, False)
    for said in two_ranks.run(rl_update, "lr"):
        assert "weights are not finite" in said or said[0]["skipped"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "nonfinite"), [(1e30, "stop"), (1e30, "skip"), (3e38, "skip")])
def test_a_whole_run_of_a_hopeless_learning_rate(
    tmp_path: Path, lr: float, nonfinite: str, one_rank: RankProcesses
) -> None:
    """It ends within a few steps, and every row and checkpoint that is there is of numbers."""
    (found,) = one_rank.run(whole_run, tmp_path, lr, nonfinite)
    assert f"training stopped after step {found['steps']}: " in found["said"] and found["steps"] < 5
    assert f"learner.lr={lr:g} is too high" in found["said"] and "Nothing of it was saved" in found["said"]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(kept) <= len(steps) == found["steps"]
    for name in kept:
        (weights,) = (tmp_path / "checkpoints" / name).glob("**/*model_states.safetensors")
        with safe_open(weights, "pt") as file:
            assert all(file.get_tensor(k).isfinite().all() for k in file.keys())  # noqa: SIM118


def test_a_loss_that_is_no_number_has_no_finite_gradient() -> None:
    weights = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(spread(weights.sum() + math.inf), weights)[0].isnan().all()
    assert torch.equal(torch.autograd.grad(spread(weights.square().sum()), weights)[0], 2 * weights)


def test_the_tally_counts_over_updates() -> None:
    tally = Tally()
    good, bad = Stepped(2.0, True), Stepped(math.inf, False)
    assert tally.sums([good, bad]) == {"grad_norm": 2.0, "skipped": 1.0, "in_row": 1.0}
    found = tally.sums([bad, good, bad])
    assert found == {"grad_norm": 2.0, "skipped": 2.0, "in_row": 2.0}
    assert math.isnan(tally.sums([bad])["grad_norm"]) and tally.sums([bad])["in_row"] == 3.0


def test_finite_weights() -> None:
    assert finite_weights([torch.zeros(2), torch.zeros(0), torch.tensor([1, 2]), torch.full((2,), 3e38)])
    for value in (math.nan, math.inf, -math.inf):
        assert not finite_weights([torch.zeros(2), torch.tensor([0.0, value]).bfloat16()])


def test_what_is_no_number_is_not_saved() -> None:
    require_finite_state({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(NotFiniteError, match=r"1 of 2 weights to save are not finite.*the first b"):
        require_finite_state({"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])})
