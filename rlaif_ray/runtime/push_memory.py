"""What a push of the weights takes on a GPU that learner and rollout engine share; pure.

The learner has nothing but its states then. By IPC it stages into two slots of the largest bucket. Under ZeRO-3 it
gathers each bucket, and torch's allocator may hold the one before as well. The engine has its weights, and its KV cache
sleeps. Once the push is over the learner gives its part back (`free_cached` in runtime/actors.py), so that no other
phase counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.model_shapes import ModelShape
from rlaif_ray.rollout.buckets import SLOTS
from rlaif_ray.runtime.memory_plan import Actors, Device, precision_bytes


def largest_bucket(shape: ModelShape, weight_bytes: int, limit: int) -> int:
    """Bytes, at most: layers together up to `limit` bytes, but a layer, embedding or head is never split
    (rollout/buckets.py)."""
    table = shape.vocabulary * shape.hidden
    layers = (shape.body - table - shape.hidden - shape.other) // shape.layers
    largest = max(table + shape.other, layers, shape.head + shape.hidden) * weight_bytes
    return min(shape.parameters * weight_bytes, max(limit, largest))


def push_bytes(job: Any, actors: Sequence[Actors], device: Device) -> int:
    """Bytes that a learner rank takes during a push beside its states; 0 for jobs without one."""
    learner = next((one for one in actors if one.kind == "learner"), None)
    if not isinstance(job, TrainJob) or learner is None:
        return 0
    size = precision_bytes(job.policy.precision, device)
    bucket = largest_bucket(learner.shape, size, job.weight_sync.bucket_mb * 2**20)
    gathered = 2 * bucket if job.learner.zero_stage == 3 else 0
    return SLOTS * bucket + gathered


def while_pushing(one: Actors, push: int) -> int:
    """Bytes of one actor on each of its GPUs during a push that takes `push` of the learner's."""
    if one.kind == "learner":
        return one.memory.resting + push
    if one.need.role != "rollout" or one.memory.resting == one.memory.reserved:
        return one.memory.resting
    return one.memory.parts["weights"] + one.memory.parts["workspace"]
