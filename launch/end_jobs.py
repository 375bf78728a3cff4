#!/usr/bin/env python3
"""Ends this user's rlaif jobs on this machine or in this container, and waits until their checkpoints are written.

    python launch/end_jobs.py 930

What ends a container tells only its first process, which is Ray: it takes its jobs with it at once. So this runs before
that, as a pod's preStop hook (cluster/kuberay-*.yaml) or before `docker stop`. Each job gets SIGTERM, once. Where there
are only actors of a job, on a node without its driver, it waits until they have ended with the job.
Exit code 1 when something is left after so many seconds.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path, PurePath

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's package; it need not be installed here

from rlaif_ray.output import say, survive_lost_output

ACTORS = tuple(f"ray::{name}" for name in ("EngineActor", "LearnerActor", "RewardModelActor"))
POLL_S = 0.2


def is_driver(words: list[str]) -> bool:
    """Whether it is Python that runs rlaif; a shell that started it has the name in its command line as well."""
    if len(words) < 2 or not PurePath(words[0]).name.startswith("python"):
        return False
    module = any(words[k : k + 2] == ["-m", "rlaif_ray.cli"] for k in range(1, len(words)))
    return module or PurePath(words[1]).name == "rlaif"


def running() -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Drivers, and actors, of this user's jobs."""
    drivers, actors = [], []
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = process.cmdline()
        except psutil.Error:  # it has ended meanwhile
            continue
        if is_driver(words):
            drivers.append(process)
        elif words and words[0].startswith(ACTORS):
            actors.append(process)
    return drivers, actors


def main(limit_s: float) -> int:
    deadline = time.monotonic() + limit_s
    drivers, actors = running()
    for driver in drivers:
        if driver.ppid() not in {other.pid for other in drivers}:  # what it forked ends with it
            with suppress(psutil.NoSuchProcess):
                driver.send_signal(signal.SIGTERM)
    say(f"end_jobs: waiting for {len(drivers)} jobs and {len(actors)} actors, {limit_s:g} s at most")
    while drivers or actors:
        if time.monotonic() > deadline:
            left = ", ".join(str(process.pid) for process in drivers + actors)
            say(f"end_jobs: still running after {limit_s:g} s: processes {left}")
            return 1
        time.sleep(POLL_S)
        drivers, actors = running()
    return 0


if __name__ == "__main__":
    survive_lost_output()
    sys.exit(main(float(sys.argv[1])))
