"""The steps of first_quarter_hour.sh in their order: what each runs, and how long it may take.

No GPU has run them yet: `usual_s` is an estimate from a CPU and from what others report of an H200.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
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
    """Checks first, cheapest first; then the figures. A rehearsal on a CPU has tiny sizes and more time."""
    figures = f"{PYTHON} -m tests.gpu.figures --models {MODELS}" + (" --rehearse" if rehearsal else "")
    found = [
        Step("unpack", "check", "what was carried is unpacked", "bash tests/gpu/unpack.sh", 60, 120),
        Step("versions", "check", "versions; every library imports and uses the GPU", _module("versions"), 35, 90),
        _test("packed_attention", "packed attention in bf16, values and gradients", 40, 90),
        _test("learner_bf16", "bf16 learner: ZeRO 0 against 3, long prompts, checkpointing", 70, 150),
        _test("ipc_sync", "weights by CUDA IPC, tied and untied, CUDA graphs, V2 model runner", 130, 220),
        _test("ipc_memory", "ten pushes, and ten that nobody receives: memory stays", 60, 120),
        _test("sleep_wake", "sleep, update, wake, generate; a judge's log-probabilities", 110, 180),
        _test("end_to_end", "the job of configs/cluster/1gpu.yaml, KV cache by plan", 140, 240),
        *(_figure(figures, "learner", size, s) for size, s in (("135m", 35), ("1b", 45), ("8b", 90))),
        *(_figure(figures, "sync", size, s) for size, s in (("135m", 60), ("1b", 60), ("8b", 90))),
        _figure(figures, "rollout", "1b", 75),
        _figure(figures, "judge", "1b", 75),
    ]
    if rehearsal:
        found = [s for s in found if s.name != "sleep_wake"]  # needs CUDA itself
        found = [Step(s.name, s.kind, s.shows, s.command, 15 * s.usual_s, 15 * s.limit_s) for s in found]
    return found


def _module(name: str) -> str:
    return f"{PYTHON} -m tests.gpu.{name}"


def _test(name: str, shows: str, usual_s: float, limit_s: float) -> Step:
    # A test that hangs says where before its step is ended.
    options = f"-x -q -p no:cacheprovider --durations=5 -o faulthandler_timeout={usual_s * 0.8:g}"
    return Step(name, "check", shows, f"{PYTHON} -m pytest tests/gpu/test_{name}.py {options}", usual_s, limit_s)


def _figure(command: str, what: str, size: str, usual_s: float) -> Step:
    shows = {
        "learner": "MFU of an update",
        "sync": "seconds of a push",
        "rollout": "rollout tokens/s against plain vLLM",
        "judge": "judge tokens/s against plain vLLM",
    }[what]
    return Step(f"{what}_{size}", "figure", f"{shows}, {size}", f"{command} --sizes {size} --only {what}", usual_s, 150)
