"""Waiting for other processes: always with a deadline, always with a name for who is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rlaif_ray.errors import RlaifError, RunError


def gather(refs: Sequence[Any], *, who: str, timeout_s: float) -> list[Any]:
    """Results in order.

    Raises:
        RlaifError: the actor's own error, as it was raised there.
        RunError: an actor died, failed otherwise, or did not answer within `timeout_s`.
    """
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except GetTimeoutError:
        _, late = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        raise RunError(
            f"{len(late)} of {len(refs)} calls to {who} did not answer within {timeout_s:g} s. "
            f"Look at their logs in Ray's session folder; raise cluster.call_timeout_s if the work is that long."
        ) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RlaifError):
            raise cause from error
        raise RunError(f"{who} failed: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise RunError(f"{who} died: {str(error).splitlines()[0]}") from error
