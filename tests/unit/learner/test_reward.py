"""RewardRank on real DeepSpeed: its rewards are transformers' own, its gradient is the one written down, whatever the
layout, the order or the ranks; and it learns what the labels say.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.config.jobs import RewardModelJob
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.evaluation.calibration import expected_calibration_error
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.supervised import PairExample, ends_with, separate_pad_token
from rlaif_ray.storage import Place, StoredFolder
from tests.learner_ranks import RankProcesses, full_weights
from tests.tiny import cached_tiny_model, make_tokenizer

pytestmark = pytest.mark.slow

EPS, STEP = 1e3, 0.02  # AdamW that is all but SGD, as in test_update.py


def reward_job(**sections: Any) -> RewardModelJob:
    sgd = {"lr": STEP * EPS, "eps": EPS, "betas": (0.0, 0.0), "grad_clip": 1e9, "tokens_per_micro_batch": 60}
    learner = sgd | sections.pop("learner", {})
    policy = {"model": str(cached_tiny_model(tied=True))} | sections.pop("policy", {})
    return RewardModelJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner, **sections})


def random_pairs(count: int, seed: int = 0) -> list[PairExample]:
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 320) for _ in range(draw.randint(least, most)))

    return [
        PairExample(tokens(2, 12), tokens(1, 15), tokens(1, 15), draw.choice([0.0, 1.0, 0.5, draw.random()]))
        for _ in range(count)
    ]


PAIRS = random_pairs(7)


# What runs in the learner's processes


def plan_of(spec: RankSpec, job: RewardModelJob, examples: Sequence[PairExample]) -> Any:
    lengths = [len(e) for e in examples]
    budget = job.learner.tokens_per_micro_batch
    return plan_ranks(range(len(examples)), lengths, ranks=spec.world_size, budget=budget)[spec.rank]


def one_step(spec: RankSpec, job: RewardModelJob, examples: Sequence[PairExample]) -> dict[str, Any]:
    from rlaif_ray.learner.supervised import RewardRank

    rank = RewardRank(job, spec, "fp32", total_steps=10)
    before = rank.rewards(examples, plan_of(spec, job, examples))
    sums = rank.train(examples, plan_of(spec, job, examples))
    return {"before": before, "sums": sums, "weights": full_weights(rank)}


def fit(
    spec: RankSpec, job: RewardModelJob, batches: Sequence[Sequence[PairExample]], test: Sequence[PairExample]
) -> list[tuple[float, float]]:
    """Rewards of `test` after a step per batch."""
    from rlaif_ray.learner.supervised import RewardRank

    rank = RewardRank(job, spec, "fp32", total_steps=len(batches))
    for batch in batches:
        rank.train(batch, plan_of(spec, job, batch))
    found = rank.rewards(test, plan_of(spec, job, test))
    return [found[i] for i in range(len(test))]


def save(spec: RankSpec, job: RewardModelJob, folder: str, center: dict[str, float] | None) -> Any:
    from rlaif_ray.learner.supervised import RewardRank

    rank = RewardRank(job, spec, "fp32", total_steps=10)
    rank.train(PAIRS, plan_of(spec, job, PAIRS))
    rank.save_model(folder, center)
    return rank.rewards(PAIRS, plan_of(spec, job, PAIRS))


def resumed(spec: RankSpec, job: RewardModelJob, folder: str) -> tuple[str, str]:
    """Hash of the weights after six steps, straight and with a checkpoint after three."""
    from rlaif_ray.learner.supervised import RewardRank

    def steps(rank: Any, numbers: range) -> Any:
        for k in numbers:
            batch = random_pairs(5, seed=k)
            rank.train(batch, plan_of(spec, job, batch))
        return rank

    def digest(rank: Any) -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in full_weights(rank).values())).hexdigest()

    straight = steps(RewardRank(job, spec, "fp32", total_steps=6), range(6))
    first = steps(RewardRank(job, spec, "fp32", total_steps=6), range(3))
    first.checkpoint.copy()
    files = first.checkpoint.write(Place(folder))
    second = RewardRank(job, spec, "fp32", total_steps=6)
    second.checkpoint.load(StoredFolder(Place(folder), files))
    return digest(straight), digest(steps(second, range(3, 6)))


# By hand, with transformers alone


def hand_model(job: RewardModelJob) -> Any:
    """transformers' own classifier with the head that our seed gives."""
    from transformers import AutoModelForSequenceClassification

    from rlaif_ray.learner.supervised import init_head

    model = AutoModelForSequenceClassification.from_pretrained(job.policy.model, num_labels=1, dtype=torch.float32)
    init_head(model, job.seed)
    return model


