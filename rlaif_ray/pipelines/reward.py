"""`rlaif reward-model`: a reward model from preference records, of AI labels or of people's (the RLHF arm)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.data.chat import ChatRenderer
from rlaif_ray.data.preferences import PreferenceRecord, human_label, read_preferences
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.calibration import brier, expected_calibration_error, pairwise_accuracy
from rlaif_ray.learner.supervised import PairExample, ends_with
from rlaif_ray.models import load_tokenizer
from rlaif_ray.pipelines.contexts import readable_context
from rlaif_ray.pipelines.run_folder import fingerprint, make_folder, stop_when_asked, write_resolved
from rlaif_ray.pipelines.supervised import SupervisedRun, start_state, total_steps
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking import open_tracker
from rlaif_ray.tracking.progress import print_table

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import RewardModelJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.runtime.groups import RewardGroup


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """Examples, read and checked before anything starts."""

    train: list[PairExample]
    held_out: list[PairExample]
    human: list[PairExample]  # of reward.human_path
    left_out: dict[str, int]  # records by why they can't be trained on
    data: str  # fingerprint of the records


def train_reward_model(loaded: Loaded) -> dict[str, Any]:
    """Runs the job to its end, or from its newest checkpoint; returns what summary.json says."""
    job, run_dir = loaded.config, loaded.run_dir
    inputs = read_reward_inputs(job)
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
        run = SupervisedRun(job, job.reward, run_dir, track, learner, state, resumed, steps)
        run.train(inputs.train, lambda: {"held_out": measured(learner, inputs.held_out)}, stopping)
        with track.phase("evaluation"):
            results = {"held_out": measured(learner, inputs.held_out), "human": measured(learner, inputs.human)}
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


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_reward_inputs(job: RewardModelJob) -> RewardInputs:
    """Records as token examples, split by prompt.

    Raises:
        InputError: the data or the model is wrong, or nothing is left to train on.
    """
    policy, cfg = job.policy, job.reward
    tokenizer = load_tokenizer(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
    room = readable_context(policy, cfg.max_tokens, "reward.max_tokens")
    left_out: dict[str, int] = {}
    train: list[PairExample] = []
    held_out: list[PairExample] = []
    write = _ExampleWriter(tokenizer, room, cfg.labels, left_out)
    for record in read_preferences(job.data.path, split=job.data.split, limit=job.data.limit):
        example = write(record)
        if example is not None:
            part = held_out if is_held_out(record, cfg.held_out_fraction, job.seed) else train
            part.append(example)
    if len(train) < 1:
        raise InputError(
            f"{job.data.path} has no pair to train on (got {len(held_out)} held out; left out: {left_out}). "
            f"Label the pairs first (rlaif label), or lower reward.held_out_fraction."
        )
    human = []
    if cfg.human_path is not None:
        by_people = _ExampleWriter(tokenizer, room, cfg.labels, {}, human=True)
        human = [e for r in read_preferences(cfg.human_path) if (e := by_people(r)) is not None]
    return RewardInputs(train, held_out, human, left_out, fingerprint(job.data.path))


class _ExampleWriter:
    """Records to token examples; counts by reason what can't be one."""

    def __init__(self, tokenizer: Any, room: int, labels: str, left_out: dict[str, int], *, human: bool = False):
        self._render = ChatRenderer(tokenizer)
        self._tokenizer, self._room, self._labels = tokenizer, room, labels
        self._end = ends_with(tokenizer)
        self._left_out, self._human = left_out, human

    def __call__(self, record: PreferenceRecord) -> PairExample | None:
        label = record.p_a
        if self._human:
            label = human_label(record)
        if label is None:
            self._count("failed" if record.failed else "unlabelled")
            return None
        if self._labels == "hard":
            label = 0.5 if label == 0.5 else float(label > 0.5)
        prompt = self._render.tokens(record.prompt, f"record {record.id}")
        a, b = (self._tokens(text) for text in (record.response_a, record.response_b))
        if len(prompt) + max(len(a), len(b)) > self._room:
            self._count("too_long")
            return None
        return PairExample(prompt, a, b, label)

    def _tokens(self, text: str) -> tuple[int, ...]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return (*encoded["input_ids"], *self._end)

    def _count(self, reason: str) -> None:
        self._left_out[reason] = self._left_out.get(reason, 0) + 1


def is_held_out(record: PreferenceRecord, fraction: float, seed: int) -> bool:
    """By the prompt's text alone, so that no prompt is on both sides, whatever else the data holds."""
    text = "\x00".join(f"{m.role}\x01{m.content}" for m in record.prompt)
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < fraction


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measured(learner: RewardGroup, examples: Sequence[PairExample]) -> dict[str, Any] | None:
    """Accuracy, Brier score and calibration of the model's preference sigmoid(r_a - r_b); None without examples."""
    if not examples:
        return None
    rewards = learner.rewards(examples)
    p = [1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, a - b)))) for a, b in rewards]
    labels = [example.p_a for example in examples]
    accuracy = pairwise_accuracy(p, labels)
    calibration = expected_calibration_error(p, labels)
    longer = [0.5 + 0.5 * _sign(len(e.response_a) - len(e.response_b)) for e in examples]
    return {
        "n": len(examples),
        "accuracy": accuracy.value,
        "compared": accuracy.n,
        "longer_accuracy": pairwise_accuracy(longer, labels).value,  # of always choosing the longer, in tokens
        "brier": brier(p, labels),
        "ece": calibration.value,
        "curve": calibration.rows(),
    }


def _figure(value: float | None) -> str:
    """Three digits; a dash where every label is a tie."""
    return "-" if value is None else f"{value:.3f}"


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _center(learner: RewardGroup, examples: Sequence[PairExample]) -> dict[str, float]:
    """Mean and standard deviation of the preferred responses' rewards: the reference that gets mean 0."""
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
            against = f"{found['compared']} (the longer: {_figure(found['longer_accuracy'])})"
            errors = f"Brier {found['brier']:.3f}, ECE {found['ece']:.3f}"
            yield title, f"accuracy {_figure(found['accuracy'])} of {against}, {errors}"
    yield "peak memory", f"{summary['peak_rss_gb']:.1f} GB"
    yield "model", str(Path("reward_model"))
