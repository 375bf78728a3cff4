"""What of a job can be placed nowhere, said before anything is reserved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.errors import InputError
from rlaif_ray.runtime.placement import Bundle, Slot, bundles_of
from rlaif_ray.runtime.weight_sync import choose_backend


def require_places(
    job: Any, slots: Sequence[Slot], device: Literal["cpu", "cuda"], note: Callable[[str], None] = lambda text: None
) -> None:
    """Asks Ray for its nodes. Where more of them may come, what fits on none of them is waited for, and noted.

    Raises:
        InputError: Ray would never place it, or weights could never be sent.
    """
    problems = [text for _, text in layout_problems(job, slots, device)]
    if device == "cuda":
        nodes, no_more = _nodes()
        found = unplaceable(bundles_of(slots), nodes, no_more)
        if no_more:
            problems += found
        else:
            for text in found:
                note(text)
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
    """What of these bundles can't be on nodes with so many GPUs each; pure. Unless there will be `no_more` nodes, it is
    no fault: a cluster that scales, or whose nodes are still joining, may get others.

    Of bundles of at least s GPUs each a node holds GPUs // s: that is exact where sizes divide one another, and
    elsewhere finds too little.
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
            waits = "Ray would wait for ever" if no_more else f"the job waits for nodes with {size} GPUs"
            found.append(
                f"{count} times {size} GPUs on one node are needed for {', '.join(roles)} (got nodes with "
                f"{', '.join(map(str, nodes))} GPUs, room for {room}): {waits}. If none will come, lower "
                f"tensor_parallel or replicas."
            )
    return found[:1]


def layout_problems(
    job: Any, slots: Sequence[Slot], device: Literal["cpu", "cuda"]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(roles, what is wrong) where actors are together, or apart, that must not be; pure."""
    if not isinstance(job, TrainJob) or device == "cpu":
        return
    backend = choose_backend(job.weight_sync, job.cluster, device)
    ranks = {slot.bundle: slot.index for slot in slots if slot.role == "learner"}
    engines = [slot for slot in slots if slot.role == "rollout"]
    lonely = [slot.index for slot in engines if slot.bundle not in ranks]
    if backend == "ipc" and lonely:
        how = f"rollout.tensor_parallel={job.rollout.tensor_parallel}, " if job.rollout.tensor_parallel > 1 else ""
        if not job.cluster.shares_gpus(device):
            how = f"cluster.gpus_per_actor={job.cluster.gpus_per_actor:g}, with which no GPU is shared, {how}"
        yield (
            ("rollout", "learner"),
            f"weight_sync.backend=ipc needs a learner rank on the GPU of every rollout engine (got {how}"
            f"rollout.replicas={job.rollout.replicas}, learner.ranks={job.learner.ranks}; none with engine "
            f"{', '.join(map(str, lonely))}): memory is shared within one GPU. Use at least as many learner.ranks as "
            f"rollout.replicas, rollout.tensor_parallel=1 and cluster.gpus_per_actor of 0.5 or less, or "
            f"weight_sync.backend=auto with cluster.gpus_per_actor=1.",
        )
    sharing = [slot.index for slot in engines if ranks.get(slot.bundle) == 0]
    if backend == "nccl" and (sharing or len({slot.bundle for slot in engines}) < len(engines)):
        yield (
            ("rollout", "learner"),
            "weight_sync.backend=nccl needs a GPU of its own for learner rank 0 and each rollout engine (got "
            f"cluster.gpus_per_actor={job.cluster.gpus_per_actor:g}, with which they share one): NCCL refuses two of "
            "its processes on one GPU. Use weight_sync.backend=auto, or cluster.gpus_per_actor=1.",
        )