def hand_reward(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """One sequence at a time: nothing is padded, and the classifier reads its last token."""
    return model(torch.tensor([[*prompt, *response]])).logits[0, 0]


def hand_loss(model: Any, examples: Sequence[PairExample], margin: float = 0.0) -> Tensor:
    total = torch.zeros(())
    for e in examples:
        lead = hand_reward(model, e.prompt, e.response_a) - hand_reward(model, e.prompt, e.response_b)
        if e.p_a == 1.0:
            lead = lead - margin
        if e.p_a == 0.0:
            lead = lead + margin
        p = torch.sigmoid(lead)
        total = total - e.p_a * torch.log(p) - (1 - e.p_a) * torch.log(1 - p)
    return total / len(examples)


# ---- One step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_loss_and_step_are_those_of_transformers(one_rank: RankProcesses, margin: float) -> None:
    job = reward_job(reward={"margin": margin})
    [found] = one_rank.run(one_step, job, PAIRS)
    model = hand_model(job)
    for i, example in enumerate(PAIRS):
        by_hand = [hand_reward(model, example.prompt, r).item() for r in (example.response_a, example.response_b)]
        assert found["before"][i] == pytest.approx(by_hand, abs=1e-5)
    loss = hand_loss(model, PAIRS, margin)
    assert found["sums"]["loss"] / len(PAIRS) == pytest.approx(float(loss), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - STEP * EPS * parameter.grad / (parameter.grad.abs() + EPS)
        torch.testing.assert_close(found["weights"][name], expected, atol=2e-6, rtol=1e-5)
    assert set(found["weights"]) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("budget", [1, 30, 10_000])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_micro_batches_layout_and_order_change_nothing(one_rank: RankProcesses, budget: int, attention: str) -> None:
    [base] = one_rank.run(one_step, reward_job(), PAIRS)
    changed = reward_job(learner={"tokens_per_micro_batch": budget}, policy={"attention": attention})
    [other] = one_rank.run(one_step, changed, PAIRS[::-1])
    assert other["sums"]["loss"] == pytest.approx(base["sums"]["loss"], rel=1e-5)
    for name, weights in base["weights"].items():
        torch.testing.assert_close(other["weights"][name], weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_and_shards_change_nothing(one_rank: RankProcesses, two_ranks: RankProcesses, stage: int) -> None:
    [base] = one_rank.run(one_step, reward_job(), PAIRS)
    parts = two_ranks.run(one_step, reward_job(learner={"ranks": 2, "zero_stage": stage}), PAIRS)
    assert sum(part["sums"]["loss"] for part in parts) == pytest.approx(base["sums"]["loss"], rel=1e-5)
    for name, weights in base["weights"].items():
        torch.testing.assert_close(parts[0]["weights"][name], weights, atol=1e-5, rtol=1e-5)


def test_the_mirrored_pairs_are_the_same(one_rank: RankProcesses) -> None:
    mirrored = [replace(e, response_a=e.response_b, response_b=e.response_a, p_a=1 - e.p_a) for e in PAIRS]
    [one], [other] = one_rank.run(one_step, reward_job(), PAIRS), one_rank.run(one_step, reward_job(), mirrored)
    assert other["sums"]["loss"] == pytest.approx(one["sums"]["loss"], rel=1e-6)
    assert other["sums"]["correct"] == one["sums"]["correct"]
    for name, weights in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weights, atol=1e-6, rtol=1e-6)


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 3])
def test_the_saved_model_gives_the_same_rewards_in_transformers(
    one_rank: RankProcesses, two_ranks: RankProcesses, tmp_path: Path, stage: int
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ranks = two_ranks if stage else one_rank
    job = reward_job(learner={"ranks": 2 if stage else 1, "zero_stage": stage})
    parts = ranks.run(save, job, str(tmp_path), {"mean": 0.25, "std": 2.0})
    rewards = {i: pair for part in parts for i, pair in part.items()}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.num_labels == 1  # all that TRL asks of a reward model
    assert model.config.reward_center == {"mean": 0.25, "std": 2.0}
    sequences = [[*e.prompt, *e.response_a] for e in PAIRS]
    padded = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = model(**padded).logits[:, 0]
    assert logits.tolist() == pytest.approx([rewards[i][0] for i in range(len(PAIRS))], abs=1e-5)


def test_padding_is_told_from_the_end(one_rank: RankProcesses, tmp_path: Path) -> None:
    """SmolLM2 pads with its EOS; transformers would then read the token before it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cached_tiny_model(tied=True))
    tokenizer.pad_token = tokenizer.eos_token
    assert separate_pad_token(tokenizer) not in (None, tokenizer.eos_token_id)
    assert ends_with(tokenizer) == (tokenizer.eos_token_id,)
    one_rank.run(save, reward_job(), str(tmp_path), None)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.pad_token_id == saved.pad_token_id != saved.eos_token_id
    ended = [5, 6, saved.eos_token_id]
    with torch.no_grad():
        alone = model(torch.tensor([ended])).logits[0, 0]
        batch = saved.pad({"input_ids": [ended, [5] * 9]}, padding_side="right", return_tensors="pt")
        assert float(model(**batch).logits[0, 0]) == pytest.approx(float(alone), abs=1e-5)


def test_a_tokenizer_with_nothing_but_eos_ends_nothing() -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(None).backend_tokenizer, eos_token="<|im_end|>")
    bare.pad_token = bare.eos_token
    assert separate_pad_token(bare) is None and ends_with(bare) == ()


@pytest.mark.parametrize("stage", [0, 2])
def test_resume_is_exact(one_rank: RankProcesses, tmp_path: Path, stage: int) -> None:
    adam = {
        "zero_stage": stage,
        "lr": 1e-3,
        "eps": 1e-8,
        "betas": (0.9, 0.999),
        "schedule": "cosine",
        "warmup_steps": 2,
    }
    [(straight, second)] = one_rank.run(resumed, reward_job(learner=adam), str(tmp_path))
    assert straight == second


def test_a_classifier_is_gone_on_with(one_rank: RankProcesses, tmp_path: Path) -> None:
    [rewards] = one_rank.run(save, reward_job(), str(tmp_path), None)
    [again] = one_rank.run(one_step, reward_job(policy={"model": str(tmp_path)}, seed=5), PAIRS)
    assert all(again["before"][i] == pytest.approx(rewards[i], abs=1e-5) for i in rewards)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "SequenceClassification" in config["architectures"][0]


# ---- What it learns --------------------------------------------------------------------------------------------------


def utility(tokens: Sequence[int]) -> float:
    """Some tokens are good and some are bad, each by its own amount."""
    return 2.0 * sum(math.sin(2.3 * token) for token in tokens) / len(tokens) ** 0.5


def known_pairs(count: int, seed: int, *, vocabulary: int = 60, temperature: float = 1.0) -> list[PairExample]:
    """Soft labels are those of Bradley and Terry by the utilities. One prompt: pairs say nothing of rewards between
    prompts, so that over several prompts no ranks are right or wrong.
    """
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        prompt = (5, 6, 7, 8)
        a, b = (tuple(draw.randrange(3, vocabulary) for _ in range(8)) for _ in range(2))
        pairs.append(PairExample(prompt, a, b, 1 / (1 + math.exp((utility(b) - utility(a)) / temperature))))
    return pairs


def batches(pairs: Sequence[PairExample], epochs: int, size: int = 32) -> list[list[PairExample]]:
    found = []
    for epoch in range(epochs):
        order = random.Random(epoch).sample(list(pairs), len(pairs))
        found += [order[i : i + size] for i in range(0, len(order), size)]
    return found


CALM = {"model": str(cached_tiny_model(tied=True, spread=0.04))}  # a start that is as near to nothing as usual
LEARNING = {"lr": 3e-3, "eps": 1e-8, "betas": (0.9, 0.99), "grad_clip": 1.0, "schedule": "cosine", "warmup_steps": 10}
LEARNING["tokens_per_micro_batch"] = 4096


def test_soft_labels_of_known_utilities_give_their_ranks(one_rank: RankProcesses) -> None:
    from scipy.stats import spearmanr

    test = known_pairs(300, seed=1)
    job = reward_job(learner=LEARNING, policy=CALM)
    [rewards] = one_rank.run(fit, job, batches(known_pairs(2000, seed=0), epochs=4), test, timeout_s=400)
    by_reward = [r for pair in rewards for r in pair]
    by_utility = [utility(t) for e in test for t in (e.response_a, e.response_b)]
    correlation = float(spearmanr(by_reward, by_utility).statistic)
    print(f"rank correlation {correlation:.4f}")
    assert correlation >= 0.95


@pytest.mark.long
def test_soft_labels_are_better_calibrated_than_hard_ones_drawn_from_them(one_rank: RankProcesses) -> None:
    soft_errors, hard_errors = [], []
    job = reward_job(learner=LEARNING, policy=CALM)
    for seed in (10, 20, 30):
        pairs, test = known_pairs(400, seed), known_pairs(400, seed + 1)
        draw = random.Random(seed)
        hard = [replace(e, p_a=float(draw.random() < e.p_a)) for e in pairs]
        for data, errors in ((pairs, soft_errors), (hard, hard_errors)):
            [rewards] = one_rank.run(fit, job, batches(data, epochs=6), test, timeout_s=400)
            p = [1 / (1 + math.exp(b - a)) for a, b in rewards]
            errors.append(expected_calibration_error(p, [e.p_a for e in test]).value or 0.0)
    print(f"ECE soft {soft_errors}, hard {hard_errors}")
    assert all(soft < hard for soft, hard in zip(soft_errors, hard_errors, strict=True))
