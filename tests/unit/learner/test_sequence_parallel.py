"""Ranks that compute sequences together, on real gloo and DeepSpeed: the numbers and the gradients of one rank.

As in test_update.py an optimizer step is all but SGD, so that weights tell the size of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from rlaif_ray.storage import Place, StoredFolder, open_folder, publish
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
    return ranks[kind](job, spec, "bf16" if job.policy.precision == "bf16" else "fp32", total_steps=4)


# Who computes what


def test_each_rank_is_given_its_groups_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the groups that a run uses, in place of whose actors stand lists."""
    from rlaif_ray.runtime import groups

    monkeypatch.setattr(groups.ray, "put", lambda value: value)
    monkeypatch.setattr(groups.Ranks, "gather", lambda self, verb, refs: refs)
    job = job_of(SftJob, 4, 2)
    group = groups.SftGroup([], job)
    given: list[list[Any]] = [[] for _ in range(4)]

    def actor(rank: int) -> Any:
        return SimpleNamespace(losses=SimpleNamespace(remote=lambda shared, plan: given[rank].append(plan)))

    group.actors = [actor(rank) for rank in range(4)]
    group._planned("losses", TURNS)
    plans = [plan for (plan,) in given]
    assert plans[0] == plans[1] and plans[2] == plans[3]
    told = [i for plan in (plans[0], plans[2]) for micro in plan for i in micro]
    assert sorted(told) == list(range(len(TURNS))) and len(plans[0]) == len(plans[2])

    learner = groups.LearnerGroup([], job_of(TrainJob, 4, 2), "fp32")
    shared = learner._plan(range(len(PROMPTS)), PROMPTS, COMPLETIONS)
    assert shared[0] == shared[1] and shared[2] == shared[3] and len(shared) == 4
    assert sorted(i for k in (0, 2) for micro in shared[k] for i in micro) == list(range(len(PROMPTS)))


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


def test_a_rank_without_any_logits(one_rank: RankProcesses, two_ranks: RankProcesses) -> None:
    """One sample with one completion token: one rank has its logits, and the other helps to compute them."""
    for attention in ("packed", "sdpa"):
        policy = {"attention": attention}
        want = one_rank.run(rl_run, job_of(TrainJob, 1, 1, policy=policy), experience_of(SINGLE), SINGLE)[0]
        job = job_of(TrainJob, 2, 2, stage=2, policy=policy)
        results = two_ranks.run(rl_run, job, experience_of(SINGLE), SINGLE)
        assert results[0]["plan"] == results[1]["plan"] == ((0,),)
        torch.testing.assert_close(results[0]["found"][0], want["found"][0], rtol=0, atol=1e-5)
        assert_same_gradients(results, want)


TURNS = [SftExample(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
PAIRS = [
    PairExample(PROMPTS[i], COMPLETIONS[i], COMPLETIONS[-1 - i], p_a) for i, p_a in enumerate([0.0, 1.0, 0.3, 0.8, 0.5])
]
SUPERVISED: dict[str, tuple[type[Any], list[Any]]] = {
    "sft": (SftJob, TURNS),
    "dpo": (DpoJob, [DpoExample(pair, -30.0, -31.0) for pair in PAIRS]),
    "reward": (RewardModelJob, PAIRS),
}


@pytest.mark.parametrize(
    ("kind", "ranks", "fields"),
    [
        ("sft", 4, {"stage": 3}),
        ("sft", 2, {"stage": 1, "policy": {"attention": "sdpa"}}),
        ("dpo", 2, {"stage": 2, "learner": {"gradient_checkpointing": True}}),
        ("reward", 2, {"stage": 3}),
        ("reward", 4, {"policy": {"attention": "sdpa"}}),
    ],
    ids=["sft-two-groups", "sft-padded", "dpo", "reward", "reward-padded-two-groups"],
)
def test_supervised_jobs_too(
    kind: str,
    ranks: int,
    fields: dict[str, Any],
    one_rank: RankProcesses,
    two_ranks: RankProcesses,
    four_ranks: RankProcesses,
) -> None:
    job, examples = SUPERVISED[kind]
    want = one_rank.run(supervised_run, kind, job_of(job, 1, 1), examples)[0]
    processes = two_ranks if ranks == 2 else four_ranks
    results = processes.run(supervised_run, kind, job_of(job, ranks, 2, **fields), examples)
    said = {i: values for result in results for i, values in result["said"].items()}
    assert sorted(said) == list(range(len(examples)))
    for i, values in said.items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(want["said"][i]), rtol=1e-6, atol=2e-5)
    assert_same_gradients(results, want)
    assert_sums_once(results, want)


@pytest.mark.parametrize(
    ("fields", "off"),
    [
        ({"stage": 1, "policy": {"precision": "bf16"}}, 0.05),  # gloo carries bf16 too
        ({"stage": 2, "sft": {"lora": {"rank": 4}}}, 1e-4),
    ],
    ids=["bf16", "adapters"],
)
def test_in_bf16_with_adapters_and_with_logits_in_chunks(
    fields: dict[str, Any], off: float, one_rank: RankProcesses, two_ranks: RankProcesses
) -> None:
    want = one_rank.run(supervised_run, "sft", job_of(SftJob, 1, 1, **fields), TURNS)[0]
    in_chunks = fields | {"learner": {"logits_chunk": 3}}
    for result in two_ranks.run(supervised_run, "sft", job_of(SftJob, 2, 2, **in_chunks), TURNS):
        for i, values in result["said"].items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(want["said"][i]), rtol=off, atol=off)
        moved = 0
        for name, expected in want["gradients"].items():
            size = float(expected.float().norm())
            assert float((result["gradients"][name] - expected).float().norm()) <= off * size, name
            moved += size > 1e-4
        assert moved > 4


