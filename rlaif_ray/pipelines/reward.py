"""`rlaif reward-model`: a reward model from preference records, of AI labels or of people's (the RLHF arm)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.learner.supervised import PairExample, ends_with
from rlaif_ray.pipelines.pair_examples import measured, measured_lines, read_pairs
from rlaif_ray.pipelines.run_folder import make_folder, stop_when_asked, write_resolved
from rlaif_ray.pipelines.supervised import SupervisedRun, start_state, total_steps
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking import open_tracker
from rlaif_ray.tracking.progress import print_table

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.runtime.groups import RewardGroup


CENTER_EXAMPLES = 2048  # about as many set the mean


def train_reward_model(loaded: Loaded) -> dict[str, Any]:
    """Runs the job to its end, or from its newest checkpoint; returns what summary.json says."""
    job, run_dir = loaded.config, loaded.run_dir
    inputs, human = read_pairs(job, ends_with, job.reward.human_path)
    steps = total_steps(job.reward, len(inputs.train))
    state, resumed = start_state(job, run_dir, steps, inputs.data)
    make_folder(run_dir)
    tracking = {"config": job.model_dump(mode="json"), "tracking": job.tracking, "total_steps": steps}
    with (
        open_cluster(job) as cluster,
        open_tracker(run_dir, **tracking, resume_step=state.step, name=run_dir.name) as track,
        stop_when_asked() as stopping,
    ):
        write_resolved(loaded)
        track.note(f"{len(inputs.train)} pairs to learn from, {len(inputs.held_out)} held out; starting the learner")
        learner = cluster.start_reward_learner(steps)
        cluster.wait()
        track.watch_processes(cluster.pids)
        run = SupervisedRun(job, run_dir, track, learner, state, resumed, steps)
        run.train(inputs.train, lambda: {"held_out": _measured(learner, inputs.held_out)}, stopping)
        with track.phase("evaluation"):
            results = {"held_out": _measured(learner, inputs.held_out), "human": _measured(learner, human)}
            track.evaluation(steps, results)
        with track.phase("saving the model"):
            center = _center(learner, inputs.train) if job.reward.center else None
            learner.save_model(str((run_dir / "reward_model").absolute()), center)
        summary = track.summary(
            {
                "job": "reward-model",
                "pairs": len(inputs.train),
                "left_out": inputs.left_out,
                "reward_center": center,
                "reward_model": results,
            }
        )
    print_table(run_dir.name, list(_lines(summary)), run_dir)
    return summary


def plan_reward_model(loaded: Loaded) -> str:
    """What `--dry-run` shows beside the resolved config."""
    job = loaded.config
    device: Literal["cpu", "cuda"] = "cuda" if job.cluster.device == "gpu" else "cpu"
    return placement_table(job, device)


def _measured(learner: RewardGroup, examples: Sequence[PairExample]) -> dict[str, Any] | None:
    return measured(learner.rewards(examples) if examples else [], examples)


def _center(learner: RewardGroup, examples: Sequence[PairExample]) -> dict[str, float]:
    """Mean and standard deviation of the preferred responses' rewards: the reference that gets mean 0.

    Over examples from all of the training part; a few thousand tell the mean to a fiftieth of a standard deviation.
    """
    examples = examples[:: max(1, len(examples) // CENTER_EXAMPLES)]
    preferred = [a if e.p_a >= 0.5 else b for e, (a, b) in zip(examples, learner.rewards(examples), strict=True)]
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
    yield "peak memory", f"{summary['peak_rss_gb']:.1f} GB"
    yield "model", str(Path("reward_model"))
