"""Pushing costs no memory: ten pushes to an engine, and ten that nobody receives, leave a GPU's free memory as it was.

A CUDA IPC handle that nobody opens keeps the memory behind it: a lost engine would cost a model a push.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.actors import Pair, engine_spec, local_ray, running_engine, running_pair
from tests.gpu.device import REHEARSAL, gpu_model
from tests.gpu.record import record

pytestmark = pytest.mark.gpu

PUSHES = 10
HIDDEN = 256 if REHEARSAL else 2048  # on a GPU 270 MB of weights: one leak shows


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    model = gpu_model(hidden=HIDDEN)
    with local_ray(), running_engine(engine_spec(model)) as engines, running_pair(engines, model=model) as connected:
        yield connected


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


def growth(pair: Pair, first: int) -> tuple[int, int]:
    """(bytes by which `PUSHES` pushes grew what is in use, bytes of one push); one push before them is free."""
    size = pair.sync.push(first).bytes
    before = taken(pair)
    for version in range(first + 1, first + 1 + PUSHES):
        pair.sync.push(version)
    return taken(pair) - before, size


def test_ten_pushes(pair: Pair) -> None:
    grown, size = growth(pair, 0)
    record({"figure": {"name": "memory of ten pushes", "grown_mib": grown >> 20, "model_mib": size >> 20}})
    assert grown < 0.5 * size + 2**25


def test_ten_pushes_without_a_consumer(pair: Pair) -> None:
    """After the one above: its engine is lost, and no other comes."""
    pair.engines.replicas.stop()
    assert not pair.engines.actors
    grown, size = growth(pair, 100)
    record({"figure": {"name": "memory of ten pushes to nobody", "grown_mib": grown >> 20, "model_mib": size >> 20}})
    assert grown < 0.5 * size + 2**25