# Checkpoints, and the guard's readings


def saved_after_a_step(spec: RankSpec, job: SftJob, folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """This rank's files of a checkpoint after the first of two steps, and the weights after the second."""
    rank = supervised_rank(spec, "sft", job)
    plan = own_plan(spec, job, range(len(TURNS)), [len(e) for e in TURNS])
    rank.train(TURNS, plan)
    rank.checkpoint.copy({})
    files = rank.checkpoint.write(Place(folder))
    rank.train(TURNS, plan)
    return files, full_weights(rank)


def resumed(spec: RankSpec, job: SftJob, folder: Any) -> dict[str, Tensor]:
    rank = supervised_rank(spec, "sft", job)
    rank.checkpoint.load(folder)
    rank.train(TURNS, own_plan(spec, job, range(len(TURNS)), [len(e) for e in TURNS]))
    return full_weights(rank)


def test_a_run_goes_on_with_ranks_by_themselves(two_ranks: RankProcesses, tmp_path: Path) -> None:
    """No state of an optimizer knows which ranks compute together."""
    adam = {"lr": 1e-2, "eps": 1e-3, "betas": (0.9, 0.99), "gradient_checkpointing": True}
    place = Place(str(tmp_path / ".partial-step-1-x"))
    saved = two_ranks.run(saved_after_a_step, job_of(SftJob, 2, 2, stage=3, learner=adam), place.address)
    files = {name: file for own, _ in saved for name, file in own.items()}
    publish(StoredFolder(place, files), Place(str(tmp_path / "step-1")))
    stored, _ = open_folder(Place(str(tmp_path / "step-1")))
    for together in (2, 1):
        ended = two_ranks.run(resumed, job_of(SftJob, 2, together, stage=3, learner=adam), stored)
        for name, weight in saved[0][1].items():
            torch.testing.assert_close(ended[0][name], weight, rtol=0, atol=0 if together == 2 else 1e-5)


def readings(spec: RankSpec, kind: str, job: Any, text: Text) -> Any:
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, "fp32") if kind == "train" else supervised_rank(spec, kind, job)
    return rank.readings(text)


@pytest.mark.parametrize(
    ("kind", "fields"), [("train", {"stage": 3}), ("reward", {"stage": 2, "policy": {"attention": "sdpa"}})]
)
def test_the_guard_compares_split_rows_with_whole_ones(
    kind: str, fields: dict[str, Any], one_rank: RankProcesses, two_ranks: RankProcesses
) -> None:
    """`together` is computed by all ranks, `alone` by each of them, without any exchange."""
    job = {"train": TrainJob, "reward": RewardModelJob}[kind]
    text = Text(tuple(PROMPTS), tuple(COMPLETIONS))
    want = one_rank.run(readings, kind, job_of(job, 1, 1), text)[0]
    for found in two_ranks.run(readings, kind, job_of(job, 2, 2, **fields), text):
        assert found.packed == ("policy" not in fields)
        assert found.together == pytest.approx(want.alone, abs=2e-5)
        assert found.alone == pytest.approx(want.alone, abs=2e-5)


# Other architectures

