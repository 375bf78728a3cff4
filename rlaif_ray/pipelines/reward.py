"""`rlaif reward-model`: a reward model from preference records, of AI labels or of people's (the RLHF arm)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.learner.supervised import PairExample, ends_with
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.finite import require_numbers
from rlaif_ray.pipelines.pair_examples import measured, measured_lines, read_pairs
from rlaif_ray.pipelines.supervised import run_supervised
from rlaif_ray.runtime.cluster import Cluster
from rlaif_ray.tracking.display import fixed
from rlaif_ray.tracking.progress import print_table

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.pipelines.supervised import SupervisedRun
    from rlaif_ray.runtime.groups import RewardGroup


CENTER_EXAMPLES = 2048  # about as many set the mean


def train_reward_model(loaded: Loaded) -> dict[str, Any]:
    """Runs the job to its end, or from its newest checkpoint; returns what summary.json says."""
    loaded = with_chat_date(loaded)
    job, run_dir = loaded.config, loaded.run_dir
    inputs, human = read_pairs(job, lambda render: ends_with(render.tokenizer), job.reward.human_path)
    note = f"{len(inputs.train)} pairs to learn from, {len(inputs.held_out)} held out"

    def story(run: SupervisedRun) -> dict[str, Any]:
        learner: RewardGroup = run.learner
        run.train(inputs.train, lambda: {"held_out": _measured(learner, inputs.held_out)})
        with run.track.phase("evaluation"):
            results = {"held_out": _measured(learner, inputs.held_out), "human": _measured(learner, human)}
            run.track.evaluation(run.steps, results)
        with run.track.phase("saving the model"):
            center = _center(learner, inputs.train) if job.reward.center else None
            saved = run.save("reward_model", center)
        return run.track.summary(
            {
                "job": "reward-model",
                "pairs": len(inputs.train),
                "left_out": inputs.left_out,
                "reward_center": center,
                "reward_model": results,
                **saved,
            }
        )

    summary = run_supervised(loaded, len(inputs.train), inputs.data, note, Cluster.start_reward_learner, story)
    print_table(run_dir.name, list(_lines(summary)), run_dir)
    return summary


def _measured(learner: RewardGroup, examples: Sequence[PairExample]) -> dict[str, Any] | None:
    return measured(learner.rewards(examples) if examples else [], examples)


def _center(learner: RewardGroup, examples: Sequence[PairExample]) -> dict[str, float]:
    """Mean and standard deviation of the preferred responses' rewards: the reference that gets mean 0.

    Over examples from all of the training part; a few thousand tell the mean to a fiftieth of a standard deviation.
    """
    examples = examples[:: max(1, len(examples) // CENTER_EXAMPLES)]
    rewards = learner.rewards(examples)
    require_numbers((reward for pair in rewards for reward in pair), "rewards that the model is centred on")
    preferred = [a if e.p_a >= 0.5 else b for e, (a, b) in zip(examples, rewards, strict=True)]
    mean = math.fsum(preferred) / len(preferred)
    variance = math.fsum((r - mean) ** 2 for r in preferred) / len(preferred)
    return {"mean": mean, "std": math.sqrt(variance)}


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "steps", f"{summary['steps']} of {summary['total_steps']}, {summary['pairs']} pairs"
    yield "left out", ", ".join(f"{n} {reason}" for reason, n in summary["left_out"].items())
    for name, title in (("held_out", "held-out pairs"), ("human", "against people")):
        found = summary["reward_model"].get(name)
        if found:
            yield title, measured_lines(found)
    yield "peak memory", f"{fixed(summary['peak_rss_gb'], 1)} GB"
    yield "model", str(Path("reward_model"))
