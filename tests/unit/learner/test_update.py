"""RlRank on real DeepSpeed: the gradient is the one written down, whatever the layout, the order or the ranks.

Weights are compared after optimizer steps that are all but SGD: AdamW without memory (betas 0) and with a huge eps
moves a weight by lr * g / (|g| + eps), so that a gradient of the wrong size shows, which Adam itself would hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.learner.engine import RankSpec, learning_rate_factor
from rlaif_ray.pipelines.experience import add_advantages
from rlaif_ray.types import Experience
from tests.jobs import embedded
from tests.learner_ranks import (
    RankProcesses,
    full_weights,
    make_experience,
    plain_hidden,
    plain_logprobs,
    random_samples,
    rectangle,
    rows_of,
)
from tests.tiny import cached_tiny_model

pytestmark = pytest.mark.slow

EPS, STEP = 1e3, 0.02  # AdamW's eps; how far a gradient of 1 moves a weight
TEMPERATURE = 0.8
KL_COEF = 0.3
PROMPTS, COMPLETIONS = random_samples([4, 13, 7], [[5, 1, 9], [14, 3], [2, 7]])
PARTS = [[0, 3, 4, 6], [1, 2, 5]]  # two minibatches: in the second the weights have moved
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"type": "ppo"},
    "ppo_plain": {"type": "ppo", "value_clip": None, "whiten_advantages": False, "lam": 0.5, "gamma": 0.9},
    "reinforce": {"type": "reinforce"},
    "rloo": {"type": "rloo"},
    "grpo": {"type": "grpo"},
    "grpo_unscaled_k2": {"type": "grpo", "scale_by_std": False, "kl": {"estimator": "k2"}},
    "ppo_importance": {"type": "ppo", "importance": {"when": "always", "low": 0.7, "high": 1.3}},
}
NOISES = {"old": 0.3, "ref": 0.5, "sampler": 0.6}  # so that ratios, KL and importance weights are all at work


def tiny_job(algorithm: dict[str, Any], *, learner: dict[str, Any] | None = None, **sections: Any) -> TrainJob:
    sgd = {"lr": STEP * EPS, "eps": EPS, "betas": (0.0, 0.0), "grad_clip": 1e9, "tokens_per_micro_batch": 40}
    policy = {"model": str(cached_tiny_model(tied=True))} | sections.pop("policy", {})
    sampling = {"temperature": TEMPERATURE, "samples_per_prompt": 2}
    return embedded(
        TrainJob,
        {"policy": policy, "sampling": sampling, "algorithm": algorithm, "learner": sgd | (learner or {}), **sections},
    )


# What runs in the learner's processes


def train(spec: RankSpec, job: TrainJob, experience: Experience, parts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One update with these minibatches; the weights, the critic's values and the metrics after it."""
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, "fp32")
    completions = rows(experience)
    lengths = [len(p) + len(c) for p, c in zip(experience.prompt_tokens, completions, strict=True)]
    plans = [
        plan_ranks(part, lengths, ranks=spec.world_size, budget=job.learner.tokens_per_micro_batch) for part in parts
    ]
    tokens = [sum(len(completions[i]) for i in part) for part in parts]
    schedule = [(count, plan[spec.rank]) for count, plan in zip(tokens, plans, strict=True)]
    sums = rank.update(experience, schedule)
    shares = plan_ranks(range(len(experience)), lengths, ranks=spec.world_size, budget=10_000)
    found = rank.annotate(experience.prompt_tokens, completions, shares[spec.rank], with_policy=False)
    sharded = [p.data.numel() for p in rank._model.parameters()]
    return {"weights": full_weights(rank), "found": found, "sums": sums, "plans": plans, "elements": sharded}


def annotate(spec: RankSpec, job: TrainJob) -> list[dict[str, Tensor]]:
    from rlaif_ray.learner.ppo import RlRank

    plan = ((0, 3), (1, 2, 4), (5, 6))
    found = RlRank(job, spec, "fp32").annotate(PROMPTS, COMPLETIONS, plan, with_policy=True)
    return [found[i] for i in range(len(PROMPTS))]


def learning_rates(spec: RankSpec, job: TrainJob, experience: Experience, steps: int) -> list[float]:
    """The rate that each of `steps` updates reports."""
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, "fp32")
    everything = tuple(range(len(experience)))
    tokens = int(experience.mask.sum())
    return [rank.update(experience, [(tokens, (everything,))])["lr"] for _ in range(steps)]


