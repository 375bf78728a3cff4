"""Which GPUs Ray gives to the actors of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlaif_ray.runtime.placement import Slot
from tests.pace import scaled


def gpus_of_slots(group: Any, slots: Sequence[Slot]) -> list[list[int]]:
    """Of each slot of a placement group that has their bundles, from a task that asks for what its actor would."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote
    def gpus() -> list[int]:
        return [int(gpu) for gpu in ray.get_gpu_ids()]

    asked = [
        gpus.options(  # type: ignore[attr-defined]
            num_cpus=slot.cpus,
            num_gpus=slot.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, slot.bundle),
        ).remote()
        for slot in slots
    ]
    return list(ray.get(asked, timeout=scaled(180)))
