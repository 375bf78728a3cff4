"""Which one in its place an engine is: how the guard knows those that it has not compared."""

from __future__ import annotations

from typing import Any

from rlaif_ray.runtime.groups import EngineGroup
from rlaif_ray.runtime.replicas import Replicas
from rlaif_ray.runtime.supervision import Limits


class Watcher:
    """Of `Watch`: nobody looks after them but the test."""

    def add(self, watched: Any) -> None: ...
    def discard(self, watched: Any) -> None: ...
    def every_beat(self, look: Any) -> None: ...


def test_one_that_takes_the_place_of_another_is_told_from_it() -> None:
    watch: Any = Watcher()
    replicas = Replicas(
        "rollout engine", 2, lambda k: (object(), None), watch=watch, limits=Limits(60, 60, 600), takes_weights=True
    )
    group = EngineGroup(replicas)
    assert group.incarnations() == {}  # none has weights yet
    for replica in replicas.usable():
        replica.serving = True
    assert group.incarnations() == {"rollout engine 0": 0, "rollout engine 1": 0}
    for times in (1, 2):
        replicas.usable()[1].watched.lose("died")
        assert group.incarnations() == {"rollout engine 0": 0}
        replicas.look_after()
        assert group.incarnations() == {"rollout engine 0": 0}  # it serves once it has weights
        replicas.usable()[1].serving = True
        assert group.incarnations() == {"rollout engine 0": 0, "rollout engine 1": times}