def rows(experience: Experience) -> list[list[int]]:
    return [experience.tokens[i, : int(n)].tolist() for i, n in enumerate(experience.mask.sum(1))]


# The same by hand


@cache
def start_logprobs() -> tuple[Tensor, ...]:
    """Of the untrained model, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True), attn_implementation="eager")
    with torch.no_grad():
        return tuple(plain_logprobs(model, PROMPTS, COMPLETIONS, TEMPERATURE))


def noisy_experience(algorithm: Any) -> Experience:
    """Log-probabilities near the model's own, values anywhere, some completions unfinished; advantages by the
    pipeline."""
    generator = torch.Generator().manual_seed(5)

    def near(scale: float) -> list[Tensor]:
        return [lp + scale * torch.randn(lp.shape, generator=generator) for lp in start_logprobs()]

    columns = {"logprobs": near(NOISES["old"]), "ref_logprobs": near(NOISES["ref"])}
    columns["sampler_logprobs"] = near(NOISES["sampler"])
    values = [0.4 * torch.randn(lp.shape, generator=generator) for lp in start_logprobs()]
    with_critic = algorithm.type in ("ppo", "reinforce")
    experience = make_experience(
        PROMPTS,
        COMPLETIONS,
        finished=torch.tensor([True, False, True, True, True, False, True]),
        scores=torch.tensor([0.5, -1.0, 0.25, 1.0, -0.5, 0.0, 0.75]),
        values=values if with_critic else None,
        **columns,
    )
    return add_advantages(experience, algorithm, KL_COEF)


def advantages_by_hand(algorithm: Any, e: Experience) -> tuple[list[list[float]], list[list[float]]]:
    """(advantages, returns) of each token, in plain Python."""
    completions = rows(e)
    old, ref = rows_of(e.logprobs, completions), rows_of(e.ref_logprobs, completions)  # type: ignore[arg-type]
    scores = [float(s) - (0.0 if done else 1.0) for s, done in zip(e.scores, e.finished, strict=True)]
    count = range(len(completions))
    siblings = [[j for j in count if e.groups[j] == e.groups[i]] for i in count]
    if algorithm.type == "grpo":
        advantages = []
        for i in count:
            own = torch.tensor([scores[j] for j in siblings[i]])
            spread = float(own.std()) + 1e-6 if algorithm.scale_by_std else 1.0
            advantages.append([float((scores[i] - own.mean()) / spread)] * len(completions[i]))
        return advantages, []
    rewards = [[-KL_COEF * float(k) for k in o - r] for o, r in zip(old, ref, strict=True)]
    for i in count:
        rewards[i][-1] += scores[i]
    if algorithm.type == "rloo":
        advantages = []
        for i in count:
            others = [sum(rewards[j]) for j in siblings[i] if j != i]
            advantages.append([sum(rewards[i]) - sum(others) / len(others)] * len(completions[i]))
        return advantages, []
    values = [v.tolist() for v in rows_of(e.values, completions)]  # type: ignore[arg-type]
    lam = algorithm.lam if algorithm.type == "ppo" else 1.0
    advantages, returns = [], []
    for r, v in zip(rewards, values, strict=True):
        after, running, own = 0.0, 0.0, []
        for reward, value in zip(reversed(r), reversed(v), strict=True):
            running = reward + algorithm.gamma * after - value + algorithm.gamma * lam * running
            after = value
            own.insert(0, running)
        advantages.append(own)
        returns.append([a + value for a, value in zip(own, v, strict=True)])
    if algorithm.whiten_advantages:
        flat = torch.tensor([a for own in advantages for a in own])
        mean, std = float(flat.mean()), float(flat.std(correction=0))
        advantages = [[(a - mean) / std for a in own] for own in advantages]
    return advantages, returns


def policy_losses(algorithm: Any, lp: Tensor, old: Tensor, ref: Tensor, sampler: Tensor, adv: Tensor) -> Tensor:
    """The formula of each algorithm, per token."""
    if algorithm.type == "reinforce":
        loss = -adv * lp
    else:
        ratio = torch.exp(lp - old)
        loss = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    if algorithm.importance.when == "always":
        loss = loss * torch.exp(old - sampler).clamp(0.7, 1.3)
    if algorithm.type == "grpo":
        d = lp - ref
        loss = loss + KL_COEF * (torch.exp(-d) - 1 + d if algorithm.kl.estimator == "k3" else d**2 / 2)
    return loss


def value_losses(algorithm: Any, values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    plain = (values - returns) ** 2
    if algorithm.value_clip is None:
        return plain / 2
    return torch.maximum(plain, (old + (values - old).clamp(-0.2, 0.2) - returns) ** 2) / 2


def descend(parameters: list[Tensor], loss: Tensor, step: float) -> None:
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p -= step * EPS * g / (g.abs() + EPS)


def by_hand(
    algorithm: Any, e: Experience, *, steps: tuple[float, float] = (STEP, STEP), critic_ratio: float = 1.0
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, float]]:
    """Weights, the critic's values and sums of the losses after the two minibatches, by autograd on transformers."""
    folder = cached_tiny_model(tied=True)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    body = AutoModel.from_pretrained(folder, attn_implementation="eager")
    head = torch.zeros(body.config.hidden_size + 1, requires_grad=True)  # weights, then the bias
    advantages, returns = advantages_by_hand(algorithm, e)
    sums = {"policy_loss": 0.0, "value_loss": 0.0}
    for part, step in zip(PARTS, steps, strict=True):
        prompts, completions = [PROMPTS[i] for i in part], [COMPLETIONS[i] for i in part]
        own = [
            torch.cat([table[i, : len(COMPLETIONS[i])] for i in part])  # type: ignore[index]
            for table in (e.logprobs, e.ref_logprobs, e.sampler_logprobs)
        ]
        logprobs = torch.cat(plain_logprobs(model, prompts, completions, TEMPERATURE))
        loss = policy_losses(algorithm, logprobs, *own, torch.tensor([a for i in part for a in advantages[i]])).sum()
        sums["policy_loss"] += float(loss.detach())
        descend(list(model.parameters()), loss / len(logprobs), step)
        if e.values is not None:
            values = torch.cat(plain_hidden(body, prompts, completions)) @ head[:-1] + head[-1]
            old = torch.cat([e.values[i, : len(COMPLETIONS[i])] for i in part])
            loss = value_losses(algorithm, values, old, torch.tensor([r for i in part for r in returns[i]])).sum()
            sums["value_loss"] += float(loss.detach())
            descend([*body.parameters(), head], loss / len(values), step * critic_ratio)
    with torch.no_grad():
        values_now = [h @ head[:-1] + head[-1] for h in plain_hidden(body, PROMPTS, COMPLETIONS)]
    return {name: p.detach() for name, p in model.named_parameters()}, values_now, sums


