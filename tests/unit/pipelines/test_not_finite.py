"""NaN and infinity: what ends a run, what is said of it, and closing tables that stand any value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.algorithms import KlConfig
from rlaif_ray.config.jobs import SftJob, TrainJob
from rlaif_ray.config.sections import LearnerConfig
from rlaif_ray.errors import NotFiniteError
from rlaif_ray.interfaces import score_answered
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.pipelines import (
    checkpoint,
    dpo,
    evaluation_table,
    pair_examples,
    preferences,
    reward,
    sampling,
    supervised,
)
from rlaif_ray.pipelines.experience import next_kl_coef
from rlaif_ray.pipelines.finite import check_updates, how_to_go_on, no_numbers, require_numbers
from rlaif_ray.pipelines.pipeline import headline
from rlaif_ray.pipelines.restarts import with_restarts
from rlaif_ray.tracking.display import key_metrics, print_summary
from rlaif_ray.tracking.progress import print_table
from rlaif_ray.types import Completion, Prompt, Score
from tests.jobs import embedded
from tests.learner_ranks import make_experience, random_samples

NAN, INF = math.nan, math.inf


def learned(skipped: float = 0.0, in_row: float = 0.0, **values: float) -> dict[str, float]:
    found = {"policy/loss": 0.5, "policy/grad_norm": 1.0, "policy/skipped_updates": skipped}
    return found | {"policy/skipped_in_row": in_row} | {name.replace("_", "/", 1): v for name, v in values.items()}


class TestUpdates:
    def test_good_ones_pass(self) -> None:
        assert check_updates(learned(), LearnerConfig()) == learned()

    def test_the_first_bad_one_ends_the_run(self) -> None:
        with pytest.raises(NotFiniteError) as error:
            check_updates(learned(1, 1, policy_loss=NAN, policy_grad_norm=INF), LearnerConfig())
        assert "policy/loss is nan; policy/grad_norm is inf" in str(error.value)
        assert "not applied (updates left out: 1 of policy)" in str(error.value)

    def test_skipped_by_config_until_there_are_too_many_in_a_row(self) -> None:
        cfg = LearnerConfig(nonfinite="skip", nonfinite_limit=4)
        assert check_updates(learned(3, 3, policy_loss=NAN), cfg)["policy/skipped_updates"] == 3
        with pytest.raises(NotFiniteError, match=r"4 in a row \(learner.nonfinite_limit=4\)"):
            check_updates(learned(1, 4, policy_loss=NAN), cfg)

    def test_the_critics_count_too(self) -> None:
        bad = learned() | {"value/skipped_updates": 1.0, "value/skipped_in_row": 1.0, "value/loss": NAN}
        with pytest.raises(NotFiniteError, match=r"value/loss is nan.*1 of value"):
            check_updates(bad, LearnerConfig())

    def test_what_they_were_computed_from_is_named(self) -> None:
        prompts, completions = random_samples([4, 6], [[5, 9], [14, 3]])
        logprobs = [torch.full((len(c),), -1.0) for c in completions]
        experience = make_experience(
            prompts,
            completions,
            finished=torch.ones(4, dtype=torch.bool),
            scores=torch.zeros(4),
            sampler_logprobs=logprobs,
            logprobs=logprobs,
            ref_logprobs=None,
            values=None,
        )
        assert no_numbers(experience) == []
        values, advantages = torch.zeros(experience.mask.shape), torch.zeros(experience.mask.shape)
        values[~experience.mask] = NAN  # outside of completions there is nothing to look at
        advantages[0, 0] = NAN
        bad = replace(experience, values=values, advantages=advantages)
        assert no_numbers(bad) == ["advantages"]
        with pytest.raises(NotFiniteError, match="so are the advantages that it was computed from"):
            check_updates(learned(1, 1), LearnerConfig(), bad)


def test_the_kl_coefficient_survives_a_batch_of_no_numbers() -> None:
    assert next_kl_coef(0.1, NAN, KlConfig(target=6.0), 8) == 0.1


class TestScores:
    def completion(self, *logprobs: float) -> Completion:
        prompt = Prompt("p", (), (1,), "?")
        return Completion(prompt, 0, (5,) * len(logprobs), logprobs, "text", True, 0)

    def test_a_value_or_log_probabilities_that_are_no_numbers_are_failures(self) -> None:
        class Constant:
            seen: list[int]

            def score(self, completions: Any) -> list[Score]:
                self.seen = [len(c.tokens) for c in completions]
                return [Score(value) for value in (0.5, NAN, -INF)]

        scorer = Constant()
        answers = [self.completion(-1.0), self.completion(-1.0, NAN), self.completion(-2.0), self.completion(-3.0)]
        found = score_answered(scorer, answers)
        assert scorer.seen == [1, 1, 1]  # the second was sampled by an engine that is out of its mind
        assert [(s.value, s.failure) for s in found] == [
            *[(0.5, None), (None, "no_logprobs"), (None, "no_value"), (None, "no_value")]
        ]


class TestMeasuring:
    def test_losses(self) -> None:
        class Learner:
            def losses(self, examples: Any) -> list[float]:
                return [1.0, NAN]

        with pytest.raises(NotFiniteError, match=r"1 of 2 held-out losses are NaN or infinite \(the first is nan\)"):
            supervised.held_out_loss(Learner(), [SftExample((1,), (2,))] * 2)  # type: ignore[arg-type]

    def test_rewards(self) -> None:
        with pytest.raises(NotFiniteError, match="1 of 4 rewards"):
            pair_examples.measured([(1.0, INF), (0.0, 0.0)], [object()] * 2)  # type: ignore[list-item]

    def test_the_center(self) -> None:
        class Learner:
            def rewards(self, examples: Any) -> list[tuple[float, float]]:
                return [(NAN, 0.0)]

        with pytest.raises(NotFiniteError, match="centred"):
            reward._center(Learner(), [object()])  # type: ignore[arg-type,list-item]

    def test_numbers(self) -> None:
        require_numbers([0.0, -1e300], "x")


class FakeTrack:
    last_step = 3


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_run_says_how_to_go_on(tmp_path: Path, wrapped: bool) -> None:
    """With the checkpoint that is there; Ray's error has ours in it."""
    job = embedded(SftJob, {"data": {"path": "d"}, "learner": {"lr": 1e30}, "checkpoint": {"every": 1}})
    error = NotFiniteError("the model's weights are not finite (NaN or infinite) after the update")
    if wrapped:
        outer = NotFiniteError("ray::LearnerActor.train() (pid=1)\nTraceback ...")
        outer.cause, error = error, outer  # type: ignore[attr-defined]

    def attempt(found: Any) -> Any:
        checkpoints._last = 3
        raise error

    with pytest.raises(NotFiniteError) as raised, checkpoint.open_checkpoints(job, tmp_path) as checkpoints:
        with_restarts(attempt, None, job=job, cluster=None, checkpoints=checkpoints, track=FakeTrack())  # type: ignore[arg-type]
    said = str(raised.value)
    assert said.startswith("training stopped after step 3: the model's weights are not finite") and "ray::" not in said
    assert "learner.lr=1e+30 is too high; bf16 overflows" in said
    assert f"{tmp_path}/checkpoints/step-3: the same command goes on from there" in said
    assert "learner.nonfinite=skip" in said and "checkpoint.resume=never" in said


