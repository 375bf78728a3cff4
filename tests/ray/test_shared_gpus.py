"""GPUs that actors share, on a local Ray with 8 of them that aren't there: Ray hands them out as runtime/fit.py says it
will, and who shares one loads on it in turn."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.errors import InputError
from rlaif_ray.rollout.vllm_engine import engine_arguments
from rlaif_ray.runtime.actors import Actor
from rlaif_ray.runtime.fit import place
from rlaif_ray.runtime.placement import Slot, actor_slots, reserve
from rlaif_ray.runtime.places import layout_problems
from rlaif_ray.runtime.turns import Turns, await_turn
from rlaif_ray.runtime.weight_sync import must_share_gpus
from tests.jobs import embedded
from tests.pace import scaled
from tests.placed import gpus_of_slots
from tests.unit.rollout.test_support import SPEC

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

GPUS = 8


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # vLLM for CPU sets it in a process that imports it
        start(ray)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this module
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
        {"rollout": {"replicas": 2}, "parallel": 4, "learner": {"ranks": 2}, "cluster": {"gpus_per_actor": 0.5}},
        {"rollout": {"replicas": 1}, "judges": 1, "learner": {"ranks": 2}},
    ],
    ids=["three-a-gpu", "uneven", "parallel-and-shared", "a-gpu-each"],
)
def test_gpus_are_shared_as_planned(ray: Any, sections: dict[str, Any]) -> None:
    from ray.util.placement_group import remove_placement_group

    sections = dict(sections)
    judge = {"replicas": sections.pop("judges", 1), "tensor_parallel": sections.pop("parallel", 1)}
    job = embedded(TrainJob, {"feedback": {"type": "judge", "judge": judge}, **sections})
    slots = actor_slots(job, "cuda")
    assert not list(layout_problems(job, slots, "cuda"))
    _, planned = place(slots, GPUS)
    group = reserve(slots, timeout_s=scaled(60))
    tenants: dict[int, list[str]] = {}
    for slot, given in zip(slots, gpus_of_slots(group, slots), strict=True):
        for gpu in given:
            tenants.setdefault(gpu, []).append(slot.role)
    remove_placement_group(group)
    assert sorted(sorted(roles) for roles in tenants.values()) == sorted(sorted(roles) for roles in planned)


@pytest.mark.parametrize(("share", "ranks", "lacks"), [(0.33, 4, None), (0.33, 3, None), (0.5, 3, "rollout engine 3")])
def test_an_engine_gets_weights_from_the_rank_of_its_gpu(ray: Any, share: float, ranks: int, lacks: str | None) -> None:
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    sections = {"rollout": {"replicas": 4}, "learner": {"ranks": ranks}, "cluster": {"gpus_per_actor": share}}
    job = embedded(TrainJob, {"feedback": {"type": "judge", "judge": {"replicas": 4}}, **sections})
    slots = actor_slots(job, "cuda")
    group = reserve(slots, timeout_s=scaled(60))
    actors = [
        ray.remote(
            num_cpus=slot.cpus,
            num_gpus=slot.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, slot.bundle),
        )(Actor).remote()
        for slot in slots
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
    (engine,) = [slot for slot in slots if slot.role == "rollout"]

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

    strategy = PlacementGroupSchedulingStrategy(group, engine.bundle, placement_group_capture_child_tasks=True)
    given = engine_arguments(replace(SPEC, device="cuda", tensor_parallel=2))
    arguments = {key: given[key] for key in ("tensor_parallel_size", "distributed_executor_backend")}
    asked = executors.options(num_cpus=engine.cpus, num_gpus=2, scheduling_strategy=strategy).remote(arguments)  # type: ignore[attr-defined]
    assert ray.get(asked, timeout=scaled(240)) == [("ray", True), ("mp", False)]
    remove_placement_group(group)


class Loader(Actor):
    """Of an engine: when it loads, and on which GPU. It is done only once somebody has begun on another GPU too."""

    def start(self, spec: Any, ahead: Sequence[Any] = ()) -> None:
        await_turn(ahead)
        ((_, gpu),) = self.gpus()
        began, folder = time.time(), Path(spec.engine_kwargs["folder"])
        (folder / gpu).touch()
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.1)
        time.sleep(0.5)
        self._loaded = (gpu, began, time.time())

    def loaded(self) -> tuple[Any, float, float]:
        return self._loaded


def test_who_shares_a_gpu_loads_on_it_in_turn(ray: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On two GPUs: both rollout engines load at the same time, each judge after the one of its GPU. So does one that
    takes the place of a lost one while another is loading there, whichever role it has."""
    from rlaif_ray.runtime import cluster as module

    monkeypatch.setattr(module, "EngineActor", Loader)
    two = {"replicas": 2, "engine_kwargs": {"folder": str(tmp_path)}}
    cluster = {"gpus_per_actor": 0.33, "device": "gpu", "start_timeout_s": scaled(120)}
    sections = {"rollout": two, "learner": {"ranks": 2}, "cluster": cluster}
    job = embedded(TrainJob, {"feedback": {"type": "judge", "judge": two}, **sections})
    with module.open_cluster(job) as opened:
        rollouts = opened.start_rollouts(job.policy, job.rollout, context=64)
        judges = opened.start_judges(job.feedback.judge, context=64)
        opened.wait()
        groups = {"rollout": rollouts.replicas, "judge": judges.replicas}
        first = times(ray, groups)
        assert len({gpu for gpu, _, _ in first.values()}) == 2
        for k in range(2):
            (gpu, _, ended), (other, began, _) = first["rollout", k], first["judge", k]
            assert gpu == other and began >= ended

        lost = {role: replicas.lost for role, replicas in groups.items()}
        for replicas in groups.values():  # both on the same GPU, as when it runs out of memory
            ray.kill(replicas.usable()[0].actor)
        deadline = time.monotonic() + scaled(120)
        while any(r.lost == lost[role] or len(r.usable()) < 2 for role, r in groups.items()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        again = times(ray, groups)
        one, other = sorted([again["rollout", 0], again["judge", 0]], key=lambda found: found[1])
        assert one[0] == other[0] == first["rollout", 0][0] and other[1] >= one[2]
        assert again["judge", 1] == first["judge", 1]


def times(ray: Any, groups: dict[str, Any]) -> dict[tuple[str, int], tuple[Any, float, float]]:
    """By role and number: (GPU, when it began to load, when it had)."""
    asked = {(role, k): actor.loaded.remote() for role, own in groups.items() for k, actor in enumerate(own.actors)}
    return dict(zip(asked, ray.get(list(asked.values()), timeout=scaled(60)), strict=True))


def test_one_that_fails_lets_the_next_go_on(ray: Any) -> None:
    """Its own failure is nobody else's: the next begins, instead of failing with it."""

    @ray.remote(num_cpus=0)
    class Starter:
        def start(self, ahead: list[Any]) -> str:
            await_turn(ahead)
            if not ahead:
                raise ValueError("out of memory")
            return "loaded"

    slots = [Slot(role, 0, 1.0, 0.5, 0) for role in ("rollout", "judge")]
    turns, actors = Turns(slots), [Starter.remote() for _ in slots]  # type: ignore[attr-defined]
    refs = [turns.start(slot, actor.start.remote)[0] for slot, actor in zip(slots, actors, strict=True)]
    assert ray.get(refs[1], timeout=scaled(120)) == "loaded"
    with pytest.raises(ray.exceptions.RayTaskError, match="out of memory"):
        ray.get(refs[0])
    assert turns.start(slots[0], list)[1] == []  # nobody is ahead any more


def test_what_can_never_be_placed_is_refused_at_once(ray: Any) -> None:
    from rlaif_ray.runtime.cluster import open_cluster

    for sections, told in (
        ({"rollout": {"replicas": 9}}, "needs 11 GPUs (this machine has 8)"),
        ({"rollout": {"replicas": 3}, "cluster": {"gpus_per_actor": 0.5}}, "none with engine 1, 2"),
    ):
        job = embedded(TrainJob, {**sections, "cluster": {"device": "gpu", **sections.get("cluster", {})}})
        with pytest.raises(InputError, match=re.escape(told)), open_cluster(job):
            raise AssertionError("it was placed")
