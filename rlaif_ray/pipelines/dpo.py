"""`rlaif dpo`: direct preference optimisation on preference records: no reward model and no sampling."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.learner.dpo import DpoExample
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.finite import require_numbers
from rlaif_ray.pipelines.pair_examples import measured, measured_lines, read_pairs
from rlaif_ray.pipelines.supervised import run_supervised
from rlaif_ray.runtime.cluster import Cluster
from rlaif_ray.tracking.display import fixed
from rlaif_ray.tracking.progress import print_table

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.learner.supervised import PairExample
    from rlaif_ray.pipelines.supervised import SupervisedRun
    from rlaif_ray.runtime.groups import DpoGroup


def train_dpo(loaded: Loaded) -> dict[str, Any]:
    """Runs the job to its end, or from its newest checkpoint; returns what summary.json says."""
    loaded = with_chat_date(loaded)
    job, run_dir = loaded.config, loaded.run_dir
    inputs, _ = read_pairs(job, ChatRenderer.turn_end)
    note = f"{len(inputs.train)} pairs to learn from, {len(inputs.held_out)} held out"

    def story(run: SupervisedRun) -> dict[str, Any]:
        learner: DpoGroup = run.learner
        with run.track.phase("reference"):  # before a checkpoint is loaded: the policy is still what it started from
            train, held_out = _refer(learner, inputs.train), _refer(learner, inputs.held_out)
        run.train(train, lambda: {"held_out": _measured(learner, held_out, job.dpo.beta)})
        with run.track.phase("evaluation"):
            results = {"held_out": _measured(learner, held_out, job.dpo.beta)}
            run.track.evaluation(run.steps, results)
        with run.track.phase("saving the policy"):
            saved = run.save("policy")
        return run.track.summary(
            {"job": "dpo", "pairs": len(inputs.train), "left_out": inputs.left_out, "dpo": results} | saved
        )

    summary = run_supervised(loaded, len(inputs.train), inputs.data, note, Cluster.start_dpo_learner, story)
    print_table(run_dir.name, list(_lines(summary)), run_dir)
    return summary


class Referred(Sequence[DpoExample]):
    """Pairs with what the policy said of them before the first step. One is made when it is asked for."""

    def __init__(self, pairs: Sequence[PairExample], logprobs: Sequence[tuple[float, float]]) -> None:
        """`logprobs` are of a and b of each."""
        assert len(pairs) == len(logprobs)
        self.pairs = pairs
        self._said = array("d", (value for pair in logprobs for value in pair))

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> DpoExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[DpoExample]: ...
    def __getitem__(self, index: int | slice) -> DpoExample | list[DpoExample]:
        numbers = range(len(self))[index]
        if not isinstance(numbers, int):
            return [self[k] for k in numbers]
        return DpoExample(self.pairs[numbers], self._said[2 * numbers], self._said[2 * numbers + 1])


def _refer(learner: DpoGroup, pairs: Sequence[PairExample]) -> Referred:
    logprobs = learner.logprobs(pairs) if pairs else []
    require_numbers((value for pair in logprobs for value in pair), "log-probabilities before training")
    return Referred(pairs, logprobs)


def _measured(learner: DpoGroup, examples: Referred, beta: float) -> dict[str, Any] | None:
    """How well the preferences fit that the policy implies: rewards are beta log(policy / reference)."""
    if not examples:
        return None
    rewards = [
        (beta * (a - example.reference_a), beta * (b - example.reference_b))
        for example, (a, b) in zip(examples, learner.logprobs(examples.pairs), strict=True)
    ]
    return measured(rewards, examples.pairs)


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "steps", f"{summary['steps']} of {summary['total_steps']}, {summary['pairs']} pairs"
    yield "left out", ", ".join(f"{n} {reason}" for reason, n in summary["left_out"].items())
    found = summary["dpo"].get("held_out")
    yield "held-out pairs", measured_lines(found) if found else ""
    yield "peak memory", f"{fixed(summary['peak_rss_gb'], 1)} GB"
    yield "model", str(Path("policy"))
