"""Which process gets what of the cluster: pure arithmetic first, then Ray's placement group."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.config.jobs import EvaluateJob, LabelJob, PairsJob, ReviseJob, SampleJob, SupervisedJob, TrainJob
from rlaif_ray.config.sections import JudgeConfig, JudgeFeedback, MixtureFeedback, RewardModelFeedback
from rlaif_ray.errors import PlacementError, Preempted

if TYPE_CHECKING:
    from rlaif_ray.config.sections import ClusterConfig, FeedbackConfig

CPU_SHARE = 0.25  # logical CPUs per actor on CPU: phases take turns on the same cores
POLL_S = 1.0
NOTE_S = 5.0  # between two notes of what is waited for


@dataclass(frozen=True, slots=True)
class Need:
    """Actors that a job asks for."""

    role: str  # unique within the job
    actors: int
    workers: int  # GPUs that one of them drives when they are not shared
    model: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One actor's place: one bundle of the placement group."""

    role: str
    index: int  # within its role
    cpus: float
    gpus: float


def job_needs(job: Any) -> list[Need]:
    """What a job asks for: rollout engines first, then what gives feedback, then learner ranks."""
    needs: list[Need] = []
    if isinstance(job, TrainJob | PairsJob | ReviseJob | SampleJob):
        needs.append(Need("rollout", job.rollout.replicas, job.rollout.tensor_parallel, job.policy.model))
    if isinstance(job, TrainJob | SampleJob) and job.feedback is not None:
        needs += _feedback_needs(job.feedback)
    if isinstance(job, EvaluateJob):  # engines belong to the jobs it is made of
        needs += [Need(name, cfg.replicas, 1, cfg.model) for name, cfg in job.reward_models.items()]
    if isinstance(job, LabelJob) and isinstance(job.judge, JudgeConfig):
        needs.append(_judge_need("judge", job.judge))
    if isinstance(job, TrainJob | SupervisedJob):
        needs.append(Need("learner", job.learner.ranks, 1, job.policy.model))
    return needs


def _feedback_needs(feedback: FeedbackConfig) -> list[Need]:
    match feedback:
        case JudgeFeedback():
            return [_judge_need("judge", feedback.judge)]
        case RewardModelFeedback():
            return [Need("reward_model", feedback.replicas, 1, feedback.model)]
        case MixtureFeedback():
            found = []
            for name, part in feedback.scorers.items():
                if isinstance(part.scorer, JudgeFeedback):
                    found.append(_judge_need(name, part.scorer.judge))
                elif isinstance(part.scorer, RewardModelFeedback):
                    found.append(Need(name, part.scorer.replicas, 1, part.scorer.model))
            return found


def _judge_need(role: str, judge: JudgeConfig) -> Need:
    return Need(role, judge.replicas, judge.tensor_parallel, judge.model)


def actor_slots(job: Any, device: Literal["cpu", "cuda"]) -> list[Slot]:
    """Every actor of the job, in the order of its needs; where they share GPUs, one of each role after the other.

    Ray fills nodes with bundles as they come. On CPUs those between whom weights go through shared memory come first,
    so that they get one node. Ray fills a GPU in the same way, so that it gets an engine and a learner rank of the same
    index, and never two ranks of the learner, which NCCL refuses.
    """
    slots = [
        Slot(need.role, index, *_share(job.cluster, device, need.workers))
        for need in job_needs(job)
        for index in range(need.actors)
    ]
    if device == "cpu":
        return sorted(slots, key=lambda slot: slot.role not in ("rollout", "learner"))
    return sorted(slots, key=lambda slot: slot.index) if job.cluster.shares_gpus(device) else slots


def _share(cluster: ClusterConfig, device: str, workers: int) -> tuple[float, float]:
    """Logical CPUs and GPUs of an actor with so many GPU workers."""
    if device == "cpu":
        return (CPU_SHARE if cluster.cpus_per_actor is None else cluster.cpus_per_actor), 0.0
    cpus = 1.0 if cluster.cpus_per_actor is None else cluster.cpus_per_actor
    return cpus, float(workers) if workers > 1 else cluster.gpus_per_actor


