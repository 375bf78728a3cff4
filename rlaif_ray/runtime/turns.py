"""Actors that share a GPU load one after the other.

vLLM compares a GPU's free memory at the start and at the end of its own, whoever took or freed it in between: what a
neighbour loads meanwhile would count as its own. On different GPUs they load at the same time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlaif_ray.runtime.placement import Slot, bundles_of


class Turns:
    """Who is loading on each GPU that several share. Any thread may ask, as replacements are started by another."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._shared = {bundle.slots[0].bundle for bundle in bundles_of(slots) if bundle.gpus and len(bundle.slots) > 1}
        self._under_way: dict[int, list[Any]] = {}
        self._lock = threading.Lock()

    def start(self, slot: Slot, begin: Callable[[list[Any]], Any]) -> tuple[Any, list[Any]]:
        """Starts an actor behind whoever is loading on its GPU: `begin` gets the refs of their starts, which the actor
        is to wait for, and returns the ref of its own. Returns that, and those.

        Who waits, waits for those alone that were asked before: nobody can wait in a circle.
        """
        if slot.bundle not in self._shared:
            return begin([]), []
        with self._lock:
            ahead = unfinished(self._under_way.get(slot.bundle, []))
            ref = begin(list(ahead))
            self._under_way[slot.bundle] = [*ahead, ref]
        return ref, ahead


class Patience:
    """How long starts are waited for: `limit_s` from when nobody loads ahead of them any more. However long that goes
    on, each that was ahead has as long at most: one that hangs there is not waited for without end."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()
        self.since = self._began  # when the last of those ahead had ended, as far as is known
        self._most = 0  # that were ahead

    def is_over(self, ahead: int) -> bool:
        """Asked now and then; `ahead` is how many still load before it."""
        now = time.monotonic()
        if ahead:
            self.since, self._most = now, max(self._most, ahead)
        return now - self.since > self._limit_s or now - self._began > self._limit_s * (1 + self._most)


def unfinished(refs: Sequence[Any]) -> list[Any]:
    """Those whose work has neither ended nor failed. Never waits."""
    import ray

    return ray.wait(list(refs), num_returns=len(refs), timeout=0)[1] if refs else []


def await_turn(ahead: Sequence[Any]) -> None:
    """In the actor: until all of these have ended or failed."""
    import ray

    if ahead:
        ray.wait(list(ahead), num_returns=len(ahead))
