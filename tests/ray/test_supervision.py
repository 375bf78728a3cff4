"""Replicas under supervision, on real Ray processes that are really killed, stopped and poisoned; without an engine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError, RayError

from rlaif_ray.errors import EngineError, InputError, LearnerLostError, Preempted, ReplicasLostError, RunError
from rlaif_ray.runtime import replicas as replicas_module
from rlaif_ray.runtime.actors import Actor
from rlaif_ray.runtime.cluster import Cluster
from rlaif_ray.runtime.groups import EngineGroup, in_runs
from rlaif_ray.runtime.replicas import Replicas
from rlaif_ray.runtime.supervision import BEAT_S, HEALTH, Limits, Watch, Watched, death, end_process, is_of_the_node
from rlaif_ray.runtime.turns import await_turn
from rlaif_ray.runtime.waiting import Starting, gather
from tests.pace import scaled

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SILENT_S = scaled(3.0)


class Doubler(Actor):
    """Doubles numbers; some of them are trouble."""

    def start(self, fails: str | None = None) -> None:
        if fails == "input":
            raise InputError("no such model")
        if fails == "dies":
            os._exit(1)
        if fails == "crowded":
            raise EngineError(
                "vLLM could not start with x: ValueError: Free memory on device cuda:0 (9.1/79.1 GiB) on ..."
            )
        if fails == "hangs":
            time.sleep(3600)

    def start_behind(self, ahead: list[Any], fails: str | None) -> None:
        await_turn(ahead)
        self.start(fails)

    def double(self, numbers: list[int]) -> list[int]:
        for number in numbers:
            if number == 13:
                os._exit(1)
            if number == 14:
                raise EngineError("it broke")
            if number == 15:
                raise ValueError("not mine")
            if number >= 1000:
                time.sleep(number / 1000)
        return [2 * number for number in numbers]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    assert not ray.is_initialized()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


class Doublers(Replicas):
    """Replicas of Doubler, and what they noted."""

    def __init__(self, watch: Watch, count: int, *, start_s: float = 60.0, **kwargs: Any) -> None:
        self.notes: list[str] = []
        self.fails: str | None = None  # how those fail that are started from now on
        limits = Limits(scaled(start_s), scaled(kwargs.pop("call_s", 60.0)), SILENT_S)
        super().__init__("doubler", count, self.launch, watch=watch, limits=limits, note=self.notes.append, **kwargs)
        self.wait_started()
        while not all(r.watched.last for r in self._replicas):
            time.sleep(0.05)

    def launch(self, k: int) -> tuple[Any, Any]:
        actor = ray.remote(num_cpus=0, concurrency_groups={HEALTH: 1})(Doubler).remote()
        return actor, actor.start.remote(getattr(self, "fails", None))

    def pid(self, k: int) -> int:
        beat = self._replicas[k].watched.last
        assert beat is not None
        return beat.pid

    def double(self, numbers: list[int]) -> list[Any]:
        return self.run(numbers, lambda actor, items: actor.double.remote([numbers[i] for i in items]), in_runs)

    def until(self, happened: Any, within_s: float) -> float:
        began = time.monotonic()
        while not happened():
            assert time.monotonic() - began < scaled(within_s), self.notes
            time.sleep(0.02)
        return time.monotonic() - began


@pytest.fixture
def two(watch: Watch) -> Iterator[Doublers]:
    group = Doublers(watch, 2)
    yield group
    group.stop()


def test_work_is_shared_and_comes_back_in_order(two: Doublers) -> None:
    assert two.double(list(range(9))) == [2 * k for k in range(9)]
    assert two.double([]) == []
    assert (two.lost, two.quarantined, two.notes) == (0, 0, [])


@pytest.mark.parametrize(("number", "within_s"), [(signal.SIGKILL, 5.0), (signal.SIGSTOP, 8.0)])
def test_one_that_is_lost_is_noticed_and_replaced(two: Doublers, number: int, within_s: float) -> None:
    pid = two.pid(0)
    os.kill(pid, number)
    two.until(lambda: two.lost == 1, within_s)
    assert two.double([1, 2, 3]) == [2, 4, 6]  # by who is left
    two.until(lambda: len(two.serving()) == 2, 30)
    assert two.double([4, 5]) == [8, 10]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert "doubler 0" in two.notes[0] and "starting another" in two.notes[0] and "ready again" in two.notes[1]


@pytest.mark.parametrize(
    ("error", "told", "blameless"),
    [
        (RayActorError("00", "It died.\nThe actor is dead because it exited.\n more"), "died (it exited)", False),
        (
            RayActorError("00", "It died.\nThe actor is dead because its node has died."),
            "died (its node has died)",
            True,
        ),
        (ActorUnavailableError("no connection", None), "died (The actor", True),
        (OutOfMemoryError("It was 5.49GB used / 23.54GB limit (0.2)"), "ran low (5.49GB used / 23.54GB limit)", True),
        (ObjectLostError("00ff", None, ""), "went with its node", True),
    ],
)
def test_what_ray_says_of_one_that_is_lost(error: RayError, told: str, blameless: bool) -> None:
    assert told in death(error) and is_of_the_node(error) == blameless


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_a_lost_one_left_undone_others_do(two: Doublers, number: int) -> None:
    refs = []

    def ask(actor: Any, items: list[int]) -> Any:
        refs.append(actor.double.remote([1500 + i for i in items]))
        if len(refs) == 1:
            os.kill(two.pid(0), number)
        return refs[-1]

    assert two.run(list(range(4)), ask, in_runs) == [2 * (1500 + i) for i in range(4)]
    assert (two.lost, two.quarantined) == (1, 0)
    # After a death its requests are suspects, each tried alone; after silence they are not.
    assert len(refs) == (4 if number == signal.SIGKILL else 3)


def test_a_request_that_ends_replicas_is_in_quarantine_after_two(two: Doublers) -> None:
    assert two.double([1, 2, 13, 4]) == [2, 4, None, 8]
    assert (two.lost, two.quarantined) == (2, 1)
    assert sum("it is in quarantine" in note for note in two.notes) == 1
    assert two.double([13, 5]) == [None, 10]  # known from now on: nobody is asked
    assert (two.lost, two.quarantined) == (2, 1)


def test_an_engine_that_broke_is_replaced_as_if_it_had_died(two: Doublers) -> None:
    assert two.double([14, 1]) == [None, 2]
    assert two.quarantined == 1
    two.until(lambda: two.lost == 2 and len(two.serving()) == 2, 30)
    assert sum("failed (it broke); starting another" in note for note in two.notes) == 2


def test_one_that_is_not_trusted_is_replaced(two: Doublers) -> None:
    name = two.serving()[1].watched.name
    EngineGroup(two).lose(name, "computed one text in two ways")
    two.until(lambda: two.lost == 1, 5)
    assert any(note.startswith(f"{name} computed one text in two ways") for note in two.notes)
    two.until(lambda: len(two.serving()) == 2, 30)


def test_an_error_that_is_no_engines_ends_the_call(two: Doublers) -> None:
    with pytest.raises(RunError, match=r"doubler 0 failed: ValueError: not mine"):
        two.double([15, 1])


def test_a_call_without_an_answer_has_a_deadline(watch: Watch) -> None:
    group = Doublers(watch, 2, call_s=2.0)
    try:
        assert group.double([1, 100_000]) == [2, None]
        assert group.quarantined == 1 and f"call_timeout_s={scaled(2.0):g}" in " ".join(group.notes)
    finally:
        group.stop()


def test_those_that_take_turns_start_in_their_own(watch: Watch) -> None:
    """Others use their memory in between; and the call ends only once all are up."""
    group = Doublers(watch, 2, takes_turns=True)
    try:
        assert group.double([1, 2]) == [2, 4]
        os.kill(group.pid(0), signal.SIGKILL)
        group.until(lambda: len(group.serving()) == 1, 5.0)
        time.sleep(SILENT_S)  # several looks
        assert (group.lost, group.notes) == (0, [])
        assert group.double([1, 2, 3]) == [2, 4, 6]
        assert group.lost == 1 and len(group.serving()) == 2
        group.fails = "dies"
        os.kill(group.pid(1), signal.SIGKILL)
        group.until(lambda: len(group.serving()) == 1, 5.0)
        assert group.double([1, 2]) == [2, 4] and group._failed_starts == [0, 3]  # given up, not waited for
    finally:
        group.stop()


def test_none_left_and_no_new_one(watch: Watch) -> None:
    group = Doublers(watch, 1, start_s=20.0)
    try:
        group.fails = "dies"
        os.kill(group.pid(0), signal.SIGKILL)
        with pytest.raises(ReplicasLostError, match=r"no doubler is left .* doubler 0 .*then resume"):
            group.double([1])
        assert any("given up after 3 starts" in note for note in group.notes) or group.lost >= 2
    finally:
        group.stop()


def test_one_without_room_waits_for_the_next_phase(watch: Watch) -> None:
    """A learner may hold more than planned for minutes: three starts in them would give the engine up."""
    group = Doublers(watch, 2)
    try:
        group.fails = "crowded"
        os.kill(group.pid(0), signal.SIGKILL)
        for phase in range(1, 5):  # more than START_TRIES
            group.until(lambda n=phase: sum("no room on its GPU" in note for note in group.notes) == n, 30)  # type: ignore[misc]
            time.sleep(3 * BEAT_S)  # several looks
            assert group.lost == phase and group._failed_starts == [0, 0]
            if phase == 4:
                group.fails = None
            assert group.double([1, 2]) == [2, 4]  # by who is left
        group.until(lambda: len(group.serving()) == 2, 30)
        assert not any("given up" in note for note in group.notes)
    finally:
        group.stop()


def test_one_without_room_is_tried_again_while_it_is_all_there_could_be(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "CROWDED_S", 0.5)
    group = Doublers(watch, 1)
    try:
        group.fails = "crowded"
        os.kill(group.pid(0), signal.SIGKILL)
        group.until(lambda: any("no room" in note for note in group.notes), 30)
        threading.Timer(3.0, setattr, (group, "fails", None)).start()
        assert group.double([4]) == [8] and group.lost >= 3
    finally:
        group.stop()


def test_without_room_at_the_first_start_is_an_error(watch: Watch) -> None:
    class Crowded(Doublers):
        def launch(self, k: int) -> tuple[Any, Any]:
            self.fails = "crowded"
            return super().launch(k)

    with pytest.raises(EngineError, match="Free memory on device"):
        Crowded(watch, 1)


@ray.remote(num_cpus=0)
def ended_after(seconds: float) -> None:
    """The start of somebody ahead on a GPU."""
    time.sleep(seconds)


class Queued(Doublers):
    """Doublers that wait for somebody ahead of theirs."""

    ahead_s: float | None = None

    def launch(self, k: int) -> tuple[Any, ...]:
        actor = ray.remote(num_cpus=0, concurrency_groups={HEALTH: 1})(Doubler).remote()
        ahead = [] if self.ahead_s is None else [ended_after.remote(self.ahead_s)]  # type: ignore[attr-defined]
        return actor, actor.start_behind.remote(ahead, None), *ahead


def test_one_that_hangs_ahead_is_not_waited_for_without_end(watch: Watch) -> None:
    """Twice the time to start, for the one ahead and itself."""

    class Behind(Queued):
        ahead_s = 3600.0

    began = time.monotonic()
    with pytest.raises(RunError, match=r"doubler 0 did not start within cluster\.start_timeout_s"):
        Behind(watch, 1, start_s=2.0)
    assert scaled(4) <= time.monotonic() - began < scaled(30)


def test_a_turn_that_takes_its_time_is_waited_for(watch: Watch) -> None:
    """The time of who starts in place of the last one begins when nobody loads ahead of it."""
    group = Queued(watch, 1, start_s=6.0)
    try:
        group.ahead_s = scaled(9.0)
        os.kill(group.pid(0), signal.SIGKILL)
        group.until(lambda: group.lost == 1, 5)
        assert group.double([3]) == [6] and group.lost == 1
    finally:
        group.stop()


def test_engines_and_ranks_are_waited_for_together(watch: Watch) -> None:
    """On a restart of the learner an engine is behind a rank that waits for its peer, and that one has failed: told at
    once, and not after the hours in which NCCL gives up."""
    actors = [ray.remote(num_cpus=0, concurrency_groups={HEALTH: 1})(Doubler).remote() for _ in range(3)]
    ranks = [Watched(f"learner rank {k}", actor, SILENT_S) for k, actor in enumerate(actors[:2])]
    refs = [actors[0].start.remote("hangs"), actors[1].start.remote("input")]

    def behind(k: int) -> tuple[Any, ...]:
        return actors[2], actors[2].start_behind.remote([refs[0]], None), refs[0]

    group = Replicas("doubler", 1, behind, watch=watch, limits=Limits(scaled(300), 60, SILENT_S))
    cluster: Any = Cluster.__new__(Cluster)
    cluster._replicas, cluster._ranks = [group], ranks
    cluster._starting = Starting(refs, [[], []], ranks, scaled(300))
    began = time.monotonic()
    try:
        with pytest.raises(InputError, match="no such model"):
            cluster.wait()
        assert time.monotonic() - began < scaled(30)
    finally:
        group.stop()
        for actor in actors:
            ray.kill(actor)


def test_a_rank_that_hangs_is_lost_after_its_time() -> None:
    actor = ray.remote(num_cpus=0, concurrency_groups={HEALTH: 1})(Doubler).remote()
    rank = Watched("learner rank 0", actor, SILENT_S)
    ahead = ended_after.remote(scaled(2))
    starting = Starting([actor.start_behind.remote([ahead], "hangs")], [[ahead]], [rank], scaled(1.5))
    began = time.monotonic()
    with pytest.raises(LearnerLostError, match="1 of 1 learner ranks did not start within"):
        starting.wait()
    assert time.monotonic() - began > scaled(2.5)  # its own time began after the other's
    ray.kill(actor)


def test_waiting_ends_when_told_so(watch: Watch, two: Doublers) -> None:
    began = time.monotonic()
    two.leave = lambda: time.monotonic() - began > 1.0
    with pytest.raises(Preempted):
        two.double([20_000])
    assert time.monotonic() - began < scaled(5)


def test_a_wrong_input_shows_as_it_was_raised(watch: Watch) -> None:
    class Wrong(Doublers):
        def launch(self, k: int) -> tuple[Any, Any]:
            actor = ray.remote(num_cpus=0, concurrency_groups={HEALTH: 1})(Doubler).remote()
            return actor, actor.start.remote("input")

    with pytest.raises(InputError, match="no such model"):
        Wrong(watch, 1)


def test_newcomers_serve_only_once_they_are_admitted(watch: Watch) -> None:
    group = Doublers(watch, 2, takes_weights=True)
    admitted: list[int] = []

    def admit(newcomers: list[Any], busy: bool) -> None:
        for replica in newcomers:
            admitted.append(id(replica))
            replica.serving = True

    try:
        group.admit = admit
        assert group.double([1, 2]) == [2, 4]
        assert len(admitted) == 2
        os.kill(group.pid(1), signal.SIGKILL)
        group.until(lambda: group.lost == 1 and len(group.usable()) == 2, 30)
        assert len(group.serving()) == 1
        assert group.double([1, 2]) == [2, 4]
        assert len(set(admitted)) == 3
    finally:
        group.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_who_works_together_is_not_waited_for_when_one_is_lost(two: Doublers, watch: Watch, number: int) -> None:
    ranks = [r.watched for r in two._replicas]
    refs = [rank.actor.double.remote([60_000]) for rank in ranks]
    began = time.monotonic()
    os.kill(two.pid(1), number)
    with pytest.raises(LearnerLostError, match="ranks"):
        gather(refs, who="learner ranks (update)", timeout_s=60, ranks=ranks)
    assert time.monotonic() - began < SILENT_S + scaled(5)


def test_a_wait_has_a_deadline_and_says_for_whom(two: Doublers) -> None:
    ref = two.actors[0].double.remote([60_000])
    with pytest.raises(RunError, match=r"1 of 1 calls to the judge did not answer within 0.5 s"):
        gather([ref], who="the judge", timeout_s=0.5)


def test_only_rays_workers_are_killed() -> None:
    end_process(os.getpid())  # this one is none of them: it lives on
    assert Watched("x", None, 1.0).lost is None