def totals(slots: list[Slot]) -> dict[str, float]:
    """Resources of all slots together."""
    return {"CPU": sum(s.cpus for s in slots), "GPU": sum(s.gpus for s in slots)}


def placement_table(job: Any) -> str:
    """What `--dry-run` shows: one line per role, and what the cluster must have. On CPUs unless GPUs are asked for."""
    device: Literal["cpu", "cuda"] = "cuda" if job.cluster.device == "gpu" else "cpu"
    slots, needs = actor_slots(job, device), job_needs(job)
    width = max([9, *(len(need.role) + 1 for need in needs)])
    lines = [f"{'role':<{width}}{'actors':>7}{'CPU each':>10}{'GPU each':>10}  model"]
    for need in needs:
        own = [s for s in slots if s.role == need.role]
        lines.append(f"{need.role:<{width}}{len(own):>7}{own[0].cpus:>10g}{own[0].gpus:>10g}  {need.model}")
    total = totals(slots)
    lines.append(f"{'total':<{width}}{len(slots):>7}{total['CPU']:>10g}{total['GPU']:>10g}")
    return "\n".join(lines)


def reserve(
    slots: list[Slot],
    timeout_s: float,
    *,
    note: Callable[[str], None] = lambda text: None,
    leave: Callable[[], bool] = lambda: False,
) -> Any:
    """A placement group with one bundle per slot, ready to use; `note` and `leave` as in `wait_for_place`.

    Raises:
        PlacementError: the cluster didn't give it in time.
        Preempted: `leave` said so.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = [{"CPU": s.cpus, **({"GPU": s.gpus} if s.gpus else {})} for s in slots]
    group = placement_group(bundles, strategy="PACK")
    try:
        wait_for_place(group, slots, timeout_s, note=note, leave=leave)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def wait_for_place(
    group: Any,
    slots: list[Slot],
    timeout_s: float,
    *,
    note: Callable[[str], None] = lambda text: None,
    leave: Callable[[], bool] = lambda: False,
) -> None:
    """Until every slot has its bundle, on the first nodes or, when some of them were lost, on others.

    Args:
        note: told every few seconds what the cluster has of what is needed.
        leave: asked about each second whether to give up.

    Raises:
        PlacementError: it took longer than `timeout_s`; says what the cluster has and what is missing.
        Preempted: `leave` said so.
    """
    began = told = time.monotonic()
    while True:
        if leave():
            raise Preempted
        if group.wait(POLL_S):
            return
        now = time.monotonic()
        if now - began > timeout_s:
            raise PlacementError(
                f"the cluster did not give {len(slots)} actors their place within cluster.start_timeout_s="
                f"{timeout_s:g} s: {_registered(slots)}. Look at `ray status`; add nodes, free resources, or lower "
                f"replicas, tensor_parallel or learner.ranks."
            )
        if now - told > NOTE_S:
            told = now
            note(_waiting(slots))


def displaced(group: Any, slots: list[Slot]) -> str | None:
    """What the cluster has of what is needed, while places are gone with their node; None when all are there."""
    from ray.util.placement_group import placement_group_table

    if placement_group_table(group)["state"] == "CREATED":
        return None
    return _waiting(slots)


def _waiting(slots: list[Slot]) -> str:
    return f"waiting for the places of {len(slots)} actors: {_registered(slots)}"


def _registered(slots: list[Slot]) -> str:
    """What the cluster has of what the slots need, such as "4 of 8 GPUs registered (1 free) on 2 nodes"."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    told = [
        f"{have.get(name, 0):g} of {need:g} {name}s registered ({free.get(name, 0):g} free)"
        for name, need in totals(slots).items()
        if need
    ]
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{', '.join(told)} on {nodes} node{'s' if nodes != 1 else ''}"
