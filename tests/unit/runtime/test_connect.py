"""Which Ray a job joins, and when it starts its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from rlaif_ray.config.jobs import LabelJob, TrainJob
from rlaif_ray.errors import InputError
from rlaif_ray.runtime import cluster
from tests.jobs import embedded

Calls = list[dict[str, Any]]


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What Ray was started with; nothing surrounds this process."""
    calls: Calls = []
    monkeypatch.setattr("ray.init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(cluster, "read_ray_address", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def connect(address: str | None) -> bool:
    job = embedded(TrainJob, {"cluster": {"address": address, "device": "cpu"}})
    return cluster._connect(job.cluster, [job])


def test_its_own_when_nothing_surrounds_it(inits: Calls) -> None:
    assert connect(None)  # never "auto": that would join another job's private Ray
    assert inits[0]["address"] == "local"


def test_the_configured_one(inits: Calls, listening: str) -> None:
    assert not connect(listening)
    assert inits[0]["address"] == listening and "num_cpus" not in inits[0]


def test_its_own_if_told_so_whatever_surrounds_it(
    inits: Calls, listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", listening)
    assert connect("local")
    assert inits[0]["address"] == "local"


def test_the_one_around_a_ray_job(inits: Calls, listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", listening)
    assert not connect(None)
    assert inits[0]["address"] is None


def test_the_one_that_ray_start_left_here(inits: Calls, listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "read_ray_address", lambda _: listening)
    assert not connect(None)
    assert inits[0]["address"] is None


def test_its_own_when_that_one_has_ended(inits: Calls, dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "read_ray_address", lambda _: dead)
    assert connect(None)


@pytest.mark.parametrize("way", ["config", "environment"])
def test_a_named_one_that_does_not_answer(inits: Calls, dead: str, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", dead if way == "environment" else "")
    with pytest.raises(InputError, match=f"no Ray cluster answers at cluster.address={dead}.*cluster.address=local"):
        connect(dead if way == "config" else None)
    assert inits == []


def test_one_that_refuses(inits: Calls, listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(InputError, match=r"can't be joined: Failed to connect.*RAY_AUTH_MODE=token"):
        connect(listening)


def test_one_ray_for_several_jobs_has_room_for_the_largest(inits: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(True))
    jobs = [embedded(TrainJob, {"cluster": {"cpus_per_actor": n, "device": "cpu"}}) for n in (1, 50, 2)]
    with cluster.open_ray(jobs[0].cluster, jobs):
        assert inits[0]["num_cpus"] == 150 and not ended  # rollout, judge, learner
    assert ended == [True]


def test_no_ray_for_jobs_without_actors(inits: Calls) -> None:
    longer = embedded(LabelJob, {"data": {"path": "x"}, "judge": {"type": "longer"}})
    with cluster.open_ray(longer.cluster, [longer]):
        assert not inits
