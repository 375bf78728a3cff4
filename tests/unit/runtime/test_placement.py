"""Where actors go and how weights travel, by hand: pure arithmetic, no Ray."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.config.sections import ClusterConfig, WeightSyncConfig
from rlaif_ray.errors import InputError
from rlaif_ray.rollout.buckets import Metadata, make_buckets, tensor_bytes
from rlaif_ray.runtime import places
from rlaif_ray.runtime.placement import Bundle, Slot, actor_slots, bundles_of, by_node, placement_table, totals
from rlaif_ray.runtime.places import layout_problems, unplaceable
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
            [Slot("rollout", 0, 0.25, 0, 0), Slot("learner", 0, 0.25, 0, 1), Slot("judge", 0, 0.25, 0, 2)],
            id="cpu",
        ),
        pytest.param(
            CPU_LARGER,
            "cpu",
            [
                *(Slot("rollout", k, 2.0, 0, k) for k in range(2)),
                *(Slot("learner", k, 2.0, 0, 2 + k) for k in range(2)),
                *(Slot("judge", k, 2.0, 0, 4 + k) for k in range(3)),
            ],
            id="cpu-larger",
        ),
        pytest.param(
            GPU_DEFAULT,
            "cuda",
            [
                Slot("rollout", 0, 1, 1, 0),
                Slot("rollout", 1, 1, 1, 1),
                Slot("judge", 0, 1, 1, 2),
                Slot("learner", 0, 1, 1, 3),
                Slot("learner", 1, 1, 1, 4),
            ],
            id="gpu",
        ),
        pytest.param(
            GPU_TENSOR_PARALLEL,
            "cuda",
            [
                Slot("rollout", 0, 1, 2, 0),
                Slot("judge", 0, 1, 4, 1),
                Slot("judge", 1, 1, 4, 2),
                *(Slot("learner", k, 1, 1, 3 + k) for k in range(4)),
            ],
            id="gpu-tensor-parallel",
        ),
        pytest.param(
            GPU_SHARED,
            "cuda",
            [Slot("rollout", 0, 1, 0.3333, 0), Slot("judge", 0, 1, 0.3333, 0), Slot("learner", 0, 1, 0.3333, 0)],
            id="gpu-shared",
        ),
        pytest.param(
            GPU_SHARED_BUT_PARALLEL,
            "cuda",
            [Slot("rollout", 0, 0, 2, 1), Slot("judge", 0, 0, 0.5, 0), Slot("learner", 0, 0, 0.5, 0)],
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
        (GPU_SHARED, "cuda", {"CPU": 3.0, "GPU": 1.0}),
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
        ["total", "7", "7", "6"],  # ranks must not share: four GPUs, and the engine's two
    ]


def grouped(config: TrainJob) -> list[str]:
    """Who is in each bundle: letters of the roles, with their index."""
    bundles = bundles_of(actor_slots(config, "cuda"))
    return [" ".join(sorted(f"{slot.role[0]}{slot.index}" for slot in bundle.slots)) for bundle in bundles]


@pytest.mark.parametrize(
    ("share", "rollouts", "judges", "ranks", "bundles"),
    [
        # 0.4 is a half: two fit. Eight of them are on four whole GPUs.
        (0.4, {"replicas": 4}, {"replicas": 0}, 4, ["l0 r0", "l1 r1", "l2 r2", "l3 r3"]),
        (0.33, {"replicas": 2}, {"replicas": 2}, 2, ["j0 l0 r0", "j1 l1 r1"]),
        (0.34, {"replicas": 1}, {"replicas": 1}, 1, ["l0 r0", "j0"]),  # two fit, not three
        (0.5, {"replicas": 2}, {"replicas": 1}, 3, ["l0 r0", "l1 r1", "j0 l2"]),  # ranks with their engines
        (0.33, {"replicas": 4}, {"replicas": 1}, 4, ["j0 l0 r0", "l1 r1", "l2 r2", "l3 r3"]),  # never two ranks
        (0.25, {"replicas": 1}, {"replicas": 5}, 1, ["j0 j2 l0 r0", "j1 j3 j4"]),
        (0.5, {"tensor_parallel": 4}, {"replicas": 2}, 2, ["j0 l0", "j1 l1", "r0"]),
        (0.7, {"replicas": 1}, {"replicas": 1}, 1, ["r0", "j0", "l0"]),  # nothing else fits beside it
        # Engines beyond the ranks are with one, where IPC brings them weights; judges come last.
        (0.33, {"replicas": 2}, {"replicas": 1}, 1, ["l0 r0 r1", "j0"]),
        (0.25, {"replicas": 4}, {"replicas": 4}, 2, ["j0 l0 r0 r2", "j1 l1 r1 r3", "j2 j3"]),
        (0.33, {"replicas": 3}, {"replicas": 1}, 1, ["l0 r0 r1", "j0 r2"]),  # no room: refused by layout_problems
    ],
)
def test_who_shares_a_gpu(share: float, rollouts: Any, judges: Any, ranks: int, bundles: list[str]) -> None:
    feedback = judge(**judges)
    if not judges["replicas"]:
        feedback = {"type": "mixture", "scorers": {"short": {"scorer": {"type": "length", "target_tokens": 9}}}}
    made = job(rollout=rollouts, feedback=feedback, learner={"ranks": ranks}, cluster={"gpus_per_actor": share})
    assert grouped(made) == bundles


@pytest.mark.parametrize("share", [1.0, 0.5, 0.4, 0.33, 0.3, 0.25, 0.2, 0.1, 0.05])
def test_shares_of_a_gpu_fit_into_it_as_ray_counts(share: float) -> None:
    """Ray counts ten-thousandths: three thirds of its own rounding would be more than one."""
    cluster = ClusterConfig(gpus_per_actor=share)
    (slot,) = [slot for slot in actor_slots(job(cluster=cluster.model_dump()), "cuda") if slot.role == "learner"]
    units = round(slot.gpus * 10_000)
    assert units == slot.gpus * 10_000 and units >= share * 10_000 - 34
    assert cluster.tenants_per_gpu * units <= 10_000 < (cluster.tenants_per_gpu + 1) * units


@pytest.mark.parametrize(
    ("gpus", "nodes", "no_more", "refused"),
    [
        ([1, 1, 1, 1], [2, 2], False, None),
        ([1, 1, 1, 1], [2, 1], False, None),  # a node may come
        ([1, 1, 1, 1], [2, 1], True, "needs 4 GPUs (this machine has 3)"),
        ([2, 2, 1], [3, 3], False, None),
        ([2, 2, 1], [1, 1, 1, 3], True, "2 times 2 GPUs on one node are needed for r0, r1 (got nodes with 1, 1, 1, 3"),
        ([8], [4, 4], True, "1 times 8 GPUs on one node"),
        ([8], [4] * 5, False, "the job waits for nodes with 8 GPUs"),  # noted: they may come
        ([8], [4], False, None),
        ([0, 0], [], True, None),
    ],
)
def test_what_can_never_be_placed(gpus: list[int], nodes: list[int], no_more: bool, refused: str | None) -> None:
    bundles = [Bundle(1.0, count, (Slot(f"r{k}", 0, 1.0, count, k),)) for k, count in enumerate(gpus)]
    found = unplaceable(bundles, nodes, no_more)
    assert len(found) == (refused is not None)
    assert refused is None or refused in found[0]


SHARED = {"gpus_per_actor": 0.33}


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        ({"cluster": SHARED}, None),
        ({"rollout": {"replicas": 2}, "cluster": SHARED}, None),  # both with the rank
        ({"rollout": {"replicas": 3}, "cluster": SHARED}, "none with engine 2"),
        ({"rollout": {"replicas": 2}, "learner": {"ranks": 2}, "cluster": SHARED}, None),
        ({"rollout": {"tensor_parallel": 2}, "cluster": SHARED}, "got rollout.tensor_parallel=2, rollout.replicas=1"),
        ({"weight_sync": {"backend": "nccl"}, "cluster": SHARED}, "nccl needs a GPU of its own"),
        ({"weight_sync": {"backend": "nccl"}, "rollout": {"tensor_parallel": 2}, "cluster": SHARED}, None),
        ({"rollout": {"replicas": 2}}, None),
        # No GPU is shared, though IPC is asked for: else it would show once all models are loaded.
        ({"weight_sync": {"backend": "ipc"}}, "got cluster.gpus_per_actor=1, with which no GPU is shared"),
        ({"weight_sync": {"backend": "ipc"}, "cluster": {"gpus_per_actor": 0.6}}, "gpus_per_actor=0.6, with which no"),
        ({"weight_sync": {"backend": "ipc"}, "cluster": SHARED}, None),
    ],
)
def test_weights_must_have_a_way(sections: dict[str, Any], refused: str | None) -> None:
    made = job(**sections)
    texts = [text for _, text in layout_problems(made, actor_slots(made, "cuda"), "cuda")]
    assert len(texts) == (refused is not None)
    assert refused is None or refused in texts[0]
    assert not list(layout_problems(made, actor_slots(made, "cpu"), "cpu"))


@pytest.mark.parametrize(
    ("wanted", "gpus_per_actor", "device", "backend"),
    [
        ("auto", 1.0, "cpu", "shm"),
        ("auto", 0.5, "cpu", "shm"),
        ("auto", 1.0, "cuda", "nccl"),
        ("auto", 0.7, "cuda", "nccl"),  # nothing else fits on a GPU of which one takes 0.7
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


@pytest.mark.parametrize("no_more", [True, False])
def test_nodes_that_may_still_come_are_waited_for(monkeypatch: pytest.MonkeyPatch, no_more: bool) -> None:
    """Five nodes of 4 GPUs have joined, and an engine wants 8 on one: no fault where a cluster scales."""
    monkeypatch.setattr(places, "_nodes", lambda: ([4] * 5, no_more))
    made, notes = job(feedback=judge(tensor_parallel=8)), []
    slots = actor_slots(made, "cuda")
    if no_more:
        with pytest.raises(InputError, match="1 times 8 GPUs on one node are needed for judge"):
            places.require_places(made, slots, "cuda", notes.append)
        assert notes == []
    else:
        places.require_places(made, slots, "cuda", notes.append)
        (note,) = notes
        assert "1 times 8 GPUs on one node are needed for judge" in note and "waits for nodes with 8 GPUs" in note


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.009, 1.01])
def test_a_share_that_ray_cannot_count_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.01|less than or equal to 1"):
        ClusterConfig(gpus_per_actor=share)


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


@pytest.mark.parametrize(
    ("nodes", "size", "order"),
    [
        ("aabb", 2, [0, 1, 2, 3]),
        ("abab", 2, [0, 2, 1, 3]),  # else both groups would lie on both nodes
        ("aaabbbbb", 4, [3, 4, 5, 6, 0, 1, 2, 7]),  # whole groups first: one of two is on one node, not none
        ("aaaabbbb", 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("abc", 3, [0, 1, 2]),
    ],
)
def test_groups_of_ranks_get_a_node_where_they_can(nodes: str, size: int, order: list[int]) -> None:
    """Engines have the first bundles; ranks are numbered in the order of their slots."""
    ranks = [Slot("learner", k, 1.0, 1.0, bundle=10 + k) for k in range(len(nodes))]
    node_of = {10 + k: node for k, node in enumerate(nodes)} | {0: "a"}
    assert [slot.index for slot in by_node(ranks, node_of, size)] == order