def assert_same_weights(got: dict[str, Tensor], want: dict[str, Tensor], *, tolerance: float) -> None:
    """Equal to `tolerance` of how far each tensor has moved since the start."""
    start = start_weights()
    assert got.keys() == want.keys() == start.keys()
    for name, expected in want.items():
        moved = (expected - start[name]).abs().max()
        assert moved > 1e-4, f"{name} hardly moved ({moved:.1e}): nothing is compared"
        off = (got[name] - expected).abs().max() / moved
        assert off < tolerance, f"{name}: off by {off:.1e} of the largest change {moved:.1e}"


@cache
def start_weights() -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_steps_follow_the_formula(name: str, one_rank: RankProcesses) -> None:
    job = tiny_job(ALGORITHMS[name])
    experience = noisy_experience(job.algorithm)
    got = one_rank.run(train, job, experience, PARTS)[0]
    weights, values, sums = by_hand(job.algorithm, experience)
    assert_same_weights(got["weights"], weights, tolerance=1e-3)
    assert got["sums"]["tokens"] == sum(map(len, COMPLETIONS)) == 41
    assert got["sums"]["policy_loss"] == pytest.approx(sums["policy_loss"], rel=1e-4, abs=1e-4)
    if job.algorithm.type != "reinforce":
        assert 3 <= got["sums"]["clipped"] <= 30  # the clip was at work, on some tokens
    if job.algorithm.importance.when == "always":
        quotients = torch.exp(experience.logprobs - experience.sampler_logprobs)[experience.mask]
        beyond = int(((quotients < 0.7) | (quotients > 1.3)).sum())
        assert got["sums"]["importance_clipped"] == beyond > 3
    else:  # in fp32 there are no weights unless they are asked for
        assert "importance_clipped" not in got["sums"]
    if experience.values is None:
        assert "values" not in got["found"][0]
        return
    assert got["sums"]["value_loss"] == pytest.approx(sums["value_loss"], rel=1e-4, abs=1e-4)
    assert_same_values(got["found"], values)


