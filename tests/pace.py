"""How slow this machine is, so that no deadline in a test depends on how fast the machine was that it was written on.

`pace()` is 1 on two idle cores like those and larger on slower, fewer or busier ones. Deadlines are multiplied by it:
`scaled(5)` is five seconds there. The first process of a test run measures it; the others are told.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time

VARIABLE = "RLAIF_TEST_PACE"
CORES = 2  # of the machine that deadlines and recorded durations are for
REFERENCE_S = 0.16  # what `_work` takes there
LARGEST = 20.0


def pace() -> float:
    """Times that this machine takes as long as the reference; at least 1."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = f"{measure():.2f}"  # inherited by every process of this run
    return float(os.environ[VARIABLE])


def scaled(seconds: float) -> float:
    """A deadline of the reference machine on this one."""
    return seconds * pace()


def measure() -> float:
    """The time of a round over the reference's, times the cores that are missing. A busy core counts as a slow
    one: the wall clock is read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slower = statistics.median(_work() for _ in range(3)) / REFERENCE_S
    return min(LARGEST, max(1.0, slower) * max(1.0, CORES / cores))


def _work() -> float:
    """Seconds of a fixed amount of what tests are made of: Python and a little hashing."""
    began = time.perf_counter()
    total = 0
    for number in range(1_800_000):
        total += number * number % 7
    hashlib.sha256(bytes(total % 256 for _ in range(1000)) * 40_000).digest()
    return time.perf_counter() - began
