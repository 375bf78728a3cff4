"""An engine's half of a push: vLLM's update messages one by one, as the learner makes their weights ready."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from rlaif_ray.rollout.board import Reading, Source
from rlaif_ray.rollout.buckets import Bucket
from rlaif_ray.rollout.ipc import handle_of


def update_messages(buckets: Sequence[Bucket], sources: tuple[Source, ...]) -> Generator[dict[str, Any]]:
    """A message for every bucket; asking for the next one says that the one before is loaded.

    Without `sources` the weights come by a broadcast, whose order all know: a message only describes it. To be closed
    by whoever leaves before the end, so that the learner does not wait for him.

    Raises:
        EngineError: the learner failed on the way.
    """
    if not sources:
        yield from (bucket.described() for bucket in buckets)
        return
    reading = Reading(sources)
    try:
        for number, bucket in enumerate(buckets):
            reading.wait_staged(number + 1)
            yield message_of(bucket, [source.slots[number % len(source.slots)] for source in sources])
            reading.taken(number + 1)
    finally:
        reading.close()


def message_of(bucket: Bucket, slots: Sequence[Any]) -> dict[str, Any]:
    """vLLM's message of a bucket that is staged there: one slot of each rank that the engine reads (board.Source)."""
    if isinstance(slots[0], str):
        return {**bucket.described(), "path": slots[0], "offsets": list(bucket.offsets)}
    handles = {uuid: handle for slot in slots for uuid, handle in slot.items()}  # a worker takes that of its own GPU
    parts = zip(bucket.dtype_names, bucket.shapes, bucket.offsets, strict=True)
    return {
        **bucket.described(),
        "ipc_handles": [{uuid: handle_of(whole, *part) for uuid, whole in handles.items()} for part in parts],
    }