def assert_same_values(found: dict[int, dict[str, Tensor]], expected: list[Tensor]) -> None:
    for i, values in enumerate(expected):
        assert values.abs().max() > 1e-3
        torch.testing.assert_close(found[i]["values"], values, rtol=1e-4, atol=1e-5)


def test_the_kl_coefficient_reaches_grpos_loss(one_rank: RankProcesses) -> None:
    job = tiny_job(ALGORITHMS["grpo"])
    experience = noisy_experience(job.algorithm)
    with_kl, without = (
        one_rank.run(train, job, replace(experience, kl_coef=coef), PARTS)[0]["sums"]["policy_loss"]
        for coef in (KL_COEF, 0.0)
    )
    # On the first minibatch the difference is the coefficient times k3; the second one starts from other weights.
    d = torch.cat([lp - experience.ref_logprobs[i, : len(lp)] for i, lp in enumerate(start_logprobs())])  # type: ignore[index]
    k3 = float((torch.exp(-d) - 1 + d).sum())
    assert with_kl - without == pytest.approx(KL_COEF * k3, rel=0.2)


@pytest.fixture(scope="module")
def baseline(one_rank: RankProcesses) -> dict[str, Any]:
    """PPO, packed, everything in one micro-batch."""
    job = tiny_job(ALGORITHMS["ppo"], learner={"tokens_per_micro_batch": 4096})
    return one_rank.run(train, job, noisy_experience(job.algorithm), PARTS)[0]


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"learner": {"tokens_per_micro_batch": 1}}, id="one-sample-a-batch"),
        pytest.param({"learner": {"tokens_per_micro_batch": 25}}, id="25-tokens"),
        pytest.param({"policy": {"attention": "sdpa"}}, id="padded"),
        pytest.param(
            {"policy": {"attention": "sdpa"}, "learner": {"tokens_per_micro_batch": 25}}, id="padded-25-tokens"
        ),
        pytest.param({"learner": {"gradient_checkpointing": True}}, id="checkpointing"),
        pytest.param({"learner": {"logits_chunk": 4}}, id="logits-in-chunks"),
        pytest.param({"learner": {"logits_chunk": None}}, id="logits-by-the-model"),
        pytest.param({"learner": {"zero_stage": 2}}, id="zero-2"),
    ],
)
def test_layout_and_micro_batches_change_nothing(
    variant: dict[str, Any], one_rank: RankProcesses, baseline: dict[str, Any]
) -> None:
    job = tiny_job(ALGORITHMS["ppo"], **{"learner": {"tokens_per_micro_batch": 4096}} | variant)
    got = one_rank.run(train, job, noisy_experience(job.algorithm), PARTS)[0]
    if "learner" in variant and "tokens_per_micro_batch" in variant["learner"]:
        assert len(got["plans"][0][0]) > len(baseline["plans"][0][0]) == 1
    assert_equal_runs(got, baseline)