LONGER = random_samples([9, 20, 2], [[4, 1, 14], [12], [3]], seed=1)
REFUSED = {  # why
    "gemma2": "to be eager",
    "gpt_oss": "to be eager",
    "bloom": "to be eager",
    "gptj": "to be eager",
    "stablelm": "other attention than its own",
    "nemotron": "ends in",
    "lfm2": "conv layers need whole rows",
    "qwen3_next": "linear_attention layers need whole rows",
    "recurrent_gemma": "recurrent layers need whole rows",
    "granitemoehybrid": "linear_attention layers need whole rows",
    "mamba": "linear_attention layers need whole rows",
    "deepseek_v32": "indexed_attention layers need whole rows",
    "doge": "ends in",
}
SHARED = {
    "llama": "rlaif_packed",
    "qwen2_window": "rlaif_packed",
    "deepseek_v3": "rlaif_packed",
    "gpt2": "rlaif_packed",
    "arcee": "rlaif_packed",
    "llama4_text": "rlaif_padded",
}


def settled(spec: RankSpec, name: str) -> tuple[str, Tensor | None]:
    """The attention, and log-probabilities of other samples than the probe's; or why ranks can't share sequences."""
    from rlaif_ray.attention import PACKED, plan_attention
    from rlaif_ray.errors import InputError
    from rlaif_ray.learner.engine import join_ranks
    from rlaif_ray.learner.modules import CausalPolicy
    from rlaif_ray.learner.packing import ModelInput, build_input, register_packed_attention
    from rlaif_ray.learner.probe import settle_attention, settle_split
    from rlaif_ray.learner.sequence_parallel import sequence_group
    from tests.zoo import zoo_config, zoo_model

    device = join_ranks(spec, 60.0)
    register_packed_attention()
    group = sequence_group(spec.world_size)
    plan = plan_attention("auto", zoo_config(name), name)
    model = zoo_model(name, plan.implementation)
    policy = CausalPolicy(model)

    def run(batch: ModelInput) -> Tensor:
        own = group.split(batch, model)
        return own.whole(policy(own, 1.0)[0])

    how: dict[str, Any] = {"name": name, "device": device, "precision": "fp32"}
    try:
        attention, _ = settle_attention(plan, model, run, **how)
        attention = settle_split(group, attention, plan, model, run, **how)
    except InputError as error:
        return str(error), None
    with torch.no_grad():
        return attention, run(build_input(*LONGER, packed=attention == PACKED, device=device))


@pytest.mark.parametrize("name", [*SHARED, *REFUSED])
def test_other_architectures_are_right_or_refused(name: str, two_ranks: RankProcesses) -> None:
    """Two heads that share one key-value head, windows, latent attention, experts, chunks."""
    from tests.zoo import zoo_model

    for attention, found in two_ranks.run(settled, name):
        if name in REFUSED:
            assert found is None
            assert f"learner.sequence_parallel=2 is wrong for {name}: " in attention and REFUSED[name] in attention
            continue
        assert attention == SHARED[name]
        with torch.no_grad():
            expected = torch.cat(plain_logprobs(zoo_model(name), *LONGER))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def long_rope(spec: RankSpec, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    from rlaif_ray.attention import PACKED
    from rlaif_ray.learner.engine import join_ranks
    from rlaif_ray.learner.modules import CausalPolicy
    from rlaif_ray.learner.packing import build_input, register_packed_attention
    from rlaif_ray.learner.sequence_parallel import sequence_group
    from tests.unit.learner.test_rope_lengths import longrope_model

    device = join_ranks(spec, 60.0)
    register_packed_attention()
    model = longrope_model(PACKED)
    with torch.no_grad():
        batch = build_input([prompt], [completion], packed=True, device=device)
        own = sequence_group(spec.world_size).split(batch, model)
        return own.whole(CausalPolicy(model)(own, 1.0)[0])


@pytest.mark.parametrize("length", [24, 25, 26])
def test_all_ranks_take_the_rope_factors_of_the_whole_sample(length: int, two_ranks: RankProcesses) -> None:
    """Beyond 24 tokens there are other ones, and of 25 positions one rank alone has the last."""
    from tests.unit.learner.test_rope_lengths import longrope_model

    (prompt,), (completion,) = random_samples([6], [[length - 5]], seed=3)  # the last token is not computed
    with torch.no_grad():
        logits = longrope_model("eager")(input_ids=torch.tensor([[*prompt, *completion[:-1]]]), use_cache=False).logits
    expected = torch.log_softmax(logits[0, 5:], -1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    for found in two_ranks.run(long_rope, prompt, completion):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
