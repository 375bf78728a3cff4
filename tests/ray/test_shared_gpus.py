"""Ray hands out GPUs as runtime/fit.py says it will: on a local Ray with 8 GPUs that aren't there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.errors import InputError
from rlaif_ray.rollout.vllm_engine import engine_arguments
from rlaif_ray.runtime.actors import Actor
from rlaif_ray.runtime.fit import place
from rlaif_ray.runtime.placement import actor_slots, reserve
from rlaif_ray.runtime.weight_sync import must_share_gpus
from tests.jobs import embedded
from tests.pace import scaled
from tests.unit.rollout.test_support import SPEC

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

GPUS = 8


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # vLLM for CPU sets it in a process that imports it
        start(ray)
    yield ray
    ray.shutdown()


def start(ray: Any) -> None:
    ray.init(
        address="local",
        num_cpus=32,
        num_gpus=GPUS,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"replicas": 4}, "judges": 4, "learner": {"ranks": 4}, "cluster": {"gpus_per_actor": 0.33}},
        {"rollout": {"replicas": 2}, "judges": 1, "learner": {"ranks": 3}, "cluster": {"gpus_per_actor": 0.5}},
        {"rollout": {"tensor_parallel": 4}, "judges": 2, "learner": {"ranks": 2}, "cluster": {"gpus_per_actor": 0.5}},
        {"rollout": {"replicas": 1}, "judges": 1, "learner": {"ranks": 2}},
    ],
    ids=["three-a-gpu", "uneven", "parallel-and-shared", "a-gpu-each"],
)
def test_gpus_are_shared_as_planned(ray: Any, sections: dict[str, Any]) -> None:
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    feedback = {"type": "judge", "judge": {"replicas": sections.pop("judges")}}
    job = embedded(TrainJob, {"feedback": feedback, **sections})
    slots = actor_slots(job, "cuda")
    _, planned = place(slots, GPUS)
    group = reserve(slots, timeout_s=scaled(60))

    @ray.remote
    def gpus() -> list[int]:
        return [int(gpu) for gpu in ray.get_gpu_ids()]

    asked = [
        gpus.options(  # type: ignore[attr-defined]
            num_cpus=slot.cpus, num_gpus=slot.gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group, k)
        ).remote()
        for k, slot in enumerate(slots)
    ]
    tenants: dict[int, list[str]] = {}
    for slot, given in zip(slots, ray.get(asked, timeout=scaled(120)), strict=True):
        for gpu in given:
            tenants.setdefault(gpu, []).append(slot.role)
    remove_placement_group(group)
    assert sorted(sorted(roles) for roles in tenants.values()) == sorted(sorted(roles) for roles in planned)


@pytest.mark.parametrize(("ranks", "lacks"), [(4, None), (3, "rollout engine 3")])
def test_an_engine_gets_weights_from_the_rank_of_its_gpu(ray: Any, ranks: int, lacks: str | None) -> None:
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    sections = {"rollout": {"replicas": 4}, "learner": {"ranks": ranks}, "cluster": {"gpus_per_actor": 0.33}}
    job = embedded(TrainJob, {"feedback": {"type": "judge", "judge": {"replicas": 4}}, **sections})
    slots = actor_slots(job, "cuda")
    group = reserve(slots, timeout_s=scaled(60))
    actors = [
        ray.remote(
            num_cpus=slot.cpus, num_gpus=slot.gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group, k)
        )(Actor).remote()
        for k, slot in enumerate(slots)
    ]
    gpus = dict(zip(slots, ray.get([actor.gpus.remote() for actor in actors], timeout=scaled(120)), strict=True))
    for actor in actors:
        ray.kill(actor)
    remove_placement_group(group)
    own = [given for slot, given in gpus.items() if slot.role == "learner"]
    engines = [(f"rollout engine {slot.index}", given) for slot, given in gpus.items() if slot.role == "rollout"]
    assert all(len(given) == 1 for given in gpus.values())
    if lacks is None:
        must_share_gpus(own, engines)
    else:
        with pytest.raises(InputError, match=rf"got none on GPU . of {lacks}; the ranks have ., ., .\)"):
            must_share_gpus(own, engines)


def test_a_tensor_parallel_engine_drives_the_gpus_of_its_bundle(ray: Any) -> None:
    """By processes of its own. Left to itself vLLM would take Ray's executor there, which asks for a bundle per GPU."""
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    job = embedded(
        TrainJob, {"feedback": {"type": "judge", "judge": {"replicas": 1}}, "rollout": {"tensor_parallel": 2}}
    )
    slots = actor_slots(job, "cuda")
    group = reserve(slots, timeout_s=scaled(60))
    (engine,) = [k for k, slot in enumerate(slots) if slot.role == "rollout"]

    @ray.remote
    def executors(arguments: dict[str, Any]) -> list[tuple[str, bool]]:
        """What the real ParallelConfig chooses on a node with CUDA, without our argument and with it."""
        from unittest.mock import patch

        from vllm.config import parallel
        from vllm.platforms.cpu import CpuPlatform

        class Cuda(CpuPlatform):
            def is_cuda(self) -> bool:
                return True

            @classmethod
            def device_count(cls) -> int:
                return 2

        with patch.object(parallel, "current_platform", Cuda()):
            chosen = [parallel.ParallelConfig(tensor_parallel_size=2), parallel.ParallelConfig(**arguments)]
        return [(str(config.distributed_executor_backend), config.use_ray) for config in chosen]

    strategy = PlacementGroupSchedulingStrategy(group, engine, placement_group_capture_child_tasks=True)
    given = engine_arguments(replace(SPEC, device="cuda", tensor_parallel=2))
    arguments = {key: given[key] for key in ("tensor_parallel_size", "distributed_executor_backend")}
    asked = executors.options(num_cpus=slots[engine].cpus, num_gpus=2, scheduling_strategy=strategy).remote(arguments)  # type: ignore[attr-defined]
    assert ray.get(asked, timeout=scaled(240)) == [("ray", True), ("mp", False)]
    remove_placement_group(group)
