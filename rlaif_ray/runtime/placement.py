"""Which process gets what of the cluster: pure arithmetic first, then Ray's placement group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.config.jobs import EvaluateJob, LabelJob, PairsJob, ReviseJob, SampleJob, SupervisedJob, TrainJob
from rlaif_ray.config.sections import JudgeConfig, JudgeFeedback, MixtureFeedback, RewardModelFeedback
from rlaif_ray.errors import PlacementError, Preempted

if TYPE_CHECKING:
    from rlaif_ray.config.sections import ClusterConfig, FeedbackConfig

CPU_SHARE = 0.25  # logical CPUs per actor on CPU: phases take turns on the same cores
RAY_UNITS = 10_000  # in which Ray counts a GPU
PAIRED = ("learner", "rollout")  # roles of which the k-th of one and the k-th of the other belong together
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
    """One actor's place: a bundle of the placement group, or a share of one."""

    role: str
    index: int  # within its role
    cpus: float
    gpus: float  # below 1: its share of the one GPU of the bundle
    bundle: int  # actors that share a GPU have the same


@dataclass(frozen=True, slots=True)
class Bundle:
    """What Ray reserves on one node at once: whole GPUs, so that it can't find shares of several to be one's room."""

    cpus: float
    gpus: int
    slots: tuple[Slot, ...]  # who is in it

    @property
    def resources(self) -> dict[str, float]:
        """As Ray takes them."""
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}


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
    so that they get one node.
    """
    needs = job_needs(job)
    if device == "cpu":
        needs = sorted(needs, key=lambda need: need.role not in ("rollout", "learner"))
    return slots_of(needs, job.cluster, device)


def slots_of(needs: Sequence[Need], cluster: ClusterConfig, device: Literal["cpu", "cuda"]) -> list[Slot]:
    """Every actor of these needs, each in a bundle of its own unless it shares a GPU."""
    shared = [need for need in needs if need.workers == 1] if cluster.shares_gpus(device) else []
    gpus = shared_gpus(shared, cluster.tenants_per_gpu)
    bundle_of = {one: bundle for bundle, tenants in enumerate(gpus) for one in tenants}
    others = count(len(gpus))
    slots = []
    for need in needs:
        for index in range(need.actors):
            bundle = bundle_of[need.role, index] if (need.role, index) in bundle_of else next(others)
            slots.append(Slot(need.role, index, *_share(cluster, device, need.workers), bundle))
    return sorted(slots, key=lambda slot: slot.index) if shared else slots


def shared_gpus(needs: Sequence[Need], tenants: int) -> list[list[tuple[str, int]]]:
    """(role, index) of the actors on each GPU, at most so many; as few GPUs as that takes, one for each learner rank.

    NCCL refuses two ranks on a GPU, and by IPC an engine gets its weights from the rank on its own: the k-th rank and
    the k-th engine get the k-th GPU, and engines beyond the ranks a GPU with a rank while there is room. Others come
    last: they go to the k-th where there is room, else to the first that has some, best where nobody has the same role.
    """
    ranks = max((need.actors for need in needs if need.role == "learner"), default=0)
    gpus: list[list[tuple[str, int]]] = [
        [] for _ in range(max(ranks, -(-sum(need.actors for need in needs) // tenants)))
    ]
    for need in sorted(needs, key=lambda need: PAIRED.index(need.role) if need.role in PAIRED else len(PAIRED)):
        for index in range(need.actors):
            room = [k for k, there in enumerate(gpus) if len(there) < tenants]
            alike = {k: sum(role == need.role for role, _ in gpus[k]) for k in room}
            lonely = need.role == "rollout" and index >= ranks  # without a rank on the GPU of its number
            best = min(room, key=lambda k: (lonely and k >= ranks, k != index, alike[k], k))
            gpus[best].append((need.role, index))
    return gpus


def _share(cluster: ClusterConfig, device: str, workers: int) -> tuple[float, float]:
    """Logical CPUs and GPUs of an actor with so many GPU workers."""
    if device == "cpu":
        return (CPU_SHARE if cluster.cpus_per_actor is None else cluster.cpus_per_actor), 0.0
    cpus = 1.0 if cluster.cpus_per_actor is None else cluster.cpus_per_actor
    return cpus, float(workers) if workers > 1 else RAY_UNITS // cluster.tenants_per_gpu / RAY_UNITS


def bundles_of(slots: Sequence[Slot]) -> list[Bundle]:
    """The bundles, by their numbers."""
    tenants: dict[int, list[Slot]] = {}
    for slot in slots:
        tenants.setdefault(slot.bundle, []).append(slot)
    return [
        Bundle(sum(slot.cpus for slot in own), math.ceil(own[0].gpus), tuple(own)) for _, own in sorted(tenants.items())
    ]


def totals(slots: Sequence[Slot]) -> dict[str, float]:
    """Resources of all bundles together."""
    bundles = bundles_of(slots)
    return {"CPU": sum(b.cpus for b in bundles), "GPU": float(sum(b.gpus for b in bundles))}


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
    """A placement group with the bundles of these slots, ready to use; `note` and `leave` as in `wait_for_place`.

    Raises:
        PlacementError: the cluster didn't give it in time.
        Preempted: `leave` said so.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([bundle.resources for bundle in bundles_of(slots)], strategy="PACK")
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


def nodes_of(group: Any) -> dict[int, str]:
    """Which node each bundle of a placement group is on."""
    from ray.util.placement_group import placement_group_table

    found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return found


def by_node(slots: Sequence[Slot], node_of: Mapping[int, str], size: int) -> list[Slot]:
    """Slots in such an order that as many groups of `size` neighbours as possible are on one node each: first what
    makes whole groups, node by node, then what is left of each; pure."""
    there: dict[str, list[Slot]] = {}
    for slot in slots:
        there.setdefault(node_of[slot.bundle], []).append(slot)
    whole = [slot for own in there.values() for slot in own[: len(own) // size * size]]
    return whole + [slot for own in there.values() for slot in own[len(own) // size * size :]]


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
