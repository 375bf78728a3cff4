"""From scores to advantages by hand numbers, and what is refused on the way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlaif_ray.config.algorithms import KlConfig
from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.errors import FeedbackError, StaleWeightsError
from rlaif_ray.pipelines.checkpoint import due
from rlaif_ray.pipelines.experience import (
    add_advantages,
    batch_metrics,
    check_fresh,
    failures_by_reason,
    keep_scored,
    mean_kl,
    next_kl_coef,
    sample_rows,
)
from rlaif_ray.types import Completion, Experience, Message, Prompt, Score
from tests.jobs import embedded

PROMPT = Prompt("p", (Message("user", "hi"),), (1, 2), "hi")


def batch(**changes: Any) -> Experience:
    """Two answers to one prompt: three tokens, cut at the limit, and two tokens that ended."""
    values: dict[str, Any] = {
        "prompt_tokens": ((1, 2), (1, 2)),
        "tokens": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "mask": torch.tensor([[True, True, True], [True, True, False]]),
        "finished": torch.tensor([False, True]),
        "scores": torch.tensor([0.5, -0.25]),
        "groups": torch.tensor([0, 0]),
        "sampler_logprobs": torch.zeros(2, 3),
        "logprobs": torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 9.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -2.0, -2.0], [-2.0, -1.0, 0.0]]),  # KL .5 0 -1 | 1 0
        "values": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 9.0]]),
    }
    return Experience(**(values | changes))


def algorithm(**settings: Any) -> Any:
    return embedded(TrainJob, {"algorithm": {"missing_eos_penalty": 1.0, **settings}}).algorithm


def near(*rows: list[float]) -> Any:
    return pytest.approx(torch.tensor(rows), abs=1e-6)


# Rewards at coefficient 0.1, the score (0.5 - 1 for the missing end, -0.25) at the last token:
#   row 0: -0.05  0  0.1 - 0.5 = -0.4      row 1: -0.1  -0.25


class TestAdvantages:
    def test_ppo(self) -> None:
        result = add_advantages(batch(), algorithm(type="ppo", gamma=1.0, lam=0.5, whiten_advantages=False), 0.1)
        # deltas: -0.05+0.2-0.1=0.05, 0+0.3-0.2=0.1, -0.4-0.3=-0.7 | -0.1+0-0.4=-0.5, -0.25-0=-0.25
        # A: -0.7; 0.1-0.35=-0.25; 0.05-0.125=-0.075 | -0.25; -0.5-0.125=-0.625
        assert result.advantages == near([-0.075, -0.25, -0.7], [-0.625, -0.25, 0])
        assert result.returns == near([0.025, -0.05, -0.4], [-0.225, -0.25, 0])
        assert result.kl_coef == 0.1

    def test_ppo_whitens_after_the_returns(self) -> None:
        plain = add_advantages(batch(), algorithm(type="ppo", whiten_advantages=False), 0.1)
        white = add_advantages(batch(), algorithm(type="ppo", whiten_advantages=True), 0.1)
        assert plain.returns is not None and white.returns is not None and white.advantages is not None
        assert torch.equal(plain.returns, white.returns)
        inside = white.advantages[white.mask]
        assert (float(inside.mean()), float(inside.var(correction=0))) == pytest.approx((0, 1), abs=1e-5)
        assert white.advantages[1, 2] == 0

    def test_reinforce(self) -> None:
        result = add_advantages(batch(), algorithm(type="reinforce", gamma=0.5), 0.1)
        # G: -0.4; 0-0.2=-0.2; -0.05-0.1=-0.15 | -0.25; -0.1-0.125=-0.225
        assert result.returns == near([-0.15, -0.2, -0.4], [-0.225, -0.25, 0])
        assert result.advantages == near([-0.25, -0.4, -0.7], [-0.625, -0.25, 0])

    def test_rloo(self) -> None:
        result = add_advantages(batch(values=None), algorithm(type="rloo"), 0.1)
        # sums: -0.45 | -0.35, each less the other
        assert result.advantages == near([-0.1, -0.1, -0.1], [0.1, 0.1, 0])
        assert result.returns is None

    def test_grpo_has_the_kl_in_its_loss_only(self) -> None:
        for coef in (0.1, 50.0):
            result = add_advantages(batch(values=None), algorithm(type="grpo"), coef)
            # scores -0.5 and -0.25: +-0.125 around their mean, std 0.125 * sqrt(2)
            half = 1 / math.sqrt(2)
            assert result.advantages == pytest.approx(torch.tensor([[-half] * 3, [half, half, 0]]), abs=1e-4)
            assert (result.returns, result.kl_coef) == (None, coef)
        unscaled = add_advantages(batch(values=None), algorithm(type="grpo", scale_by_std=False), 0.1)
        assert unscaled.advantages == near([-0.125] * 3, [0.125, 0.125, 0])

    def test_without_penalty_or_reference(self) -> None:
        rloo = algorithm(type="rloo", missing_eos_penalty=None)
        result = add_advantages(batch(values=None, ref_logprobs=None), rloo, 0.1)
        assert result.advantages == near([0.75] * 3, [-0.75, -0.75, 0])
        assert mean_kl(batch(ref_logprobs=None), rloo.kl) == 0

    def test_mean_kl_is_per_sample_and_inside_the_mask(self) -> None:
        assert mean_kl(batch(), KlConfig()) == pytest.approx((-0.5 + 1) / 2)
        assert mean_kl(batch(), KlConfig(estimator="k2")) == pytest.approx((0.125 + 0.5 + 0.5) / 2)


def completion(version: int = 3, *, sample: int = 0, tokens: int = 2, finished: bool = True) -> Completion:
    ids = tuple(range(tokens))
    return Completion(PROMPT, sample, ids, (0.0,) * tokens, "text", finished, version)


class TestFreshness:
    def test_current_weights_pass(self) -> None:
        check_fresh([completion(3), completion(3)], version=3)
        check_fresh([], version=3)

    @pytest.mark.parametrize("other", [2, 4, -1])
    def test_any_other_version_ends_the_run(self, other: int) -> None:
        with pytest.raises(StaleWeightsError, match=rf"version 3 \(got {{{other}: 2}}\).*last checkpoint"):
            check_fresh([completion(3), completion(other), completion(other)], version=3)


class TestScored:
    SCORES = (Score(0.5), Score(None, "too_long"), Score(-0.5), Score(None, "engine_error: died at 3"))

    def test_failures_are_left_out_and_never_scored(self) -> None:
        completions = [completion(sample=k) for k in range(4)]
        samples = keep_scored(completions, self.SCORES, 0.5)
        assert [(s.completion.sample, s.score.value) for s in samples] == [(0, 0.5), (2, -0.5)]

    def test_too_few_end_the_run_with_reasons(self) -> None:
        with pytest.raises(FeedbackError) as told:
            keep_scored([completion()] * 4, self.SCORES, 0.51)
        for words in ("feedback.min_scored_fraction=0.51", "got 2 of 4", "'too_long': 1", "'engine_error': 1"):
            assert words in str(told.value)

    def test_none_at_all_is_too_few_whatever_the_limit(self) -> None:
        with pytest.raises(FeedbackError, match="got 0 of 1"):
            keep_scored([completion()], [Score(None, "too_long")], 1e-9)

    def test_a_score_of_zero_is_a_score(self) -> None:
        assert len(keep_scored([completion()], [Score(0.0)], 1.0)) == 1

    def test_metrics(self) -> None:
        completions = [completion(tokens=4, finished=False), completion(), completion(), completion()]
        metrics = batch_metrics(completions, self.SCORES)
        assert (metrics["reward/mean"], metrics["reward/std"]) == (0, 0.5)
        assert (metrics["completion/length_mean"], metrics["completion/eos_fraction"]) == (2.5, 0.75)
        assert (metrics["feedback/scored_fraction"], metrics["feedback/failed"]) == (0.5, 2)
        assert metrics["feedback/failed_engine_error"] == metrics["feedback/failed_too_long"] == 1
        assert failures_by_reason(self.SCORES) == {"too_long": 1, "engine_error": 1}

    def test_metrics_of_little_probability_on_the_answers(self) -> None:
        judged = [
            Score(0.5, None, {"outside_mass": 0.2}),
            Score(None, "low_answer_mass", {"outside_mass": 1.0}),
            # A mixture: its part's name before the reason, its evidence within.
            Score(
                None, "help_low_answer_mass", {"parts": {"help": {"value": None, "evidence": {"outside_mass": 0.9}}}}
            ),
            Score(None, "too_long"),
        ]
        metrics = batch_metrics([completion()] * 4, judged)
        assert metrics["feedback/low_answer_mass_fraction"] == 0.5
        assert metrics["feedback/outside_mass"] == pytest.approx(0.7)
        assert metrics["feedback/failed_low_answer_mass"] == 1
        assert "feedback/low_answer_mass_fraction" not in batch_metrics([completion()], [Score(0.5)])

    def test_rows(self) -> None:
        (row,) = sample_rows([completion()], [Score(None, "too_long", {"judge": "j"})])
        assert (row["score"], row["failure"], row["weight_version"], row["tokens"]) == (None, "too_long", 3, 2)
        assert (row["prompt"], row["completion"], row["evidence"]) == ("hi", "text", {"judge": "j"})


class TestKlCoefficient:
    def test_fixed_without_a_target(self) -> None:
        assert next_kl_coef(0.05, 100.0, KlConfig(), samples=8) == 0.05

    @pytest.mark.parametrize(("kl", "factor"), [(10.0, 1.02), (5.5, 1.01), (5.0, 1.0), (4.5, 0.99), (0.0, 0.98)])
    def test_moves_towards_the_target_and_no_faster_than_its_clip(self, kl: float, factor: float) -> None:
        cfg = KlConfig(target=5.0, horizon=100)
        assert next_kl_coef(0.05, kl, cfg, samples=10) == pytest.approx(0.05 * factor)


@pytest.mark.parametrize(
    ("every", "last", "expected"),
    [(0, None, []), (0, 7, []), (3, None, [3, 6]), (3, 7, [3, 6, 7]), (1, 7, [1, 2, 3, 4, 5, 6, 7]), (9, 7, [7])],
)
def test_due(every: int, last: int | None, expected: list[int]) -> None:
    assert [step for step in range(1, 8) if due(step, every, last)] == expected
