"""What vLLM starts for one of our engines: no such process outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

ENGINE_PROCESS = "RLAIF_ENGINE_PROCESS"  # in the environment of an engine's process, and so of all that it starts
_watching: set[int] = set()  # process ids; after a fork the thread is gone, and the id is another one


def is_engines_child() -> bool:
    """Whether one of our engines started this process. vLLM loads our plugin in each of its processes, also in those
    of a server that the user runs in the same Python environment: those are not ours to end."""
    return os.environ.get(ENGINE_PROCESS) == "1" and multiprocessing.parent_process() is not None


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
