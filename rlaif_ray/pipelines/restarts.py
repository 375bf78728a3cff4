"""A learner that is lost starts again from the newest checkpoint, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rlaif_ray.errors import LearnerLostError, NotFiniteError
from rlaif_ray.pipelines.finite import how_to_go_on

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import SupervisedJob, TrainJob
    from rlaif_ray.pipelines.checkpoint import Checkpoints, Saved
    from rlaif_ray.runtime.cluster import Cluster
    from rlaif_ray.tracking import Tracker

T = TypeVar("T")


def with_restarts(
    attempt: Callable[[Saved | None], T],
    found: Saved | None,
    *,
    job: TrainJob | SupervisedJob,
    cluster: Cluster,
    checkpoints: Checkpoints,
    track: Tracker,
) -> T:
    """What `attempt` returns, given the checkpoint to begin from; each starts a learner of its own.

    Raises:
        LearnerLostError: it was lost more than cluster.learner_restarts times without a newer checkpoint in between.
        NotFiniteError: loss, gradient or weights are no numbers; says how to go on.
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
            if restarts > job.cluster.learner_restarts:
                raise
            track.note(f"{error}: starting the learner again from step {_step(found)}")
            track.rewind(_step(found))
        except NotFiniteError as error:
            checkpoints.settle()  # one that is being written is of a step before
            raise how_to_go_on(error, job, track.last_step, checkpoints.last) from error


def _step(found: Saved | None) -> int:
    return 0 if found is None else found.step
