"""`rlaif train` or `rlaif sft` with faults: a program that runs the real job and, as its loop enters a phase, sends a
real signal to one of its processes. Run as `python -m tests.faults FAULTS JOB RUN_DIR CONFIG... key=value...`; FAULTS
is a JSON list.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from rlaif_ray.config.load import load_job
from rlaif_ray.pipelines import rl, supervised
from rlaif_ray.runtime import cluster as clusters
from rlaif_ray.tracking import StepMetrics, Tracker
from tests.pace import scaled


class Faults:
    """Each is {"step", "phase", "who", "signal"}: `who` is such as "rollout engine 0", "learner rank 1", or "core of
    rollout engine 0" for vLLM's own process beside the actor's. With "forever" whoever takes its place is struck too.
    """

    def __init__(self, faults: list[dict[str, Any]], log: Path) -> None:
        self.faults, self.log = faults, log
        self.cluster: Any = None

    def strike(self, step: int, phase: str) -> None:
        if any((f["step"], f["phase"]) == (step, phase) for f in self.faults):
            self.wait_until_all_are_there()
        for fault in [f for f in self.faults if (f["step"], f["phase"]) == (step, phase)]:
            self.faults.remove(fault)  # once: the step may be done again
            pids = self.pids(fault["who"])
            children = [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
            for pid in pids:
                os.kill(pid, getattr(signal, fault["signal"]))
            with self.log.open("a") as file:
                file.write(json.dumps({**fault, "pids": pids}) + "\n")
            watch = self.strike_on if fault.get("forever") else self.follow
            threading.Thread(target=watch, args=(fault, self.struck(fault["who"]), children), daemon=True).start()

    def follow(self, fault: dict[str, Any], struck: list[Any], children: list[psutil.Process]) -> None:
        """Writes down in how many seconds the loss was noticed, and all were there again; and what processes of those
        that were struck lived on."""
        began = time.monotonic()
        while not all(w.lost for w in struck):
            time.sleep(0.05)
        noticed_s = time.monotonic() - began
        _, orphans = psutil.wait_procs(children, timeout=scaled(5))
        while not self.at_full_strength():
            time.sleep(0.05)
        line = {**fault, "noticed_s": round(noticed_s, 2), "back_s": round(time.monotonic() - began, 2)}
        line["orphans"] = [" ".join(orphan.cmdline()) for orphan in orphans if orphan.is_running()]
        with self.log.with_suffix(".followed.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def strike_on(self, fault: dict[str, Any], struck: list[Any], children: list[psutil.Process]) -> None:
        """Until the run ends."""
        while True:
            for watched in self.struck(fault["who"]):
                if watched not in struck and watched.last is not None:
                    struck.append(watched)
                    os.kill(watched.last.pid, getattr(signal, fault["signal"]))
            time.sleep(0.05)

    def struck(self, who: str) -> list[Any]:
        return [w for w in self.cluster._watch._watched if w.name.startswith(who.removeprefix("core of "))]

    def at_full_strength(self) -> bool:
        """Whether every replica and rank is there and has been heard."""
        there = all(len(r.usable()) == r.count for r in self.cluster._replicas)
        return there and all(w.last is not None and w.lost is None for w in self.cluster._watch._watched)

    def pids(self, who: str) -> list[int]:
        found = [w.last.pid for w in self.struck(who) if w.last]
        if not who.startswith("core of "):
            return found
        children = [child for pid in found for child in psutil.Process(pid).children(recursive=True)]
        return [child.pid for child in children if "EngineCore" in " ".join(child.cmdline())]

    def wait_until_all_are_there(self) -> None:
        """So that every fault meets a full set: engines take longer to start than steps do."""
        deadline = time.monotonic() + scaled(150)
        while time.monotonic() < deadline:
            if self.at_full_strength():
                return
            time.sleep(0.2)
        raise AssertionError("the replicas are not at full strength again")


JOBS = {"train": rl.train_rl, "sft": supervised.fine_tune}


def main(faults: Faults, job: str, run_dir: Path, arguments: list[str]) -> None:
    real_init, real_phase, real_step, real_outside = (
        clusters.Cluster.__init__,
        StepMetrics.phase,
        Tracker.step,
        Tracker.phase,
    )
    current = [0]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real_init(self, *args, **kwargs)
        faults.cluster = self

    @contextmanager
    def step(self: Any, number: int) -> Any:
        current[0] = number
        with real_step(self, number) as metrics:
            yield metrics

    @contextmanager
    def phase(self: Any, name: str) -> Any:
        with real_phase(self, name):
            faults.strike(current[0], name)
            yield

    @contextmanager
    def outside(self: Any, name: str) -> Any:
        with real_outside(self, name):
            if self._current is None:
                faults.strike(current[0], name)
            yield

    clusters.Cluster.__init__ = init  # type: ignore[method-assign]
    StepMetrics.phase, Tracker.step, Tracker.phase = phase, step, outside  # type: ignore[method-assign,assignment]
    files = [Path(a) for a in arguments if "=" not in a]
    JOBS[job](load_job(job, files, [*(a for a in arguments if "=" in a), f"run_dir={run_dir}"]))


if __name__ == "__main__":
    given, kind, folder, *rest = sys.argv[1:]
    main(Faults(json.loads(given), Path(f"{folder}.faults.jsonl")), kind, Path(folder), rest)
