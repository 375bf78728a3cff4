"""Ray places what runtime/fit.py says it will, as it says, and never what runtime/places.py says it won't: on two nodes
with two GPUs each that aren't there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.errors import PlacementError
from rlaif_ray.runtime.fit import place
from rlaif_ray.runtime.placement import Slot, actor_slots, bundles_of, nodes_of, reserve
from rlaif_ray.runtime.places import layout_problems, unplaceable
from tests.jobs import embedded
from tests.pace import scaled
from tests.placed import gpus_of_slots

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

NODES, GPUS = 2, 2


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 32, "num_gpus": GPUS, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # vLLM for CPU sets it in a process that imports it
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        for _ in range(NODES - 1):
            cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    cluster.shutdown()


def slots_of(share: float, rollouts: int, judges: int, ranks: int, parallel: int = 1) -> list[Slot]:
    """`parallel` is the judges': a tensor-parallel rollout engine gets no weights where others share GPUs."""
    sections: dict[str, Any] = {
        "rollout": {"replicas": rollouts},
        "feedback": {"type": "judge", "judge": {"replicas": judges, "tensor_parallel": parallel}},
        "learner": {"ranks": ranks},
        "cluster": {"gpus_per_actor": share},
        "sampling": {"prompts_per_step": 16},
    }
    job = embedded(TrainJob, sections)
    slots = actor_slots(job, "cuda")
    assert not list(layout_problems(job, slots, "cuda"))
    return slots


PLACED = {
    "eight-of-0.4": (0.4, 3, 1, 4),
    "thirds": (0.33, 4, 4, 4),
    "of-0.3": (0.3, 2, 3, 2),
    "quarters": (0.25, 1, 6, 1),
    "uneven": (0.5, 2, 1, 3),
    "more-engines-than-ranks": (0.33, 2, 1, 1),
    "parallel-beside-shared": (0.5, 2, 1, 2, 2),
    "a-gpu-each": (1.0, 1, 1, 2),
    "parallel-on-each-node": (1.0, 1, 1, 1, 2),
}
NEVER = {
    "five-gpus": (1.0, 2, 1, 2),
    "parallel-over-nodes": (1.0, 1, 1, 1, 4),
    "no-room-beside": (0.4, 3, 1, 3, 2),
}


@pytest.mark.parametrize("layout", PLACED.values(), ids=PLACED)
def test_what_is_planned_is_placed(ray: Any, layout: tuple[Any, ...]) -> None:
    from ray.util.placement_group import remove_placement_group

    slots = slots_of(*layout)
    assert unplaceable(bundles_of(slots), [GPUS] * NODES, no_more=True) == []
    nodes, tenants = place(slots, GPUS)
    group = reserve(slots, timeout_s=scaled(30))
    where = nodes_of(group)
    given = gpus_of_slots(group, slots)
    remove_placement_group(group)
    found: dict[tuple[str, int], list[str]] = {}
    on_node: dict[str, list[str]] = {}
    for slot, own in zip(slots, given, strict=True):
        on_node.setdefault(where[slot.bundle], []).append(slot.role)
        for gpu in own:
            found.setdefault((where[slot.bundle], gpu), []).append(slot.role)
    assert sorted(sorted(roles) for roles in found.values()) == sorted(sorted(roles) for roles in tenants)
    assert len(on_node) == len(nodes)
    if any(bundle.gpus > 1 for bundle in bundles_of(slots)):  # of bundles that are alike Ray may take others first
        planned = [sorted(role for role, count in node.items() for _ in range(count)) for node in nodes]
        assert sorted(sorted(roles) for roles in on_node.values()) == sorted(planned)


@pytest.mark.parametrize("layout", NEVER.values(), ids=NEVER)
def test_what_is_refused_is_never_placed(ray: Any, layout: tuple[Any, ...]) -> None:
    slots = slots_of(*layout)
    assert unplaceable(bundles_of(slots), [GPUS] * NODES, no_more=True)
    with pytest.raises(PlacementError):
        reserve(slots, timeout_s=2)
