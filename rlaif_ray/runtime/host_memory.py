"""What a job takes of each node's own memory, and what its checkpoints weigh: pure arithmetic, before anything starts.

Copies for checkpoints are exact (a test compares with real ranks); what processes take of themselves is an estimate.
/dev/shm counts for nothing: Ray's object store is counted, and what a weight sync has there is a bucket or two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlaif_ray.config.jobs import SupervisedJob, TrainJob
from rlaif_ray.runtime.engine_size import GIB
from rlaif_ray.runtime.memory_plan import (
    BYTES,
    Actors,
    Device,
    Trained,
    Zero,
    learner_host_memory,
    learner_zero,
    precision_bytes,
    sections,
    trained_models,
)

PROCESS_BYTES = {"cuda": 2 * GIB, "cpu": GIB}  # Python and its libraries, and CUDA's
# Weights of a sleeping engine are in pinned memory, of which torch rounds each block up to a power of two.
PINNED = 1.5
GRACE_STEP_S = 30  # periods of grace are proposed in multiples of it
Parts = dict[str, int]  # bytes by what they are for


def node_memory(
    job: Any, actors: Sequence[Actors], nodes: Sequence[Mapping[str, int]], device: Device
) -> tuple[Parts, ...]:
    """What is held in the memory of each node, of which the actors by role are given; rank 0 is on the first that has
    a rank."""
    by_role = {one.need.role: _actor(job, one, device) for one in actors}
    first = next((k for k, node in enumerate(nodes) if "learner" in node), None)
    found = []
    for k, node in enumerate(nodes):
        parts: Parts = {}
        for role, count in node.items():
            for part, size in by_role[role].items():
                parts[part] = parts.get(part, 0) + count * size
        if k == first:
            _add_rank_0(parts, job, next(one for one in actors if one.kind == "learner"), device)
        parts["object store"] = int(job.cluster.object_store_gb * GIB)
        found.append({part: size for part, size in parts.items() if size})
    return tuple(found)


def _actor(job: Any, one: Actors, device: Device) -> Parts:
    """Of one actor, with all of its processes."""
    workers = one.need.workers
    processes = workers + 1 if workers > 1 else 1  # tensor-parallel workers are processes of their own
    parts = {"processes": processes * PROCESS_BYTES[device]}
    if device == "cpu":  # of a learner what it always holds: how full its micro-batches get, the plan can't say
        parts["models"] = (one.memory.resting if one.kind == "learner" else one.memory.total) * workers
    if one.kind == "engine" and device == "cuda":
        cfg: Any = job.rollout if one.need.role == "rollout" else sections(job)[one.need.role][0]
        if cfg.sleep:
            parts["sleeping engines"] = int(PINNED * one.memory.parts["weights"] * workers)
    if one.kind == "learner":
        zero, models = learner_zero(job, device), trained_models(job, one.shape)
        parts["offloaded states"] = sum(learner_host_memory(job, one.shape, device).values()) if device == "cuda" else 0
        parts["checkpoint copies"] = rank_state(zero, models)[0]
    return parts


def _add_rank_0(parts: Parts, job: Any, one: Actors, device: Device) -> None:
    """What rank 0 has beside what every rank has. When the model is saved, no checkpoint is under way.

    It gathers the whole model in the type of training, and gives it the type to save in, tensor by tensor; after that
    it loads what was saved, in the type of training, to check it.
    """
    copies = parts["checkpoint copies"] + rank_state(learner_zero(job, device), trained_models(job, one.shape))[1]
    parts["checkpoint copies"] = copies
    size = precision_bytes(job.policy.precision, device)
    if job.policy.save_precision != "auto":
        size = max(size, BYTES[job.policy.save_precision])
    parts["the saved model"] = max(0, one.shape.parameters * size - copies)


def rank_state(zero: Zero, models: Mapping[str, Trained]) -> tuple[int, int]:
    """(bytes of a checkpoint that every rank copies and writes, what rank 0 does beside them), as DeepSpeed divides
    them: each its part of the optimizer's states and fp32 weights, rank 0 the weights, which under ZeRO-3 are
    everybody's part of those that aren't trained."""
    zero = replace(zero, offloaded=False, weights_offloaded=False)
    each = first = 0
    for name, model in models.items():
        if name == "reference":  # frozen: it is the model on disk
            continue
        if zero.stage == 0:
            first += zero.optimizer(model) + zero.weights(model)
        elif zero.stage == 3:
            each += zero.optimizer(model) + zero.weights(Trained(0, model.frozen))
        else:
            each += zero.optimizer(model)
            first += zero.weights(model)
    return each, first


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """One checkpoint, and whether it can be written within `checkpoint.grace_s` after a SIGTERM."""

    bytes: int
    bandwidth: float  # GB/s (10^9) of the storage in all: ranks write at the same time
    grace_s: float

    @property
    def seconds(self) -> float:
        return self.bytes / (self.bandwidth * 1e9)

    @property
    def needed_grace_s(self) -> int:
        """The least that is enough in any case: one that is being written ends first, then comes the last; and a step
        for copying and closing."""
        return GRACE_STEP_S * (math.ceil(2 * self.seconds / GRACE_STEP_S) + 1)

    @property
    def enough(self) -> bool:
        return self.grace_s >= self.needed_grace_s

    @property
    def hook_grace_s(self) -> int:
        """For the preStop hook that ends the job: longer than the job's own, shorter than what sends the SIGKILL."""
        return self.cluster_grace_s - 2 * GRACE_STEP_S // 3

    @property
    def cluster_grace_s(self) -> int:
        """For what sends the SIGKILL."""
        return GRACE_STEP_S * (math.ceil(max(self.grace_s, self.needed_grace_s) / GRACE_STEP_S) + 1)


def checkpoint_cost(job: Any, actors: Sequence[Actors], device: Device, bandwidth: float) -> CheckpointCost | None:
    """Of a job that trains."""
    learner = next((one for one in actors if one.kind == "learner"), None)
    if learner is None or not isinstance(job, TrainJob | SupervisedJob):
        return None
    each, first = rank_state(learner_zero(job, device), trained_models(job, learner.shape))
    return CheckpointCost(each * learner.need.actors + first, bandwidth, job.checkpoint.grace_s)
