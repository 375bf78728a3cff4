"""Which of the job's processes live: all are watched, and wedged ones are ended.

A thread asks every actor for a sign of life each second, through a concurrency group of its own, so that one which
computes answers too. An actor is lost when its process is gone, when it is silent for `cluster.silent_after_s`, or
when what it is busy with has not moved for as long. What becomes of its work, runtime/replicas.py decides for engines
and scorers, pipelines/restarts.py for the learner.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayError

HEALTH = "health"  # Ray's concurrency group of `beat`
BEAT_S = 1.0
POLL_S = 0.2  # between looks at who is still alive, while others are waited for
START_TRIES = 3  # of one actor, one after the other


@dataclass(frozen=True, slots=True)
class Limits:
    """How long is waited for whom, in seconds."""

    start_s: float  # for an actor to be ready
    call_s: float  # for an answer
    silent_s: float  # for a sign of life


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life."""

    pid: int
    node: str
    stuck_s: float  # since what the actor is busy with last moved; 0 when it is idle, or does not tell
    broken: str | None = None  # what of it is gone while its own process lives


class Watched:
    """One actor, and what is known of its life."""

    def __init__(self, name: str, actor: Any, silent_s: float) -> None:
        self.name, self.actor = name, actor
        self.lost: str | None = None  # why it counts as gone
        self.blameless = False  # lost through no request's fault
        self.ready = False  # has started: from now on silence counts
        self.last: Beat | None = None
        self._silent_s = silent_s
        self._asked: Any = None
        self._heard = time.monotonic()

    def started(self) -> None:
        """Its start is over: from now on it is expected to answer."""
        self._heard, self.ready = time.monotonic(), True

    def check(self) -> None:
        """Takes the answer to the last question, if it has come, and asks again. Never waits."""
        if self.lost is not None:
            return
        try:
            if self._asked is None:
                self._asked = self.actor.beat.options(concurrency_group=HEALTH).remote()
            if ray.wait([self._asked], timeout=0)[0]:
                self.last = ray.get(self._asked)
                self._heard, self._asked = time.monotonic(), None
        except RayError as error:
            self.lose(death(error), blameless=is_of_the_node(error))
            return
        silent_s = time.monotonic() - self._heard
        if self.ready and silent_s > self._silent_s:
            self.lose(f"gave no sign of life for {silent_s:.0f} s", blameless=True)
        elif self.last is not None and self.last.broken is not None:
            self.lose(self.last.broken)
        elif self.last is not None and self.last.stuck_s > self._silent_s:
            self.lose(f"made no progress for {self.last.stuck_s:.0f} s")

    def lose(self, reason: str, *, blameless: bool = False) -> None:
        """From now on it counts as gone; what is left of it is ended."""
        if self.lost is None:
            self.blameless, self.lost = blameless, reason
            self.end()

    def end(self) -> None:
        """Ends the process: at once on this node, by Ray elsewhere (a stopped one takes it five seconds)."""
        with suppress(RayError, ValueError):
            ray.kill(self.actor)
        if self.last is not None and self.last.node == ray.get_runtime_context().get_node_id():
            end_process(self.last.pid)


def end_process(pid: int) -> None:
    """Kills one of Ray's workers on this node, and what it started."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if not process.name().startswith("ray::"):  # the number is another process's by now
            return
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.Error):
                each.kill()


def death(error: RayError) -> str:
    """Why an actor died, in one line, out of Ray's many."""
    if isinstance(error, OutOfMemoryError):
        found = re.search(r"\S+ used / \S+ limit", str(error))
        return f"was ended by Ray, since memory ran low ({found[0] if found else 'RAY_memory_usage_threshold'})"
    if isinstance(error, ObjectLostError):
        return "left an answer that went with its node"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("The actor is dead because")), lines[0] if lines else "")
    return f"died ({' '.join(told.removeprefix('The actor is dead because ').split())[:160].rstrip('. ')})"


# Of a process that died Ray tells within a second; when it can only say that an actor is not to be reached, the node or
# the network is gone. Who of a node has its memory, Ray's monitor can't tell: it ends one after the other.
OF_THE_NODE = (ActorUnavailableError, NodeDiedError, ObjectLostError, OutOfMemoryError)


def is_of_the_node(error: RayError) -> bool:
    """Whether the actor was lost to its node's failure or shortage, as far as Ray says, and to nothing it was asked."""
    return isinstance(error, OF_THE_NODE) or "node" in death(error).lower()


class Watch:
    """The thread that asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the list, which is replaced and never changed: reading needs none
        self._watched: list[Watched] = []
        self._acts: list[Callable[[], None]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervision", daemon=True)
        self._thread.start()

    def add(self, watched: Watched) -> None:
        with self._lock:
            self._watched = [*self._watched, watched]

    def discard(self, gone: Sequence[Watched]) -> None:
        with self._lock:
            self._watched = [w for w in self._watched if w not in gone]

    def every_beat(self, act: Callable[[], None]) -> None:
        """`act` is called after each round of questions, in the thread that asks."""
        self._acts = [*self._acts, act]

    def beats(self) -> list[Beat]:
        """The last sign of life of everybody alive."""
        return [w.last for w in self._watched if w.last is not None and w.lost is None]

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            for act in [*(w.check for w in self._watched), *self._acts]:
                # Ray itself may be what is ending; whoever waits for an actor then finds out by its own deadline.
                with suppress(RayError, ValueError, ConnectionError):
                    act()


def beat_of(busy_since: float | None, broken: str | None) -> Beat:
    """The sign of life of this process; `busy_since` is when what it does last moved (monotonic), None when idle."""
    stuck_s = 0.0 if busy_since is None else time.monotonic() - busy_since
    return Beat(os.getpid(), ray.get_runtime_context().get_node_id(), stuck_s, broken)
