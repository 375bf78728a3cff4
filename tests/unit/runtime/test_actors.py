"""When a learner rank gives cached memory of its GPU back, for engines that start or wake there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.runtime import actors
from rlaif_ray.runtime.actors import LearnerActor
from tests.jobs import embedded


def test_a_rank_that_shares_its_gpu_leaves_nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """After everything that takes more than the learner holds at rest: what it keeps is missing where vLLM looks."""
    freed: list[bool] = []
    monkeypatch.setattr(actors, "free_cached", freed.append)
    checkpoint = SimpleNamespace(load=lambda folder: {"updates": 3})
    learner = SimpleNamespace(
        notes=["a note"],
        annotate=lambda *_, **__: {0: {}},
        update=lambda *_: {"loss": 1.0},
        save_policy=lambda folder: [],
        readings=lambda text: None,
        checkpoint=checkpoint,
    )
    monkeypatch.setattr("rlaif_ray.learner.ppo.RlRank", lambda *_, **__: learner)
    job = embedded(TrainJob, {"cluster": {"device": "gpu", "gpus_per_actor": 0.33}})
    rank: Any = LearnerActor()
    calls = {
        "start": lambda: rank.start(job, SimpleNamespace(rank=0, device="cuda"), "bf16") == ["a note"],
        "annotate": lambda: rank.annotate([], [], None, True) == {0: {}},
        "update": lambda: rank.update(None, []) == {"loss": 1.0},
        "load_checkpoint": lambda: rank.load_checkpoint(None) == {"updates": 3},
        "save_policy": lambda: rank.save_policy("folder") == [],
        "readings": lambda: rank.readings(None) is None,
    }
    for name, call in calls.items():
        freed.clear()
        assert call() and freed == [True], name
