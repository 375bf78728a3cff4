"""Which process gets what of the cluster: pure arithmetic first, then Ray's placement group."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.errors import PlacementError

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.config.sections import ClusterConfig

Role = Literal["rollout", "judge", "learner"]
CPU_SHARE = 0.25  # logical CPUs per actor on CPU: phases take turns on the same cores
POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Slot:
    """One actor's place: one bundle of the placement group."""

    role: Role
    index: int  # within its role
    cpus: float
    gpus: float


def actor_slots(job: TrainJob, device: Literal["cpu", "cuda"]) -> list[Slot]:
    """Every actor of the job, rollout engines first, then judges, then learner ranks."""
    cluster = job.cluster
    judge = job.feedback.judge
    counts: list[tuple[Role, int, int]] = [
        ("rollout", job.rollout.replicas, job.rollout.tensor_parallel),
        ("judge", judge.replicas, judge.tensor_parallel),
        ("learner", job.learner.ranks, 1),
    ]
    return [
        Slot(role, index, *_share(cluster, device, workers))
        for role, count, workers in counts
        for index in range(count)
    ]


def _share(cluster: ClusterConfig, device: str, workers: int) -> tuple[float, float]:
    """Logical CPUs and GPUs of an actor with so many GPU workers."""
    if device == "cpu":
        return (CPU_SHARE if cluster.cpus_per_actor is None else cluster.cpus_per_actor), 0.0
    cpus = 1.0 if cluster.cpus_per_actor is None else cluster.cpus_per_actor
    return cpus, float(workers) if workers > 1 else cluster.gpus_per_actor


def totals(slots: list[Slot]) -> dict[str, float]:
    """Resources of all slots together."""
    return {"CPU": sum(s.cpus for s in slots), "GPU": sum(s.gpus for s in slots)}


def placement_table(job: TrainJob, device: Literal["cpu", "cuda"]) -> str:
    """What `--dry-run` shows: one line per role, and what the cluster must have."""
    slots = actor_slots(job, device)
    models = {"rollout": job.policy.model, "judge": job.feedback.judge.model, "learner": job.policy.model}
    lines = [f"{'role':<9}{'actors':>7}{'CPU each':>10}{'GPU each':>10}  model"]
    for role in ("rollout", "judge", "learner"):
        own = [s for s in slots if s.role == role]
        lines.append(f"{role:<9}{len(own):>7}{own[0].cpus:>10g}{own[0].gpus:>10g}  {models[role]}")
    need = totals(slots)
    lines.append(f"{'total':<9}{len(slots):>7}{need['CPU']:>10g}{need['GPU']:>10g}")
    return "\n".join(lines)


def reserve(slots: list[Slot], timeout_s: float) -> Any:
    """A placement group with one bundle per slot, ready to use.

    Raises:
        PlacementError: the cluster didn't give it in time; says what it has and what is missing.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = [{"CPU": s.cpus, **({"GPU": s.gpus} if s.gpus else {})} for s in slots]
    group = placement_group(bundles, strategy="PACK")
    deadline = time.monotonic() + timeout_s
    while not ray.wait([group.ready()], timeout=min(POLL_S, timeout_s))[0]:
        if time.monotonic() < deadline:
            continue
        need, have = totals(slots), ray.cluster_resources()
        remove_placement_group(group)
        told = ", ".join(f"{have.get(k, 0):g} of {v:g} {k}s registered" for k, v in need.items() if v)
        raise PlacementError(
            f"the cluster did not give {len(slots)} actors their place within cluster.start_timeout_s="
            f"{timeout_s:g} s: {told}. Add nodes, free resources, or lower replicas, tensor_parallel or learner.ranks."
        )
    return group
