"""When a reading has come to rest; imports nothing but Python, so that its own test is quick."""

from __future__ import annotations

import time
from collections.abc import Callable


def settled(read: Callable[[], int], *, within: int, pause_s: float = 0.5, timeout_s: float = 30.0) -> int:
    """What `read` says once three readings in a row lie within so much of each other, or at the end of the time: an
    actor that was killed gives its memory back bit by bit."""
    end, last = time.monotonic() + timeout_s, [read()]
    while time.monotonic() < end and (len(last) < 3 or max(last) - min(last) > within):
        time.sleep(pause_s)
        last = [*last[-2:], read()]
    return last[-1]