def assert_equal_runs(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert_same_weights(got["weights"], want["weights"], tolerance=3e-4)
    for name, value in want["sums"].items():
        assert got["sums"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_the_order_of_samples_changes_nothing(one_rank: RankProcesses, baseline: dict[str, Any]) -> None:
    job = tiny_job(ALGORITHMS["ppo"], learner={"tokens_per_micro_batch": 25})
    e = noisy_experience(job.algorithm)
    order = [6, 2, 4, 0, 1, 5, 3]
    tables = ("tokens", "mask", "finished", "scores", "groups", "sampler_logprobs", "logprobs", "ref_logprobs")
    tables += ("values", "advantages", "returns")
    shuffled = replace(
        e,
        prompt_tokens=tuple(e.prompt_tokens[i] for i in order),
        **{name: getattr(e, name)[order] for name in tables},
    )
    parts = [[order.index(i) for i in part] for part in PARTS]
    assert_equal_runs(one_rank.run(train, job, shuffled, parts)[0], baseline)


@pytest.mark.parametrize("algorithm", ["ppo_importance", "grpo"])
def test_what_lies_outside_the_mask_has_no_effect(algorithm: str, one_rank: RankProcesses) -> None:
    job = tiny_job(ALGORITHMS[algorithm])
    clean = noisy_experience(job.algorithm)
    outside = ~clean.mask
    assert outside.any()
    names = ("sampler_logprobs", "logprobs", "ref_logprobs", "advantages", "values", "returns")
    tables = {name: getattr(clean, name) for name in names if getattr(clean, name) is not None}
    dirty = replace(
        clean,
        tokens=clean.tokens.masked_fill(outside, 10**9),
        **{name: table.masked_fill(outside, float("nan")) for name, table in tables.items()},
    )
    runs = [one_rank.run(train, job, e, PARTS)[0] for e in (clean, dirty)]
    for name, weight in runs[0]["weights"].items():
        assert torch.equal(runs[1]["weights"][name], weight), name
    assert runs[0]["sums"] == runs[1]["sums"]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_temperature_divides_policy_and_reference(temperature: float, attention: str, one_rank: RankProcesses) -> None:
    sampling = {"temperature": temperature, "samples_per_prompt": 2}
    job = tiny_job({"type": "ppo"}, sampling=sampling, policy={"attention": attention})
    found = one_rank.run(annotate, job)[0]
    model = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True), attn_implementation="eager")
    with torch.no_grad():
        expected = plain_logprobs(model, PROMPTS, COMPLETIONS, temperature)
    for own, logprobs in zip(found, expected, strict=True):
        torch.testing.assert_close(own["policy"], logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(own["ref"], logprobs, rtol=0, atol=1e-5)
        assert torch.equal(own["values"], torch.zeros_like(logprobs))  # the head starts at zero


def test_before_the_first_step_policy_and_reference_are_one(one_rank: RankProcesses) -> None:
    """KL 0 to the bit, ratio 1, and the gap to the sampler as made."""
    job = tiny_job({"type": "ppo"})
    found = one_rank.run(annotate, job)[0]
    assert all(torch.equal(own["policy"], own["ref"]) for own in found)
    own = [f["policy"] for f in found]
    experience = noisy_experience(job.algorithm)
    at_start = replace(
        experience,
        logprobs=rectangle(own),
        sampler_logprobs=rectangle([lp + 0.25 for lp in own]),
    )
    everything = [list(range(len(PROMPTS)))]
    sums = one_rank.run(train, job, at_start, everything)[0]["sums"]
    assert sums["first_ratio_error"] < 1e-5
    assert sums["clipped"] == 0
    assert sums["first_tokens"] == 41
    assert sums["gap"] == pytest.approx(0.25 * 41, rel=1e-4)

    shifted = replace(at_start, logprobs=rectangle([lp - 0.1 for lp in own]))
    sums = one_rank.run(train, job, shifted, everything)[0]["sums"]
    assert sums["first_ratio_error"] == pytest.approx(0.10517, abs=1e-4)  # e^0.1 - 1


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 1 / 2, 0, 0]),
        # cos(pi k / 4) = 1, .7071, 0, -.7071, -1
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447, 0, 0]),
    ],
)
def test_learning_rate_factor(schedule: str, warmup: int, factors: list[float]) -> None:
    got = [learning_rate_factor(step, warmup=warmup, total=4, schedule=schedule) for step in range(6)]
    assert got == pytest.approx(factors, abs=1e-6)


def test_the_schedule_reaches_the_optimizer(one_rank: RankProcesses) -> None:
    """The rate that is reported is the one that the step took, one factor per optimizer step."""
    algorithm = {"type": "grpo"}
    learner = {"lr": 0.5, "schedule": "linear", "warmup_steps": 1}
    job = tiny_job(algorithm, learner=learner, steps=3)
    rates = one_rank.run(learning_rates, job, noisy_experience(job.algorithm), 3)[0]
    assert rates == pytest.approx([0.25, 0.5, 0.25])  # 1/2 of the warm-up, 1, then half way down to step 3


def test_the_schedule_and_the_critics_rate_reach_the_weights(one_rank: RankProcesses) -> None:
    learner = {"warmup_steps": 1, "critic_lr": 0.5 * STEP * EPS}
    job = tiny_job({"type": "reinforce"}, learner=learner)
    experience = noisy_experience(job.algorithm)
    got = one_rank.run(train, job, experience, PARTS)[0]
    weights, values, _ = by_hand(job.algorithm, experience, steps=(STEP / 2, STEP), critic_ratio=0.5)
    assert_same_weights(got["weights"], weights, tolerance=1e-3)
    assert_same_values(got["found"], values)


# Several ranks. Five samples; a budget of 40 tokens makes one rank's micro-batches more than the other has samples.

UNEVEN_PROMPTS, UNEVEN_COMPLETIONS = random_samples([40, 20, 6], [[10], [12], [9, 4, 3]], seed=3)
UNEVEN_PARTS = [[0, 1, 2], [2, 3, 4], [1, 4]]


