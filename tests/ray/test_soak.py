"""Hundreds of steps under random kills: nothing lost, doubled, stale, leaked or left behind. `make soak` runs it."""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ray.test_faults import SHORT, assert_whole, struck
from tests.runs import Program, rows, start, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(5400)]

STEPS = 300
FAULTS = 24
SETTLED = 0.3  # of a process's samples are warming up
GROWTH_MB = 40  # of a process over hundreds of steps, allocator's noise included


def random_faults(seed: int) -> list[dict[str, Any]]:
    """Kills of anybody in any phase; one in four only stops its process."""
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(3, STEPS - 3), FAULTS))
    phases = ("rollout", "feedback", "annotate", "update", "weight_sync")
    who = ("rollout engine 0", "rollout engine 1", "judge engine 0", "learner rank 0")
    return [
        {
            "step": step,
            "phase": draw.choice(phases),
            "who": draw.choice(who),
            "signal": draw.choice(("SIGKILL", "SIGKILL", "SIGKILL", "SIGSTOP")),
        }
        for step in steps
    ]


@dataclass
class Memory:
    """What every process of a program holds, every two seconds."""

    program: Program
    samples: dict[tuple[int, str], list[float]] = field(default_factory=lambda: defaultdict(list))  # MB by process

    def __enter__(self) -> Memory:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(2):
            for process in self.program.processes():
                try:
                    name = process.cmdline()[0].split("/")[-1]
                    self.samples[process.pid, name].append(process.memory_full_info().uss / 1e6)
                except (psutil.Error, IndexError):  # gone meanwhile
                    continue

    def growth(self) -> dict[tuple[int, str], float]:
        """MB from the first third of what follows warming up to the last, of processes that lived for minutes."""
        found = {}
        for process, held in self.samples.items():
            settled = held[int(len(held) * SETTLED) :]
            third = len(settled) // 3
            if third >= 15:
                found[process] = statistics.median(settled[-third:]) - statistics.median(settled[:third])
        return found


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program, Memory, set[str]]:
    folder = tmp_path_factory.mktemp("soak")
    run_dir = folder / "soak"
    settings = (*SHORT, "rollout.replicas=2", f"steps={STEPS}", "checkpoint.every=5", "cluster.learner_restarts=99")
    shared = {path.name for path in Path("/dev/shm").iterdir()}
    faults = json.dumps(random_faults(seed=1))
    command = [sys.executable, "-m", "tests.faults", faults, "train", run_dir, tiny_config(folder), *settings]
    # oneDNN keeps up to 1,024 kernels, one for each shape it meets (600 MB on the way there): growth, and no leak.
    program = start(command, run_dir.with_suffix(".out"), {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"})
    began = time.monotonic()
    try:
        with Memory(program) as memory:
            program.wait(5000)
    finally:
        program.kill()
    print(f"\n{STEPS} steps and {FAULTS} faults in {time.monotonic() - began:.0f} s")
    return run_dir, program, memory, {path.name for path in Path("/dev/shm").iterdir()} - shared


def test_it_ends_well_and_leaves_nothing_behind(soak: tuple[Path, Program, Memory, set[str]]) -> None:
    run_dir, program, _, shared = soak
    assert program.exit_code == 0, program.stderr[-3000:] + program.stdout[-3000:]
    assert program.left_over == []
    assert not {name for name in shared if "rlaif" in name or "psm" in name or "vllm" in name.lower()}, shared
    assert len(struck(run_dir)) == FAULTS
    assert all(fault["pids"] for fault in struck(run_dir))


def test_every_step_is_accounted_for(soak: tuple[Path, Program, Memory, set[str]]) -> None:
    run_dir, _, _, _ = soak
    assert_whole(run_dir, STEPS)
    assert rows(run_dir / "metrics.jsonl")[-1]["rollout/quarantined"] == 0


def test_memory_stays_flat(soak: tuple[Path, Program, Memory, set[str]]) -> None:
    _, _, memory, _ = soak
    growth = memory.growth()
    for (pid, name), grown in sorted(growth.items(), key=lambda one: -one[1]):
        held = memory.samples[pid, name]
        print(f"{name} {pid}: {held[int(len(held) * SETTLED)]:.0f} MB, {grown:+.1f} MB over {2 * len(held)} s")
    assert any("python" in name for _, name in growth), "the driver is among them"
    assert {process: grown for process, grown in growth.items() if grown > GROWTH_MB} == {}
