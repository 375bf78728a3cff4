"""Ranks that compute sequences together, on real gloo and DeepSpeed: the numbers and the gradients of one rank.

As in test_update.py an optimizer step is all but SGD, so that weights tell the size of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlaif_ray.config.jobs import DpoJob, RewardModelJob, SftJob, TrainJob
from rlaif_ray.data.batching import plan_ranks, plans_of_ranks
from rlaif_ray.learner.dpo import DpoExample
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.probe import Text
from rlaif_ray.learner.supervised import PairExample
from rlaif_ray.storage import Place, open_folder, publish
from rlaif_ray.types import Experience
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses, full_weights, make_experience, plain_logprobs, random_samples
from tests.tiny import cached_tiny_model

pytestmark = pytest.mark.slow

EPS = 1e4
# Two samples share each of two prompts; the last one has one completion token, of which one rank alone has the logits.
PROMPTS, COMPLETIONS = random_samples([5, 14, 7, 3], [[6, 1, 9], [15, 3], [2, 8], [1]], seed=4)
SINGLE = random_samples([2], [[1]], seed=5)
TEMPERATURE = 0.8
GROUPS = [(2, 2), (4, 2), (4, 4)]  # ranks, and how many compute together; four of them share two key-value heads


def model_folder() -> Path:
    return cached_tiny_model(tied=True, heads=4, kv_heads=2)


def job_of(kind: type[Any], ranks: int, together: int, *, stage: int = 0, budget: int = 40, **sections: Any) -> Any:
    sgd = {"lr": EPS, "eps": EPS, "betas": (0.0, 0.0), "grad_clip": 1e9, "tokens_per_micro_batch": budget}
    learner = sgd | {"ranks": ranks, "sequence_parallel": together, "zero_stage": stage} | sections.pop("learner", {})
    if stage == 3:  # without it DeepSpeed keeps all of so small a model whole
        learner["deepspeed_overrides"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    policy = {"model": str(model_folder())} | sections.pop("policy", {})
    values = {"policy": policy, "learner": learner, **sections}
    if kind is TrainJob:
        return embedded(kind, {"sampling": {"temperature": TEMPERATURE}, "algorithm": {"type": "ppo"}} | values)
    return kind.model_validate({"data": {"path": "x"}} | values)


def own_plan(spec: RankSpec, job: Any, indices: Sequence[int], lengths: Sequence[int]) -> Any:
    """As runtime/groups.py plans it."""
    learner = job.learner
    plans = plan_ranks(indices, lengths, ranks=learner.groups, budget=learner.tokens_per_micro_batch)
    return plans_of_ranks(plans, learner.sequence_parallel)[spec.rank]


# What runs in the learner's processes


def exchanged(spec: RankSpec, size: int, heads: int, keys: int, length: int) -> dict[str, Any]:
    """Queries, keys and values of whole rows there and back, with gradients; every rank makes the same ones."""
    from rlaif_ray.learner.engine import join_ranks
    from rlaif_ray.learner.packing import ModelInput
    from rlaif_ray.learner.sequence_parallel import PADDED, sequence_group

    join_ranks(spec, 60.0)
    group = sequence_group(size)
    tokens = torch.arange(2 * length).view(2, length)
    rows, columns = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, length - 1, 0, 2, 4])
    batch = ModelInput(tokens, tokens % length, torch.ones(2, length), {}, rows, columns, torch.arange(5))
    model: Any = torch.nn.Module()
    model.config = type("Config", (), {"_attn_implementation": PADDED})
    own = group.split(batch, model)
    assert own.part is not None
    torch.manual_seed(1)
    whole = [torch.randn(2, count, length, width) for count, width in ((heads, 3), (keys, 3), (keys, 5))]
    parts = [w[:, :, group.rank :: size] for w in whole]
    fill = own.tokens.shape[1] - torch.tensor([p.shape[2] for p in parts])
    leaves = [torch.nn.functional.pad(p, (0, 0, 0, int(f))).requires_grad_() for p, f in zip(parts, fill, strict=True)]
    found = own.part.to_heads(*leaves)
    back = own.part.to_tokens(found[0].transpose(1, 2))
    gathered = own.whole(own.targets.float())
    (sum((f * (k + 1)).sum() for k, f in enumerate(found)) + (back * 10).sum()).backward()
    return {
        "batch": replace(own, part=None),
        "rank": group.rank,
        "whole": whole,
        "found": [f.detach() for f in found],
        "leaves": [leaf.detach() for leaf in leaves],
        "back": back.detach(),
        "gathered": gathered,
        "gradients": [leaf.grad for leaf in leaves],
    }


def rl_run(spec: RankSpec, job: TrainJob, experience: Experience, samples: Any) -> dict[str, Any]:
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, "fp32")
    prompts, completions = samples
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    everything = own_plan(spec, job, range(len(prompts)), lengths)
    before = full_weights(rank)
    tokens = sum(map(len, completions))
    found = rank.annotate(prompts, completions, everything, with_policy=True)
    first = rank.update(experience, [(tokens, everything)])
    moved = full_weights(rank)
    # The critic's head, which started at zero, gives its body gradients from the second step on.
    second = rank.update(experience, [(tokens, everything)])
    values = rank.annotate(prompts, completions, everything, with_policy=False)
    return {
        "plan": everything,
        "found": found,
        "sums": [first, second],
        "gradients": {name: before[name] - weight for name, weight in moved.items()},
        "weights": full_weights(rank),
        "values": {i: own["values"] for i, own in values.items()},
    }


def supervised_run(spec: RankSpec, kind: str, job: Any, examples: Sequence[Any]) -> dict[str, Any]:
    rank = supervised_rank(spec, kind, job)
    before = full_weights(rank)
    plan = own_plan(spec, job, range(len(examples)), [len(e) for e in examples])
    asked = {"sft": "losses", "dpo": "logprobs", "reward": "rewards"}[kind]
    given = [e.pair for e in examples] if kind == "dpo" else examples
    said = getattr(rank, asked)(given, plan)
    sums = rank.train(examples, plan)
    after = full_weights(rank)
    gradients = {name: before[name] - weight for name, weight in after.items()}
    return {"said": said, "sums": [sums], "gradients": gradients}


def supervised_rank(spec: RankSpec, kind: str, job: Any) -> Any:
    from rlaif_ray.learner.dpo import DpoRank
    from rlaif_ray.learner.finetune import SftRank
    from rlaif_ray.learner.supervised import RewardRank

    ranks: dict[str, Any] = {"sft": SftRank, "dpo": DpoRank, "reward": RewardRank}
    return ranks[kind](job, spec, "fp32", total_steps=4)


# The exchange


@pytest.mark.parametrize(("size", "heads", "keys"), [(2, 4, 2), (2, 4, 4), (4, 4, 2), (4, 8, 1)])
@pytest.mark.parametrize("length", [5, 8])
def test_ranks_swap_tokens_for_heads(
    size: int, heads: int, keys: int, length: int, two_ranks: RankProcesses, four_ranks: RankProcesses
) -> None:
    ranks = two_ranks if size == 2 else four_ranks
    for found in ranks.run(exchanged, size, heads, keys, length):
        rank, batch = found["rank"], found["batch"]
        share = heads // size
        mine = slice(rank * share, (rank + 1) * share)
        queries, key, value = found["whole"]
        torch.testing.assert_close(found["found"][0], queries[:, mine], rtol=0, atol=0)
        group = heads // keys  # each query's key-value head is its own, whether repeated or not
        for ours, all_heads in zip(found["found"][1:], (key, value), strict=True):
            per_query = ours.repeat_interleave(share // ours.shape[1], 1)
            torch.testing.assert_close(per_query, all_heads.repeat_interleave(group, 1)[:, mine], rtol=0, atol=0)
        torch.testing.assert_close(found["back"].transpose(1, 2), found["leaves"][0], rtol=0, atol=0)

        count = len(range(rank, length, size))  # its tokens; what fills up gets no gradient
        expected = [1.0 + 10.0, 2.0 * max(1, size // keys), 3.0 * max(1, size // keys)]
        for gradient, each in zip(found["gradients"], expected, strict=True):
            assert torch.equal(gradient[:, :, :count], torch.full_like(gradient[:, :, :count], each))
            assert not gradient[:, :, count:].any()

        assert batch.tokens[:, :count].tolist() == [
            [*range(rank, length, size)],
            [*range(length + rank, 2 * length, size)],
        ]
        assert (batch.positions[:, count:] == length - 1).all() and batch.tokens.shape[1] > count
        assert batch.attention_mask.shape == (2, length)
        columns = [2, length - 1, 0, 2, 4]
        assert batch.targets.tolist() == [k for k, c in enumerate(columns) if c % size == rank]
        assert batch.columns.tolist() == [c // size for c in columns if c % size == rank]
        assert found["gathered"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


# The learner


def experience_of(samples: Any) -> Experience:
    prompts, completions = samples
    generator = torch.Generator().manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager")
    with torch.no_grad():
        own = plain_logprobs(model, prompts, completions, TEMPERATURE)

    def near(scale: float) -> list[Tensor]:
        return [lp + scale * torch.randn(lp.shape, generator=generator) for lp in own]

    noise = [torch.randn(lp.shape, generator=generator) for lp in own]
    return make_experience(
        prompts,
        completions,
        finished=torch.ones(len(own), dtype=torch.bool),
        scores=torch.zeros(len(own)),
        logprobs=near(0.2),
        sampler_logprobs=near(0.3),
        ref_logprobs=near(0.5),
        values=[0.1 * n for n in noise],
        advantages=[n.flip(0) for n in noise],
        returns=[1.0 + n for n in noise],
    )


def assert_sums_once(results: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """All ranks' sums together are one rank's; what is of all ranks is the same on each."""
    for step, expected in enumerate(want["sums"]):
        for name, value in expected.items():
            own = [result["sums"][step].get(name, 0.0) for result in results]
            if name.endswith(("grad_norm", "lr", "skipped", "in_row")):
                assert own == pytest.approx([value] * len(own), rel=1e-5), name
            elif name == "first_ratio_error":
                assert max(own) == pytest.approx(value, rel=1e-4), name
            else:
                assert sum(own) == pytest.approx(value, rel=1e-5, abs=1e-5), name


def assert_same_gradients(results: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """To 1e-5 of each tensor's largest."""
    for result in results:
        assert result["gradients"].keys() == want["gradients"].keys()
        for name, expected in want["gradients"].items():
            largest = expected.abs().max()
            assert largest > 1e-4, f"{name} has no gradient: nothing is compared"
            off = (result["gradients"][name] - expected).abs().max() / largest
            assert off < 1e-5 + 1e-7 / largest, f"{name}: off by {off:.1e} of its largest, {largest:.1e}"