def uneven_experience(job: TrainJob) -> Experience:
    model = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True), attn_implementation="eager")
    with torch.no_grad():
        own = plain_logprobs(model, UNEVEN_PROMPTS, UNEVEN_COMPLETIONS, TEMPERATURE)
    generator = torch.Generator().manual_seed(1)

    def noise(scale: float) -> list[Tensor]:
        return [scale * torch.randn(lp.shape, generator=generator) for lp in own]

    near = [lp + n for lp, n in zip(own, noise(0.1), strict=True)]
    experience = make_experience(
        UNEVEN_PROMPTS,
        UNEVEN_COMPLETIONS,
        finished=torch.ones(5, dtype=torch.bool),
        scores=torch.tensor([0.5, -1.0, 1.0, 0.2, -0.3]),
        logprobs=near,
        sampler_logprobs=near,
        ref_logprobs=own,
        values=noise(0.2),
    )
    return add_advantages(experience, job.algorithm, KL_COEF)


def sharded_job(stage: int, grad_clip: float, **settings: Any) -> TrainJob:
    # Without the threshold DeepSpeed keeps all of so small a model whole, and ZeRO-3 would not be tested.
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    learner = {"zero_stage": stage, "deepspeed_overrides": overrides, "grad_clip": grad_clip}
    return tiny_job({"type": "ppo"}, learner=learner | {"tokens_per_micro_batch": 40} | settings)


@pytest.fixture(scope="module", params=[1e9, 0.5], ids=["unclipped", "clipped"])
def single(request: pytest.FixtureRequest, one_rank: RankProcesses) -> tuple[float, dict[str, Any]]:
    """One rank with ZeRO 0: what all others must equal."""
    job = sharded_job(0, request.param)
    return request.param, one_rank.run(train, job, uneven_experience(job), UNEVEN_PARTS)[0]


LARGE_JOBS = {"gradient_checkpointing": True, "logits_chunk": 4}  # what long contexts need; as are all shipped files


OFFLOADED = {"offload": {"optimizer": "cpu"}}
ALL_OFFLOADED = {"offload": {"optimizer": "cpu", "parameters": "cpu"}}


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        *((stage, {}) for stage in range(4)),
        pytest.param(3, LARGE_JOBS, id="3-large-jobs"),
        pytest.param(1, OFFLOADED, id="1-offload"),
        pytest.param(2, OFFLOADED, id="2-offload"),
        pytest.param(3, OFFLOADED, id="3-offload"),
        pytest.param(3, ALL_OFFLOADED, id="3-offload-all"),
    ],
)
def test_two_ranks_equal_one(
    stage: int, settings: dict[str, Any], single: tuple[float, dict[str, Any]], two_ranks: RankProcesses
) -> None:
    grad_clip, want = single
    job = sharded_job(stage, grad_clip, **settings)
    results = two_ranks.run(train, job, uneven_experience(job), UNEVEN_PARTS)
    plans = results[0]["plans"]
    assert () in plans[0][0] or () in plans[0][1], "no rank had fewer micro-batches: the hard case was not met"
    assert [len(a) for a, _ in plans] == [len(b) for _, b in plans]

    for name, weight in results[0]["weights"].items():
        assert torch.equal(results[1]["weights"][name], weight), f"the ranks disagree on {name}"
    assert_same_weights(results[0]["weights"], want["weights"], tolerance=1e-3)
    for name in ("grad_norm", "value_grad_norm"):  # of the whole gradient, before clipping, on every rank
        for result in results:
            assert result["sums"][name] == pytest.approx(want["sums"][name], rel=1e-3), name
    for name in ("tokens", "policy_loss", "value_loss", "entropy", "clipped", "value_clipped", "gap", "first_tokens"):
        total = sum(result["sums"][name] for result in results)
        assert total == pytest.approx(want["sums"][name], rel=1e-4, abs=1e-4), name
    values = results[0]["found"] | results[1]["found"]
    for i in range(5):
        torch.testing.assert_close(values[i]["values"], want["found"][i]["values"], rtol=1e-3, atol=1e-5)
    if stage == 3:
        assert not any(results[0]["elements"]), "ZeRO-3 kept parameters whole between steps"


def test_clipping_was_at_work(single: tuple[float, dict[str, Any]]) -> None:
    grad_clip, want = single
    assert 1.0 < want["sums"]["grad_norm"] < 1e9  # 0.5 clips, 1e9 does not
    moved = max(float((w - start_weights()[name]).abs().max()) for name, w in want["weights"].items())
    assert (moved < 3 * STEP * 0.5) == (grad_clip == 0.5)
