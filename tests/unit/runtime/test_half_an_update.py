"""Engines in which an update was begun, and whose learner is lost before it sends anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlaif_ray.errors import LearnerLostError
from rlaif_ray.runtime.supervision import Watched
from rlaif_ray.runtime.weight_sync import Sync


class Engine:
    """Its actor takes every call; who ends it is told."""

    usable = serving = True

    def __init__(self, name: str) -> None:
        self.watched = Watched(name, None, 60)
        self.watched.end = lambda: None  # type: ignore[method-assign]
        self.actor = SimpleNamespace(start_update=SimpleNamespace(remote=lambda: None))


def test_engines_that_began_an_update_are_not_used_again() -> None:
    """By NCCL, when one of them was lost as it began: the others make another group, and the learner dies in that."""
    engines: list[Any] = [Engine("a"), Engine("b")]
    sync: Any = object.__new__(Sync)
    sync._backend, sync._version = "nccl", 1
    calls = []

    def connect(engines: list[Any]) -> list[Any]:
        calls.append(len(engines))
        if len(calls) == 2:
            raise LearnerLostError("learner rank 0 died")
        return engines

    sync._answering, sync._connect = lambda engines: engines, connect
    sync._of_engines = lambda engines, ask: [(engine, ask(engine.actor)) for engine in engines]
    with pytest.raises(LearnerLostError, match="rank 0 died"):
        sync._push(engines)
    assert calls == [2, 2]
    assert [engine.watched.lost for engine in engines] == ["was left with half of an update"] * 2
    assert all(engine.watched.blameless for engine in engines)
