"""Where actors go and how weights travel, by hand: pure arithmetic, no Ray."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.config.sections import ClusterConfig, WeightSyncConfig
from rlaif_ray.errors import InputError
from rlaif_ray.rollout.buckets import Metadata, make_buckets, tensor_bytes
from rlaif_ray.runtime.placement import Slot, actor_slots, placement_table, totals
from rlaif_ray.runtime.weight_sync import choose_backend
from tests.jobs import embedded


def job(**sections: Any) -> TrainJob:
    return embedded(TrainJob, sections)


def judge(**fields: Any) -> dict[str, Any]:
    return {"type": "judge", "judge": {"model": "org/judge", **fields}}


CPU_DEFAULT = job()
CPU_LARGER = job(
    rollout={"replicas": 2}, feedback=judge(replicas=3), learner={"ranks": 2}, cluster={"cpus_per_actor": 2.0}
)
GPU_DEFAULT = job(rollout={"replicas": 2}, learner={"ranks": 2})
GPU_TENSOR_PARALLEL = job(
    rollout={"tensor_parallel": 2}, feedback=judge(replicas=2, tensor_parallel=4), learner={"ranks": 4}
)
GPU_SHARED = job(cluster={"gpus_per_actor": 0.3})
# A share is for one GPU: an engine over two takes both whole, even where the others share.
GPU_SHARED_BUT_PARALLEL = job(rollout={"tensor_parallel": 2}, cluster={"gpus_per_actor": 0.5, "cpus_per_actor": 0})


@pytest.mark.parametrize(
    ("config", "device", "slots"),
    [
        pytest.param(
            CPU_DEFAULT,
            "cpu",
            [Slot("rollout", 0, 0.25, 0), Slot("learner", 0, 0.25, 0), Slot("judge", 0, 0.25, 0)],
            id="cpu",
        ),
        pytest.param(
            CPU_LARGER,
            "cpu",
            [
                *(Slot("rollout", k, 2.0, 0) for k in range(2)),
                *(Slot("learner", k, 2.0, 0) for k in range(2)),
                *(Slot("judge", k, 2.0, 0) for k in range(3)),
            ],
            id="cpu-larger",
        ),
        pytest.param(
            GPU_DEFAULT,
            "cuda",
            [
                Slot("rollout", 0, 1, 1),
                Slot("rollout", 1, 1, 1),
                Slot("judge", 0, 1, 1),
                Slot("learner", 0, 1, 1),
                Slot("learner", 1, 1, 1),
            ],
            id="gpu",
        ),
        pytest.param(
            GPU_TENSOR_PARALLEL,
            "cuda",
            [
                Slot("rollout", 0, 1, 2),
                Slot("judge", 0, 1, 4),
                Slot("judge", 1, 1, 4),
                *(Slot("learner", k, 1, 1) for k in range(4)),
            ],
            id="gpu-tensor-parallel",
        ),
        pytest.param(
            GPU_SHARED,
            "cuda",
            [Slot("rollout", 0, 1, 0.3), Slot("judge", 0, 1, 0.3), Slot("learner", 0, 1, 0.3)],
            id="gpu-shared",
        ),
        pytest.param(
            GPU_SHARED_BUT_PARALLEL,
            "cuda",
            [Slot("rollout", 0, 0, 2), Slot("judge", 0, 0, 0.5), Slot("learner", 0, 0, 0.5)],
            id="gpu-shared-but-parallel",
        ),
    ],
)
def test_actor_slots(config: TrainJob, device: Any, slots: list[Slot]) -> None:
    assert actor_slots(config, device) == slots


@pytest.mark.parametrize(
    ("config", "device", "need"),
    [
        (CPU_DEFAULT, "cpu", {"CPU": 0.75, "GPU": 0.0}),  # 3 x 0.25
        (CPU_LARGER, "cpu", {"CPU": 14.0, "GPU": 0.0}),  # 7 x 2
        (GPU_DEFAULT, "cuda", {"CPU": 5.0, "GPU": 5.0}),
        (GPU_TENSOR_PARALLEL, "cuda", {"CPU": 7.0, "GPU": 14.0}),  # 2 + 2 x 4 + 4
        (GPU_SHARED, "cuda", {"CPU": 3.0, "GPU": 0.9}),
        (GPU_SHARED_BUT_PARALLEL, "cuda", {"CPU": 0.0, "GPU": 3.0}),
    ],
)
def test_totals(config: TrainJob, device: Any, need: dict[str, float]) -> None:
    assert totals(actor_slots(config, device)) == pytest.approx(need)


def test_placement_table() -> None:
    config = job(
        policy={"model": "org/policy"},
        rollout={"tensor_parallel": 2},
        feedback=judge(replicas=2),
        learner={"ranks": 4},
        cluster={"gpus_per_actor": 0.5, "device": "gpu"},
    )
    rows = [line.split() for line in placement_table(config).splitlines()]
    assert rows == [
        ["role", "actors", "CPU", "each", "GPU", "each", "model"],
        ["rollout", "1", "1", "2", "org/policy"],
        ["judge", "2", "1", "0.5", "org/judge"],
        ["learner", "4", "1", "0.5", "org/policy"],
        ["total", "7", "7", "5"],
    ]


@pytest.mark.parametrize(
    ("wanted", "gpus_per_actor", "device", "backend"),
    [
        ("auto", 1.0, "cpu", "shm"),
        ("auto", 0.5, "cpu", "shm"),
        ("auto", 1.0, "cuda", "nccl"),
        ("auto", 0.5, "cuda", "ipc"),  # learner and engine share a GPU, on which NCCL refuses two ranks
        ("shm", 1.0, "cpu", "shm"),
        ("ipc", 1.0, "cuda", "ipc"),
        ("nccl", 0.5, "cuda", "nccl"),
    ],
)
def test_choose_backend(wanted: Any, gpus_per_actor: float, device: Any, backend: str) -> None:
    cluster = ClusterConfig(gpus_per_actor=gpus_per_actor)
    assert choose_backend(WeightSyncConfig(backend=wanted), cluster, device) == backend


@pytest.mark.parametrize(("wanted", "device"), [("shm", "cuda"), ("ipc", "cpu"), ("nccl", "cpu")])
def test_choose_backend_refuses_what_cannot_work(wanted: Any, device: Any) -> None:
    with pytest.raises(InputError, match=rf"weight_sync\.backend={wanted} does not work on cluster\.device={device}"):
        choose_backend(WeightSyncConfig(backend=wanted), ClusterConfig(), device)


# Bytes: embed 2 x 10 x 4 = 80, each of a layer's two 3 x 4 = 12 and 4 x 2 = 8, norm 5 x 4 = 20.
METADATA: Metadata = [("embed", "float32", (2, 10))]
METADATA += [row for k in range(3) for row in ((f"{k}.w", "float32", (3,)), (f"{k}.b", "bfloat16", (2, 2)))]
METADATA += [("norm", "float32", (5,))]
GROUPS = [["embed"], ["0.w", "0.b"], ["1.w", "1.b"], ["2.w", "2.b"], ["norm"]]


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("float32", (2, 10), 80), ("bfloat16", (2, 2), 8), ("float16", (3,), 6), ("float32", (), 4)],
)
def test_tensor_bytes(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert tensor_bytes(dtype, shape) == size


@pytest.mark.parametrize(
    ("limit", "buckets"),
    [
        (0, GROUPS),  # every group is above the limit and stands alone, whole
        (19, GROUPS),
        (39, GROUPS),  # two layers are 40
        (40, [["embed"], ["0.w", "0.b", "1.w", "1.b"], ["2.w", "2.b", "norm"]]),
        (80, [["embed"], ["0.w", "0.b", "1.w", "1.b", "2.w", "2.b", "norm"]]),
        (99, [["embed"], ["0.w", "0.b", "1.w", "1.b", "2.w", "2.b", "norm"]]),
        (100, [["embed", "0.w", "0.b"], ["1.w", "1.b", "2.w", "2.b", "norm"]]),
        (160, [[name for group in GROUPS for name in group]]),
    ],
)
def test_make_buckets(limit: int, buckets: list[list[str]]) -> None:
    assert [list(bucket.names) for bucket in make_buckets(GROUPS, METADATA, limit)] == buckets
