"""Answers that were given once are not asked for again: an Asker with a memory on disk.

The memory is what a killed labelling run goes on from, and why identical questions are asked once however far apart
they stand. An answer is on disk as soon as it is there, so that one that was paid for is not lost.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rlaif_ray.documents import parse_json
from rlaif_ray.errors import DocumentError, InputError, RunError
from rlaif_ray.types import Answer, Explanation, Question

if TYPE_CHECKING:
    from rlaif_ray.interfaces import Asker, GenerationSettings

WAIT_S = 3600.0  # longest wait for another thread that is asking the same question

Reply = TypeVar("Reply", Answer, Explanation)
_KINDS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Answer, Explanation)}


class Memory:
    """Replies by the hash of their question, in an SQLite file. Several threads may use it at once."""

    def __init__(self, path: Path) -> None:
        """Opens the file or makes it.

        Raises:
            InputError: it is no such file, or can't be written.
        """
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            # Written ahead without waiting for the disk: survives a killed process, which is what happens; a power
            # cut may cost the last answers, not the file.
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT, cost REAL) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"the remembered answers {path} can't be opened ({error}). Remove the file to ask anew, or use another "
                f"run_dir."
            ) from error
        self._path = path

    def get(self, key: bytes, kind: type[Reply]) -> Reply | None:
        """None for what is not there, or is no such reply: it is asked again.

        Raises:
            InputError: the file is damaged.
        """
        row = self._first("SELECT reply FROM replies WHERE key = ?", key)
        try:
            return None if row is None else _KINDS[kind].validate_python(parse_json(row[0], dict, lenient=True))
        except (DocumentError, ValidationError, TypeError, AttributeError):
            return None

    def put(self, key: bytes, reply: Answer | Explanation) -> None:
        """Raises RunError when the disk does not take it."""
        text = json.dumps(asdict(reply))  # ASCII: models emit lone surrogates, which SQLite can't hold
        try:
            with self._lock:
                self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (key, text, reply.cost))
        except sqlite3.Error as error:
            raise RunError(
                f"an answer could not be written to {self._path} ({error}): what is in it is kept. "
                "Free space, then start the same command again."
            ) from error

    def spent(self) -> float:
        """Cost of all that is remembered."""
        return float(self._first("SELECT COALESCE(SUM(cost), 0) FROM replies")[0])

    def __len__(self) -> int:
        return int(self._first("SELECT COUNT(*) FROM replies")[0])

    def _first(self, query: str, *values: bytes) -> Any:
        """The first row of what a query finds, or None."""
        try:
            with self._lock:
                return self._database.execute(query, values).fetchone()
        except sqlite3.Error as error:
            raise InputError(
                f"the remembered answers {self._path} can't be read ({error}): the file is damaged. Remove it to ask "
                f"anew, or restore it."
            ) from error

    def close(self) -> None:
        with self._lock:
            self._database.close()


class RememberingAsker:
    """Asks `asker` only what is not in `memory` yet. Failures are not remembered: they may go away."""

    def __init__(self, asker: Asker, memory: Memory) -> None:
        self.name, self.identity, self.special = asker.name, asker.identity, asker.special
        self.asked = 0  # questions that went to the judge
        self.recalled = 0  # questions answered from memory, or by another thread's asking
        self.memory = memory
        self._asker = asker
        self._lock = threading.Lock()
        self._pending: dict[bytes, threading.Event] = {}

    def fits(self, question: Question) -> bool:
        return self._asker.fits(question)

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        keys = [self._key(question, None) for question in questions]
        yield from self._replies(questions, keys, self._asker.answer, Answer)

    def explain(self, questions: Sequence[Question], settings: GenerationSettings) -> Iterator[tuple[int, Explanation]]:
        keys = [self._key(question, settings) for question in questions]
        yield from self._replies(questions, keys, lambda asked: self._asker.explain(asked, settings), Explanation)

    def _key(self, question: Question, settings: GenerationSettings | None) -> bytes:
        parts = [self.identity, asdict(question), None if settings is None else asdict(settings)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:16]

    def _replies(
        self,
        questions: Sequence[Question],
        keys: Sequence[bytes],
        ask: Callable[[Sequence[Question]], Iterator[tuple[int, Reply]]],
        kind: type[Reply],
    ) -> Iterator[tuple[int, Reply]]:
        places: dict[bytes, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        own: list[bytes] = []  # this call asks these
        others: list[bytes] = []  # another thread is asking these
        for key in places:
            with self._lock:
                stored = self.memory.get(key, kind)
                if stored is None:
                    (others if key in self._pending else own).append(key)
                    self._pending.setdefault(key, threading.Event())
            if stored is not None:
                yield from self._same(places[key], stored)
        try:
            for k, reply in ask([questions[places[key][0]] for key in own]) if own else ():
                if reply.failure is None:
                    self.memory.put(own[k], reply)
                self._done(own[k])
                yield from self._same(places[own[k]], reply, asked=1)
        finally:
            for key in own:
                self._done(key)
        if others:
            yield from self._after_others(questions, keys, others, places, ask, kind)

    def _after_others(
        self,
        questions: Sequence[Question],
        keys: Sequence[bytes],
        others: Sequence[bytes],
        places: dict[bytes, list[int]],
        ask: Callable[[Sequence[Question]], Iterator[tuple[int, Reply]]],
        kind: type[Reply],
    ) -> Iterator[tuple[int, Reply]]:
        """What other threads were asking; asked here when it failed there."""
        for key in others:
            with self._lock:
                event = self._pending.get(key)
            if event is not None:
                event.wait(WAIT_S)
        again = [i for key in others for i in places[key]]
        # The same way once more: now they are remembered, or nobody is asking them.
        for k, reply in self._replies([questions[i] for i in again], [keys[i] for i in again], ask, kind):
            yield again[k], reply

    def _done(self, key: bytes) -> None:
        with self._lock:
            event = self._pending.pop(key, None)
        if event is not None:
            event.set()

    def _same(self, indices: Sequence[int], reply: Reply, *, asked: int = 0) -> Iterator[tuple[int, Reply]]:
        with self._lock:
            self.asked += asked
            self.recalled += len(indices) - asked
        yield from ((i, reply) for i in indices)
