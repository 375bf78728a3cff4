"""Waiting for other processes: always with a deadline, always with a name for who is waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from rlaif_ray.errors import LearnerLostError, RlaifError, RunError
from rlaif_ray.runtime.supervision import BEAT_S, POLL_S, death
from rlaif_ray.runtime.turns import Patience, unfinished

if TYPE_CHECKING:
    from rlaif_ray.runtime.supervision import Watched

RANKS_START = "learner ranks (start)"
# What a rank says of peers that it has lost, by the name of the exception: gloo's and NCCL's.
BROKEN_COLLECTIVE = ("DistBackendError", "DistNetworkError", "DistStoreError")


def gather(refs: Sequence[Any], *, who: str, timeout_s: float, ranks: Sequence[Watched] = ()) -> list[Any]:
    """Results in order.

    Args:
        ranks: processes that work on it together: when one of them is lost, the others are not waited for.

    Raises:
        RlaifError: the actor's own error, as it was raised there.
        LearnerLostError: one of `ranks` died, went silent, or did not answer within `timeout_s`.
        RunError: another actor did, or one failed otherwise.
    """
    deadline = time.monotonic() + timeout_s
    pending = list(refs)
    while pending:
        left_s = deadline - time.monotonic()
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=max(0.0, min(POLL_S, left_s)))
        for ref in done:
            _raise_failure(ref, who, ranks)
        _raise_loss(who, ranks)
        if pending and left_s <= 0:
            raise (LearnerLostError if ranks else RunError)(
                f"{len(pending)} of {len(refs)} calls to {who} did not answer within {timeout_s:g} s. "
                f"Look at their logs in Ray's session folder; raise cluster.call_timeout_s if the work is that long."
            )
    return list(ray.get(list(refs)))


def so_far(refs: Sequence[Any], *, who: str, ranks: Sequence[Watched] = ()) -> list[Any]:
    """The results that are there by now; raises what `gather` would by now, and waits for nothing."""
    ready = ray.wait(list(refs), num_returns=len(refs), timeout=0)[0]
    for ref in ready:
        _raise_failure(ref, who, ranks)
    _raise_loss(who, ranks)
    return list(ray.get(ready))


class Starting:
    """Learner ranks that load, in turn with others of their GPUs."""

    def __init__(
        self, refs: Sequence[Any], ahead: Sequence[Sequence[Any]], ranks: Sequence[Watched], limit_s: float
    ) -> None:
        """`refs` are their starts, `ahead` the starts that each waits for before."""
        self._refs, self._ranks, self._limit_s = list(refs), ranks, limit_s
        self._ahead = [list(one) for one in ahead]
        self._patience = Patience(limit_s)  # of all: each waits for all others, to load together

    def look(self) -> bool:
        """Whether all have started. Never waits.

        Raises:
            RlaifError: as `gather`: one of them failed, or was lost.
            LearnerLostError: they take longer than they may.
        """
        so_far(self._refs, who=RANKS_START, ranks=self._ranks)
        pending = unfinished(self._refs)
        self._ahead = [unfinished(one) for one in self._ahead]
        if pending and self._patience.is_over(max(map(len, self._ahead))):
            raise LearnerLostError(
                f"{len(pending)} of {len(self._refs)} learner ranks did not start within cluster.start_timeout_s="
                f"{self._limit_s:g} s. Look at their logs in Ray's session folder; raise it if loading takes that long."
            )
        return not pending

    def wait(self) -> list[Any]:
        """What each says of its start."""
        while not self.look():
            ray.wait(unfinished(self._refs), timeout=POLL_S)
        return list(ray.get(self._refs))


def _raise_failure(ref: Any, who: str, ranks: Sequence[Watched]) -> None:
    try:
        ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RlaifError):
            raise cause from error
        _wait_for_loss(who, ranks)  # a rank whose peer died may tell of it before the death is known
        told = f"{who} failed: {type(cause).__name__}: {cause}"
        if ranks and type(cause).__name__ in BROKEN_COLLECTIVE:
            raise LearnerLostError(told) from error
        raise RunError(told) from error
    except RayError as error:
        _raise_loss(who, ranks)  # who ended it knows better why
        raise (LearnerLostError if ranks else RunError)(f"{who}: one {death(error)}") from error


def _raise_loss(who: str, ranks: Sequence[Watched]) -> None:
    lost = [f"{rank.name} {rank.lost}" for rank in ranks if rank.lost is not None]
    if lost:
        raise LearnerLostError(f"{who}: {'; '.join(lost)}")


def _wait_for_loss(who: str, ranks: Sequence[Watched]) -> None:
    deadline = time.monotonic() + 3 * BEAT_S
    while ranks and time.monotonic() < deadline:
        _raise_loss(who, ranks)
        time.sleep(POLL_S)
