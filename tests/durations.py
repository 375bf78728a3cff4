"""How long test files take, as recorded: what runs first, and what a run says of itself before it starts.

`make test-times` records anew. The figures are those of two idle cores; `tests/pace.py` says how this machine compares.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.pace import pace

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_name("durations.json")
MARKER = "long"  # what `make test` leaves to `make test-all`
TEST, REST = "test", "rest"
WHAT = {
    TEST: "every unit test, then each main path once on the real engines: training by a judge and by a reward model, "
    "going on after kill -9, label, reward-model, revise, sft, dpo, sample, evaluate, pipeline, report, weight sync "
    "and a submitted job",
    REST: "the rest: the fault table, nodes that are lost, Slurm, pipelines stopped in every stage, corruptions, "
    "faults of endpoints, the report in a browser, every command of the README",
}
# Files that share the engine of a session fixture run in one worker, so that it starts once.
SHARED_ENGINE = {"tests/ray/test_vllm_engine.py", "tests/ray/test_judge_vllm.py"}


def group(file: str) -> str:
    """What is run by one worker."""
    return "the tiny engine" if file in SHARED_ENGINE else file


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds by file and tier."""

    seconds: Mapping[str, Mapping[str, float]]

    def seconds_of(self, file: str) -> float:
        return sum(self.seconds.get(file, {}).values())

    def makespan(self, tiers: set[str], workers: int) -> float:
        """Seconds until the last of `workers` is done, each taking the longest file that is left."""
        sizes = sorted((sum(by.get(t, 0.0) for t in tiers) for by in self.seconds.values()), reverse=True)
        free = [0.0] * workers
        for size in sizes:
            heapq.heapreplace(free, free[0] + size)
        return max(free)


def read() -> Durations:
    return Durations(json.loads(FILE.read_text())["seconds"] if FILE.exists() else {})


def write(took: Mapping[tuple[str, str], float]) -> None:
    """Records a run's files; what it didn't run stays as it was."""
    known = {file: dict(by) for file, by in read().seconds.items() if (ROOT / file).exists()}
    for (file, tier), seconds in took.items():
        known.setdefault(file, {})[tier] = round(seconds / pace(), 1)
    kept = {file: by for file, by in sorted(known.items()) if sum(by.values()) >= 0.5}
    FILE.write_text(json.dumps({"recorded": time.strftime("%Y-%m-%d"), "seconds": kept}, indent=1) + "\n")


def tiers_of(markers: str) -> set[str]:
    """What an expression of markers (`-m`) lets run."""
    if f"not {MARKER}" in markers:
        return {TEST}
    return {REST} if MARKER in markers.split() else {TEST, REST}


def header(markers: str, workers: int) -> list[str]:
    """Lines before the first test."""
    if not FILE.exists():
        return []
    tiers = tiers_of(markers)
    seconds = read().makespan(tiers, workers)
    here = f"about {_minutes(seconds)} on two idle cores"
    if pace() >= 1.2:
        here += f", about {_minutes(seconds * pace())} on this machine as it is now"
    return [*(WHAT[tier] for tier in sorted(tiers, reverse=True)), f"all of tests/, by {workers} at a time: {here}"]


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"
