"""What of a job can be placed nowhere, said before anything is reserved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.errors import InputError
from rlaif_ray.runtime.placement import Bundle, Slot, bundles_of
from rlaif_ray.runtime.weight_sync import choose_backend


def require_places(job: Any, slots: Sequence[Slot], device: Literal["cpu", "cuda"]) -> None:
    """Asks Ray for its nodes. Where more of them may come, what fits on none of them is waited for.

    Raises:
        InputError: Ray would never place it, or weights could never be sent.
    """
    problems = [text for _, text in layout_problems(job, slots, device)]
    if device == "cuda":
        problems += unplaceable(bundles_of(slots), *_nodes())
    if problems:
        raise InputError("\n".join(problems))


def _nodes() -> tuple[list[int], bool]:
    """(GPUs of each node, whether no other node can come: Ray is one that this process has started)."""
    import ray
    from ray._private import worker

    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    own: Any = worker._global_node  # None for a driver that joined by ray://
    return gpus, own is not None and own.is_head()


def unplaceable(bundles: Sequence[Bundle], nodes: Sequence[int], no_more: bool) -> list[str]:
    """What of these bundles can't be on nodes with so many GPUs each; pure.

    Nodes with fewer GPUs than are needed in all are waited for, unless there will be no more. Of bundles of at least
    s GPUs each a node holds GPUs // s: that is exact where sizes divide one another, and elsewhere refuses too little.
    """
    needed = sum(bundle.gpus for bundle in bundles)
    if needed > sum(nodes):
        if not no_more:
            return []
        return [
            f"the job needs {needed} GPUs (this machine has {sum(nodes)}): it would wait for ever. Lower replicas, "
            f"tensor_parallel or learner.ranks, let actors share GPUs (cluster.gpus_per_actor=0.33), or join a cluster."
        ]
    found = []
    for size in sorted({bundle.gpus for bundle in bundles if bundle.gpus}, reverse=True):
        count, room = sum(bundle.gpus >= size for bundle in bundles), sum(gpus // size for gpus in nodes)
        if count > room:
            roles = dict.fromkeys(slot.role for bundle in bundles if bundle.gpus >= size for slot in bundle.slots)
            found.append(
                f"{count} times {size} GPUs on one node are needed for {', '.join(roles)} (got nodes with "
                f"{', '.join(map(str, nodes))} GPUs, room for {room}): Ray would wait for ever. Lower tensor_parallel "
                f"or replicas, or start nodes with {size} GPUs first."
            )
    return found[:1]


def layout_problems(
    job: Any, slots: Sequence[Slot], device: Literal["cpu", "cuda"]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(roles, what is wrong) where actors are together, or apart, that must not be; pure."""
    if not isinstance(job, TrainJob) or not job.cluster.shares_gpus(device):
        return
    backend = choose_backend(job.weight_sync, job.cluster, device)
    ranks = {slot.bundle: slot.index for slot in slots if slot.role == "learner"}
    engines = [slot for slot in slots if slot.role == "rollout"]
    lonely = [slot.index for slot in engines if slot.bundle not in ranks]
    if backend == "ipc" and lonely:
        how = f"rollout.tensor_parallel={job.rollout.tensor_parallel}, " if job.rollout.tensor_parallel > 1 else ""
        yield (
            ("rollout", "learner"),
            f"weight_sync.backend=ipc needs a learner rank on the GPU of every rollout engine (got {how}"
            f"rollout.replicas={job.rollout.replicas}, learner.ranks={job.learner.ranks}; none with engine "
            f"{', '.join(map(str, lonely))}): memory is shared within one GPU. Use at least as many learner.ranks as "
            f"rollout.replicas and rollout.tensor_parallel=1, or cluster.gpus_per_actor=1.",
        )
    sharing = [slot.index for slot in engines if ranks.get(slot.bundle) == 0]
    if backend == "nccl" and (sharing or len({slot.bundle for slot in engines}) < len(engines)):
        yield (
            ("rollout", "learner"),
            "weight_sync.backend=nccl needs a GPU of its own for learner rank 0 and each rollout engine (got "
            f"cluster.gpus_per_actor={job.cluster.gpus_per_actor:g}, with which they share one): NCCL refuses two of "
            "its processes on one GPU. Use weight_sync.backend=auto, or cluster.gpus_per_actor=1.",
        )
