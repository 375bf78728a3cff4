"""vLLM's sleep mode frees the engine's GPU memory for the learner; after waking (and a sync) it is the same engine.

Level 1 keeps the weights in host memory. Level 2 drops them: only a sync brings them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.gpu.actors import TIMEOUT_S, Pair, engine_spec, local_ray, running_engine, running_pair
from tests.gpu.device import gpu_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["told", "of itself"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """An engine that sleeps when it is told, and one that does between calls (`rollout.sleep`)."""
    spec = engine_spec(gpu_model(), enable_sleep_mode=True)
    if request.param == "of itself":
        spec = replace(spec, sleep=True)
    with local_ray(), running_engine(spec) as engines, running_pair(engines) as connected:
        connected.sync.push(0)
        yield connected


def inside(pair: Pair, function: Any) -> Any:
    """`function` of the engine, run in its process. Nothing runs there meanwhile."""
    import ray

    (actor,) = pair.engines.actors
    return ray.get(actor.__ray_call__.remote(lambda self: function(self._engine)), timeout=TIMEOUT_S)


def fall_asleep(pair: Pair, level: int) -> int:
    """Bytes of GPU memory that this frees; of one that is asleep already, those it took when it woke."""
    import torch

    if inside(pair, lambda engine: engine._spec.sleep):
        asleep = torch.cuda.mem_get_info()[0]
        inside(pair, lambda engine: engine._wake("weights", "kv_cache"))
        taken = int(asleep - torch.cuda.mem_get_info()[0])
        inside(pair, lambda engine: engine._sleep())
        return taken
    before = torch.cuda.mem_get_info()[0]
    inside(pair, lambda engine: engine._llm.sleep(level) and None)
    return int(torch.cuda.mem_get_info()[0] - before)


def wake(pair: Pair) -> None:
    inside(pair, lambda engine: None if engine._spec.sleep else engine._llm.wake_up() and None)


def test_level_1_wakes_as_it_was(pair: Pair) -> None:
    said = pair.greedy()
    assert fall_asleep(pair, 1) > 2**29, "sleeping must free the key-value cache of 1 GiB"
    wake(pair)
    assert pair.greedy() == said


@pytest.mark.parametrize("level", [1, 2])
def test_wakes_and_takes_the_same_weights_again(pair: Pair, level: int) -> None:
    pair.sync.push(1)
    said = pair.greedy()
    assert fall_asleep(pair, level) > 2**29
    wake(pair)
    pair.sync.push(2)
    assert pair.greedy() == said


@pytest.mark.parametrize("level", [1, 2])
def test_wakes_and_takes_new_weights(pair: Pair, level: int) -> None:
    """The learner trains while the engine sleeps, as in a colocated step."""
    pair.sync.push(3)
    said = pair.greedy()
    experience = pair.experience(seed=level)
    fall_asleep(pair, level)
    pair.learner.update(experience)
    wake(pair)
    pair.sync.push(4)
    assert pair.greedy() != said
    assert pair.gap(seed=level) < 0.06
