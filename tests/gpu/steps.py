"""The steps of first_quarter_hour.sh in their order: what each runs, and how long it may take.

No GPU has run them yet: `usual_s` is an estimate from a CPU and from what others report of an H200.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

PYTHON = shlex.quote(sys.executable)
MODELS = '"$RLAIF_GPU_MODELS"'  # a folder that the figures share, so that no model is made twice


@dataclass(frozen=True)
class Step:
    """One command with a time limit."""

    name: str
    kind: Literal["check", "figure"]
    shows: str
    command: str  # for bash, at the repository's root
    usual_s: float
    limit_s: float


def all_steps(*, rehearsal: bool) -> list[Step]:
    """Checks first, cheapest first; then the figures, in the order of their worth. A rehearsal on a CPU has tiny sizes
    and more time."""
    figures = f"{PYTHON} -m tests.gpu.figures --models {MODELS}" + (" --rehearse" if rehearsal else "")
    slower = 15 if rehearsal else 1
    test = partial(_test, slower=slower)
    found = [
        Step("unpack", "check", "what was carried is unpacked", "bash tests/gpu/unpack.sh", 40, 90),
        Step("versions", "check", "versions; every library imports and uses the GPU", _module("versions"), 25, 60),
        test("packed_attention", "packed attention in bf16, values and gradients", 30, 60),
        test("learner_bf16", "bf16 learner: ZeRO 0 against 3, long prompts, checkpointing", 45, 90),
        test(
            "weights",
            "weights by CUDA IPC, tied and untied, CUDA graphs, V2 model runner; ten pushes, and ten that nobody "
            "receives: memory stays; sleep, update, wake, generate; a judge's log-probabilities",
            130,
            200,
            files=("ipc_sync", "ipc_memory", "sleep_wake"),
        ),
        test("end_to_end", "the job of configs/cluster/1gpu.yaml, KV cache by plan", 110, 190),
        _figure(figures, "learner", "8b", 70, 110),
        _figure(figures, "sync", "8b", 75, 115),
        _figure(figures, "judge", "1b", 70, 110),
        _figure(figures, "rollout", "1b", 70, 110),
        _figure(figures, "learner", "1b", 35, 60),
        _figure(figures, "sync", "1b", 60, 90),
        _figure(figures, "learner", "135m", 30, 60),
        _figure(figures, "sync", "135m", 60, 90),
    ]
    return [Step(s.name, s.kind, s.shows, s.command, slower * s.usual_s, slower * s.limit_s) for s in found]


def _module(name: str) -> str:
    return f"{PYTHON} -m tests.gpu.{name}"


def _test(name: str, shows: str, usual_s: float, limit_s: float, *, files: Sequence[str] = (), slower: int = 1) -> Step:
    # One that fails doesn't end the others, which may share engines with it; one that hangs says where before its step
    # is ended.
    options = f"-q -p no:cacheprovider --durations=5 -o faulthandler_timeout={usual_s * slower * 0.8:g}"
    paths = " ".join(f"tests/gpu/test_{file}.py" for file in files or (name,))
    return Step(name, "check", shows, f"{PYTHON} -m pytest {paths} {options}", usual_s, limit_s)


def _figure(command: str, what: str, size: str, usual_s: float, limit_s: float) -> Step:
    shows = {
        "learner": "MFU of an update",
        "sync": "seconds of a push",
        "rollout": "rollout tokens/s against plain vLLM",
        "judge": "judge tokens/s against plain vLLM",
    }[what]
    run = f"{command} --sizes {size} --only {what}"
    return Step(f"{what}_{size}", "figure", f"{shows}, {size}", run, usual_s, limit_s)
