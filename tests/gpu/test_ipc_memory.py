"""Pushing costs no memory: ten pushes to an engine, and ten that nobody receives, leave a GPU's free memory as it was.

A CUDA IPC handle that nobody opens keeps the memory behind it: a lost engine would cost a model a push.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.actors import Pair
from tests.gpu.device import REHEARSAL
from tests.gpu.record import record
from tests.gpu.settling import settled

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("pair", ["tied"], indirect=True)]

PUSHES = 10


def taken(pair: Pair) -> int:
    """Bytes in use on the GPU, by whomever; in a rehearsal the learner's own."""
    if not REHEARSAL:
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free
    import ray

    pid, _ = ray.get(pair.learner.actors[0].process.remote())
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def growth(pair: Pair) -> tuple[int, int]:
    """(bytes by which `PUSHES` pushes grew what is in use, bytes of one push); one push before them is free."""
    size = pair.push().bytes
    before = settled(lambda: taken(pair), within=2**20)
    for _ in range(PUSHES):
        pair.push()
    return taken(pair) - before, size


def test_ten_pushes(pair: Pair) -> None:
    grown, size = growth(pair)
    record({"figure": {"name": "memory of ten pushes", "grown_mib": grown >> 20, "model_mib": size >> 20}})
    assert grown < 0.5 * size + 2**25


def test_ten_pushes_without_a_consumer(pair: Pair) -> None:
    """The last test of its pair: the engine is lost, and no other comes."""
    pair.engines.replicas.stop()
    assert not pair.engines.actors
    grown, size = growth(pair)
    record({"figure": {"name": "memory of ten pushes to nobody", "grown_mib": grown >> 20, "model_mib": size >> 20}})
    assert grown < 0.5 * size + 2**25