def test_without_a_checkpoint_it_says_so() -> None:
    job = embedded(TrainJob, {"policy": {"precision": "fp32"}})
    said = str(how_to_go_on(NotFiniteError("x"), job, 0, None))
    assert "There is no checkpoint (checkpoint.every=0)" in said and "bf16" not in said


# ---- Closing tables --------------------------------------------------------------------------------------------------

RATE = {"rate": 0.5, "ci95_low": 0.4, "ci95_high": 0.6, "n": 9, "prefers_first": 0.5}
PAIRS = {"n": 4, "accuracy": 0.5, "compared": 4, "longer_accuracy": 0.5, "brier": 0.2, "ece": 0.1}
RUN = {"steps": 3, "total_steps": 3, "wall_s": 9.0, "setup_s": 1.0, "peak_rss_gb": 1.5, "phase_share": {"update": 0.9}}
GAIN = {"mean": 0.1, "ci95_low": 0.0, "ci95_high": 0.2, "n": 4}
SUMMARIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (supervised._lines, {**RUN, "turns": 4, "too_long": 1, "sft": {"held_out": {"loss": 1.5, "turns": 2}}}),
    "dpo": (dpo._lines, {**RUN, "pairs": 4, "left_out": {"too_long": 1}, "dpo": {"held_out": PAIRS}}),
    "reward-model": (
        reward._lines,
        {**RUN, "pairs": 4, "left_out": {}, "reward_model": {"held_out": PAIRS, "human": PAIRS}},
    ),
    "sample": (
        sampling._lines,
        {
            "records": 3,
            "prompts": 3,
            "responses": 3,
            "left_out": {},
            "failures": {"engine_error": 1},
            "retryable": 1,
            "samples_per_prompt": 1,
            "tokens": 9,
            "score": {"best": 0.5, "mean": 0.1},
            "output": "x",
        },
    ),
    "label": (
        preferences._lines,
        {
            **{"labels": 3, "records": 4, "failures": {"too_long": 1}, "position_bias": 0.5, "mean_confidence": 0.9},
            **{"hard": 1, "cut": 1, "tokens_in": 5, "tokens_out": 1, "questions_recalled": 1, "questions_asked": 2},
            **{"labels_per_s": 2.5, "human_cost": 4.0, "cost": 0.5, "output": "x", "retryable": 1},
            **{"mean_answer_mass": 0.8, "low_answer_mass_fraction": 0.1},
        },
    ),
    "evaluate": (
        evaluation_table._lines,
        {
            **{
                "judge": "j",
                "training_judges": {},
                "unclear_origins": {},
                "reward_models": {"rm": {**RATE, **PAIRS}},
                "probabilities": False,
            },
            "alignment": {
                **{**RATE, **PAIRS, "longer": {"accuracy": 0.5}, "people": 0.7, "kappa": 0.3, "position_bias": RATE},
                **{"failed": 1, "failures": {"too_long": 1}, "subsets": {"a": {**RATE, **PAIRS}}},
            },
            "win_rates": [
                {
                    **{"a": "x", "b": "y", "position_bias": RATE, "win_rate": RATE, "length_controlled": RATE},
                    "mean_length": {"a": 9.0, "b": 8.0},
                }
            ],
            **{"harmless": None, "tokens_in": 1, "tokens_out": 1, "cost": 0.5, "failures": {}, "retryable": 0},
            "harmless_failures": {},
        },
    ),
    "train": (
        None,
        {
            **{**RUN, "name": "t", "reward": {"first": 0.1, "last": 0.2, "window": 3}},
            "held_out": {"before": {"mean": 0.1}, "after": {"mean": 0.2}, "gain": GAIN},
            "harmless": {"before": {"rate": RATE}, "after": {"rate": RATE}},
        },
    ),
}


def with_numbers(values: Any, number: Any) -> Any:
    """`values` with every number that is measured, not counted, replaced."""
    if isinstance(values, Mapping):
        return {key: with_numbers(value, number) for key, value in values.items()}
    if isinstance(values, list):
        return [with_numbers(value, number) for value in values]
    return number if isinstance(values, float) else values


@pytest.mark.parametrize("number", [None, NAN, INF, -INF, 0.5])
@pytest.mark.parametrize("job", SUMMARIES)
def test_a_closing_table_stands_any_value(job: str, number: Any, tmp_path: Path) -> None:
    lines, summary = SUMMARIES[job]
    summary = with_numbers(summary, number)
    if job == "train":
        print_summary(summary, tmp_path)
    else:
        print_table(job, list(lines(summary)), tmp_path)
    if job == "evaluate":
        assert all(isinstance(cell, str) for cell in evaluation_table._row(summary["win_rates"][0]))
    assert isinstance(headline({"job": job, **summary}), str)


@pytest.mark.parametrize("number", [None, NAN, INF])
def test_a_progress_line_stands_any_value(number: Any) -> None:
    key_metrics({"reward/mean": number, "kl/mean": number, "time/step_s": number})
    key_metrics({"sft/loss": number, "time/step_s": number})
