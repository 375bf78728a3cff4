"""Actors that do the same work: one that is lost is replaced, and what it had not answered, others do.

What it was asked goes to others; a request under which an actor was lost is tried once more, alone, and is never sent
again if that one is lost too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rlaif_ray.errors import EngineError, Preempted, ReplicasLostError, RlaifError, RunError
from rlaif_ray.runtime.supervision import POLL_S, START_TRIES, Limits, Watch, Watched, death, is_of_the_node
from rlaif_ray.runtime.turns import Patience, unfinished

TRIES = 2  # losses under one request before it is in quarantine
NO_ROOM = "Free memory on device"  # how vLLM begins what it says of a GPU on which others hold too much at its start
CROWDED_S = 30.0  # before one that found no room tries again while it is waited for; else it waits for the next phase

Split = Callable[[Sequence[int], int], list[list[int]]]  # items into so many parts; parts may be empty


@dataclass(slots=True, eq=False)
class Replica:
    """One of several actors that do the same work."""

    watched: Watched
    starting: Any  # ref of its start; None once it is ready
    ahead: list[Any]  # starts on its GPU that it waits for before its own
    patience: Patience  # with its start
    incarnation: int = 0  # how many others were in its place before
    crowded: bool = False  # it could not start, since others held the memory of its GPU
    serving: bool = False  # may be asked; with weights to take, only once it has them

    @property
    def actor(self) -> Any:
        return self.watched.actor

    @property
    def usable(self) -> bool:
        """Ready to be asked, or to be given weights."""
        return self.starting is None and self.watched.lost is None


class Replicas:
    """Actors that do the same work. One that is lost is replaced; what it had not answered, others do."""

    def __init__(
        self,
        role: str,
        count: int,
        launch: Callable[[int], tuple[Any, ...]],
        *,
        watch: Watch,
        limits: Limits,
        takes_weights: bool = False,
        takes_turns: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`launch(k)` starts the k-th and returns the actor, the ref of its start, and the refs of other starts that it
        waits for before: its time to start begins once they have ended.

        With `takes_weights` a replica serves only once `admit`, which whoever brings the weights sets, has let it.
        With `takes_turns` others use its memory while these have no work: one starts only while they have, and the work
        ends only once it is up.
        """
        self.role, self.count = role, count
        self.lost = 0  # replicas lost so far
        self.quarantined = 0  # requests given up so far
        self.leave: Callable[[], bool] = lambda: False  # asked while waiting: whether to give up what is under way
        self.admit: Callable[[list[Replica], bool], None] | None = None  # (newcomers, whether others are busy)
        self._launch, self._watch, self._limits = launch, watch, limits
        self._takes_weights, self._note = takes_weights, note
        self._takes_turns, self._turn = takes_turns, True  # whether it is theirs: always, if they take none
        self._lock = threading.RLock()
        self._failed_starts = [0] * count
        self._stood = False  # whether all were ready once
        self._awaited = False  # whether somebody can't go on without those that start
        self._held: dict[int, float] = {}  # when those that found no room did so, by number
        self._said: set[str] = set()
        self._start_errors: dict[int, RlaifError] = {}  # by number, until one of that number is ready
        self._outlaws: set[Hashable] = set()
        self._stopped = False
        self._replicas = [self._start(k) for k in range(count)]
        watch.every_beat(self.look_after)

    def _start(self, k: int, incarnation: int = 0) -> Replica:
        actor, ref, *ahead = self._launch(k)
        watched = Watched(f"{self.role} {k}", actor, self._limits.silent_s)
        self._watch.add(watched)
        return Replica(watched, ref, ahead, Patience(self._limits.start_s), incarnation)

    # Their life

    @property
    def actors(self) -> list[Any]:
        """Those that are ready."""
        return [r.actor for r in self.usable()]

    def usable(self) -> list[Replica]:
        """Those that are ready, with current weights or not."""
        return [r for r in self._replicas if r.usable]

    def serving(self) -> list[Replica]:
        return [r for r in self._replicas if r.usable and r.serving]

    def wait_started(self, look: Callable[[], object] = lambda: None) -> None:
        """Until all are ready. Meanwhile `look` is called, whose errors end it: those ahead on a GPU may be others.

        Raises:
            RlaifError: why one could not start.
        """
        patience = Patience(self._limits.start_s + POLL_S)
        with self._their_turn(), self._waiting():
            while len(self.usable()) < self.count:
                look()
                for error in list(self._start_errors.values()):
                    raise error
                if max(self._failed_starts) >= START_TRIES or patience.is_over(self._ahead()):
                    late = [r.watched.name for r in self._replicas if not r.usable]
                    reasons = {r.watched.lost for r in self._replicas if r.watched.lost}
                    raise RunError(
                        f"{', '.join(late)} did not start within cluster.start_timeout_s={self._limits.start_s:g} s "
                        f"({'; '.join(sorted(reasons)) or 'still loading'}). Look at their logs in Ray's session "
                        f"folder."
                    )
                self._await_starts()
        self._stood = True

    def _ahead(self) -> int:
        """How many load on a GPU before one of these may, at most."""
        starting = [r for r in self._replicas if r.starting is not None and r.watched.lost is None]
        return max((len(r.ahead) for r in starting), default=0)

    def _under_way(self) -> bool:
        return any(r.starting is not None and r.watched.lost is None for r in self._replicas)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def _await_starts(self) -> None:
        """Sees who has started, at the latest after a moment."""
        ray.wait([r.starting for r in self._replicas if r.starting is not None] or [ray.put(0)], timeout=POLL_S)
        self.look_after()

    def look_after(self) -> None:
        """Notices who has become ready, and starts others for the lost."""
        with self._lock:
            for k, replica in enumerate(self._replicas):
                self._see_start(k, replica)
                due = self._turn and not self._stopped and self._failed_starts[k] < START_TRIES
                if replica.watched.lost is not None and due and not self._is_held(k):
                    self._replace(k, replica)

    def _is_held(self, k: int) -> bool:
        """Whether the k-th, which found no room on its GPU, has to wait: the learner may hold more than planned there
        until its phase ends, for minutes."""
        since = self._held.get(k)
        return since is not None and not (self._awaited and time.monotonic() - since > CROWDED_S)

    def _see_start(self, k: int, replica: Replica) -> None:
        if replica.starting is None or replica.watched.lost is not None:
            return
        replica.ahead = unfinished(replica.ahead)
        late = replica.patience.is_over(len(replica.ahead))
        if not late and not ray.wait([replica.starting], timeout=0)[0]:
            return
        try:
            notes = ray.get(replica.starting, timeout=0)
        except RayTaskError as error:
            if self._stood and isinstance(error.cause, EngineError) and NO_ROOM in str(error.cause):
                replica.crowded, self._held[k] = True, time.monotonic()
                self._note(f"{replica.watched.name} found no room on its GPU: it starts again with the next phase")
            elif isinstance(error.cause, RlaifError):
                self._start_errors[k] = error.cause
            replica.watched.lose(f"could not start ({type(error.cause).__name__}: {error.cause})")
        except GetTimeoutError:
            replica.watched.lose(f"did not start within {self._limits.start_s:g} s")
        except RayError as error:
            replica.watched.lose(death(error))
        else:
            self._failed_starts[k] = 0
            self._start_errors.pop(k, None)
            replica.watched.started()
            replica.starting, replica.serving = None, not self._takes_weights
            self._tell(notes)
            if self.lost:
                seconds = time.monotonic() - replica.patience.since
                self._note(f"{replica.watched.name} is ready again after {seconds:.0f} s")

    def _tell(self, notes: list[str] | None) -> None:
        """What actors say of their start; they are alike, so each says the same."""
        for text in notes or ():
            if text not in self._said:
                self._said.add(text)
                self._note(text)

    def _replace(self, k: int, gone: Replica) -> None:
        self.lost += 1
        self._failed_starts[k] += gone.starting is not None and not gone.crowded
        self._held.pop(k, None)
        self._watch.discard([gone.watched])
        if self._failed_starts[k] >= START_TRIES:
            self._note(f"{gone.watched.name} {gone.watched.lost}; given up after {START_TRIES} starts")
            return
        self._note(f"{gone.watched.name} {gone.watched.lost}; starting another")
        self._replicas[k] = self._start(k, gone.incarnation + 1)

    def stop(self) -> None:
        """Ends them all."""
        with self._lock:
            self._stopped = True
            self._watch.discard([r.watched for r in self._replicas])
            for replica in self._replicas:
                replica.watched.lose("ended")

    # Their work

    def answer(self, replica: Replica, ref: Any, timeout_s: float) -> Any:
        """What one replica answers.

        Raises:
            EngineError: it is lost.
            RlaifError: what it raised itself.
        """
        sent = _Sent(replica, [])
        with self._losses(sent):
            while not ray.wait([ref], timeout=POLL_S)[0]:
                if replica.watched.lost is not None:
                    break
                if time.monotonic() - sent.at > timeout_s:
                    replica.watched.lose(f"did not answer within {timeout_s:g} s")
            return self._answer(ref, sent)
        raise EngineError(f"{replica.watched.name} {replica.watched.lost}")

    def ask_each(self, ask: Callable[[Any], Any]) -> dict[str, Any]:
        """What every replica that serves answers, by its name; without those that are lost over it."""
        asked = [(replica, ask(replica.actor)) for replica in self.serving()]
        found = {}
        for replica, ref in asked:
            with suppress(EngineError):  # it is lost, and replaced
                found[replica.watched.name] = self.answer(replica, ref, self._limits.call_s)
        return found

    def run(
        self,
        keys: Sequence[Hashable],
        ask: Callable[[Any, list[int]], Any],
        split: Split,
        read: Callable[[Any], list[Any]] = list,
    ) -> list[Any]:
        """One answer per item, in order; None for those in quarantine.

        Args:
            keys: by which an item that is in quarantine is known again.
            ask: (actor, items by number) -> ref of its reply.
            split: shares out items among replicas.
            read: a reply as a list of one answer per item.

        Raises:
            ReplicasLostError: none was left, and no new one came within `cluster.start_timeout_s`.
            Preempted: `leave` said so.
            RlaifError: what an actor itself raised, when it is not the actor that failed.
        """
        with self._their_turn():
            return self._run(keys, ask, split, read)

    @contextmanager
    def _their_turn(self) -> Iterator[None]:
        """Work; where they take turns with others, nobody is still starting when it has ended well."""
        self._held.clear()  # a phase of theirs: others have given back what they took for their own
        if not self._takes_turns:
            yield
            return
        self._turn = True
        self.look_after()
        try:
            yield
            while self._under_way():
                self._leave_if_asked()
                self._await_starts()
        finally:
            self._turn = False

    def _run(
        self,
        keys: Sequence[Hashable],
        ask: Callable[[Any, list[int]], Any],
        split: Split,
        read: Callable[[Any], list[Any]],
    ) -> list[Any]:
        answers: list[Any] = [None] * len(keys)
        asked = [i for i, key in enumerate(keys) if key not in self._outlaws]
        work = _Work(deque(), split)
        while not self.serving():
            self._wait_for_one()
        work.add(asked, len(self.serving()))
        while work.todo or work.flying:
            self._leave_if_asked()
            self._send(work, ask)
            if not work.flying:
                self._wait_for_one()
                continue
            done = ray.wait(list(work.flying), num_returns=1, timeout=POLL_S)[0]
            for ref in done or [ref for ref, sent in work.flying.items() if self._overdue(sent)]:
                sent = work.flying.pop(ref)
                with self._losses(sent):
                    for i, answer in zip(sent.items, read(self._answer(ref, sent)), strict=True):
                        answers[i] = answer
                if sent.replica.watched.lost is not None and not sent.answered:
                    self._again(work, sent, keys)
        return answers

    def _send(self, work: _Work, ask: Callable[[Any, list[int]], Any]) -> None:
        """Gives every replica that this call has left idle its next share."""
        newcomers = [r for r in self.usable() if not r.serving]
        if newcomers and self.admit is not None:
            self.admit(newcomers, bool(work.flying))
        busy = {id(sent.replica) for sent in work.flying.values()}
        for replica in self.serving():
            if work.todo and id(replica) not in busy:
                items = work.todo.popleft()
                work.flying[ask(replica.actor, items)] = _Sent(replica, items)

    def _overdue(self, sent: _Sent) -> bool:
        """Whether no answer will come: the replica is lost, or has had its time."""
        if time.monotonic() - sent.at > self._limits.call_s:
            sent.replica.watched.lose(f"did not answer within cluster.call_timeout_s={self._limits.call_s:g} s")
        return sent.replica.watched.lost is not None

    def _answer(self, ref: Any, sent: _Sent) -> Any:
        found = ray.get(ref, timeout=0 if sent.replica.watched.lost else None)
        sent.answered = True
        return found

    @contextmanager
    def _losses(self, sent: _Sent) -> Iterator[None]:
        """Turns what a call raised into a loss of the replica, where it is one."""
        watched = sent.replica.watched
        try:
            yield
        except RayTaskError as error:
            if isinstance(error.cause, EngineError):
                watched.lose(f"failed ({error.cause})")
            elif isinstance(error.cause, RlaifError):
                raise error.cause from error
            else:
                raise RunError(f"{watched.name} failed: {type(error.cause).__name__}: {error.cause}") from error
        except GetTimeoutError:  # lost before it could answer
            pass
        except RayError as error:
            watched.lose(death(error), blameless=is_of_the_node(error))

    def _again(self, work: _Work, sent: _Sent, keys: Sequence[Hashable]) -> None:
        """What a lost replica left undone is done by others. Its requests are suspects, unless it was no fault of
        theirs: each is tried alone, and one that loses another replica is not sent again."""
        if sent.replica.watched.blameless:
            work.add(sent.items, max(1, len(self.serving())))
            return
        for i in sent.items:
            work.losses[i] = work.losses.get(i, 0) + 1
            if work.losses[i] < TRIES:
                work.todo.append([i])
                continue
            self._outlaws.add(keys[i])
            self.quarantined += 1
            self._note(
                f"a request lost {TRIES} {self.role} replicas: it is in quarantine ({sent.replica.watched.lost})"
            )

    def _leave_if_asked(self) -> None:
        if self.leave():
            raise Preempted

    def _wait_for_one(self) -> None:
        """Until a replica serves."""
        with self._waiting():
            self._until_one_serves()

    def _until_one_serves(self) -> None:
        began, told, patience = time.monotonic(), False, Patience(self._limits.start_s)
        while not self.serving():
            self._leave_if_asked()
            usable = self.usable()
            if usable and self.admit is not None:
                self.admit(usable, False)
                continue
            waited_s = time.monotonic() - began
            given_up = min(self._failed_starts) >= START_TRIES
            if patience.is_over(self._ahead()) or given_up:
                why = "; ".join(f"{r.watched.name} {r.watched.lost or 'is starting'}" for r in self._replicas)
                raise ReplicasLostError(
                    f"no {self.role} is left and no new one came (waited {waited_s:.0f} s of cluster.start_timeout_s="
                    f"{self._limits.start_s:g} s, {self.lost} lost so far: {why}). Look at their logs in Ray's session "
                    f"folder and at the nodes' memory, then resume."
                )
            if not told:
                self._note(f"no {self.role} is left: waiting for a new one")
                told = True
            time.sleep(POLL_S)
            self.look_after()


@dataclass(slots=True)
class _Sent:
    """A share that a replica works on."""

    replica: Replica
    items: list[int]
    at: float = field(default_factory=time.monotonic)
    answered: bool = False


@dataclass(slots=True)
class _Work:
    """What one call of `Replicas.run` has yet to do."""

    todo: deque[list[int]]
    split: Split
    flying: dict[Any, _Sent] = field(default_factory=dict)  # by ref
    losses: dict[int, int] = field(default_factory=dict)  # of replicas, by item

    def add(self, items: Sequence[int], parts: int) -> None:
        self.todo.extend(share for share in self.split(items, parts) if share)
