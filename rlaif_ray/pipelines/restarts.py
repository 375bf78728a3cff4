"""A learner that is lost starts again from the newest checkpoint, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rlaif_ray.errors import LearnerLostError

if TYPE_CHECKING:
    from rlaif_ray.pipelines.checkpoint import Checkpoints, Saved
    from rlaif_ray.runtime.cluster import Cluster
    from rlaif_ray.tracking import Tracker

T = TypeVar("T")


def with_restarts(
    attempt: Callable[[Saved | None], T],
    found: Saved | None,
    *,
    limit: int,
    cluster: Cluster,
    checkpoints: Checkpoints,
    track: Tracker,
) -> T:
    """What `attempt` returns, given the checkpoint to begin from; each starts a learner of its own.

    Raises:
        LearnerLostError: it was lost more than `limit` times without a newer checkpoint in between.
    """
    restarts = 0
    while True:
        try:
            return attempt(found)
        except LearnerLostError as error:
            cluster.stop_learner()
            checkpoints.settle()
            before, found = _step(found), checkpoints.newest()
            restarts = restarts + 1 if _step(found) <= before else 1
            if restarts > limit:
                raise
            track.note(f"{error}: starting the learner again from step {_step(found)}")
            track.rewind(_step(found))


def _step(found: Saved | None) -> int:
    return 0 if found is None else found.step
