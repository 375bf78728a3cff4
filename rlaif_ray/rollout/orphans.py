"""No process of an engine outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

_watching: set[int] = set()  # process ids; after a fork the thread is gone, and the id is another one


def end_with_parent() -> None:
    """Ends this process at once when the one is gone that started it by `multiprocessing`; elsewhere does nothing.

    vLLM's engine core and its workers would stay where an actor was killed, and keep their GPU's memory: the engine
    that takes its place would not find room. The kernel's own way, PR_SET_PDEATHSIG, asks for the death of the *thread*
    that forked, and an actor's threads come and go.
    """
    parent = multiprocessing.parent_process()
    if parent is None or os.getpid() in _watching:
        return
    _watching.add(os.getpid())

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