@pytest.fixture(scope="module")
def single(one_rank: RankProcesses) -> dict[str, Any]:
    """One rank: what all others must equal."""
    samples = PROMPTS, COMPLETIONS
    found: dict[str, Any] = one_rank.run(rl_run, job_of(TrainJob, 1, 1), experience_of(samples), samples)[0]
    return found


@pytest.mark.parametrize(
    ("ranks", "together", "fields"),
    [
        (2, 2, {"stage": 0}),
        (2, 2, {"stage": 0, "policy": {"attention": "sdpa"}}),
        (2, 2, {"stage": 1, "budget": 4096}),
        (2, 2, {"stage": 2, "learner": {"gradient_checkpointing": True}}),
        (2, 2, {"stage": 3, "policy": {"attention": "sdpa"}, "learner": {"gradient_checkpointing": True}}),
        (4, 2, {"stage": 3, "learner": {"gradient_checkpointing": True}}),
        (4, 4, {"stage": 2}),
    ],
    ids=["packed", "padded", "zero-1", "zero-2-checkpointed", "padded-zero-3", "two-groups-zero-3", "four"],
)
def test_ranks_together_equal_one(
    ranks: int,
    together: int,
    fields: dict[str, Any],
    single: dict[str, Any],
    two_ranks: RankProcesses,
    four_ranks: RankProcesses,
) -> None:
    samples = PROMPTS, COMPLETIONS
    processes = two_ranks if ranks == 2 else four_ranks
    job = job_of(TrainJob, ranks, together, **fields)
    results = processes.run(rl_run, job, experience_of(samples), samples)

    found: dict[int, Any] = {}
    for rank, result in enumerate(results):
        assert bool(result["found"]) == (rank % together == 0), "a group's numbers are told once"
        found |= result["found"]
    assert sorted(found) == list(range(len(COMPLETIONS)))
    model = AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager")
    with torch.no_grad():
        plain = plain_logprobs(model, *samples, TEMPERATURE)
    for i, expected in enumerate(plain):
        for name in ("policy", "ref"):
            torch.testing.assert_close(found[i][name], expected, rtol=0, atol=1e-5)

    assert_same_gradients(results, single)
    assert_sums_once(results, single)
    values = {i: v for result in results for i, v in result["values"].items()}
    for i, expected in single["values"].items():
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(values[i], expected, rtol=1e-4, atol=1e-4)
