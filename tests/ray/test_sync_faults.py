"""What a push does when somebody in it is lost, fails or never comes: the real driver, learner actors and engine actors
on a local Ray, with a double of vLLM's engine and of its NCCL communicator.

The double of NCCL keeps its worst habit: a member that is gone is waited for, by all others and for ever. Where a test
says so it has the other one: rank 0's next broadcast raises, before anybody was told. The learner's ranks gather by a
real collective, so that a rank that gathers no more holds up its peer.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import ray
import torch

from rlaif_ray.config.sections import WeightSyncConfig
from rlaif_ray.errors import LearnerLostError, RunError
from rlaif_ray.learner.model_state import ModelState
from rlaif_ray.rollout.checksum import MODULUS, checksum
from rlaif_ray.rollout.vllm_engine import VllmEngine
from rlaif_ray.runtime import weight_sync
from rlaif_ray.runtime.actors import EngineActor, LearnerActor
from rlaif_ray.runtime.groups import EngineGroup, LearnerGroup
from rlaif_ray.runtime.replicas import Replicas
from rlaif_ray.runtime.supervision import HEALTH, Limits, Watch, Watched
from rlaif_ray.runtime.weight_sync import Sync
from tests.pace import scaled

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker can't import a test module

LAYERS = 5
EVERY_LAYER: Any = WeightSyncConfig.model_construct(backend="auto", bucket_mb=0)
AT_ONCE = WeightSyncConfig(bucket_mb=64)
ENVIRONMENT = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}}
STUCK_S = 600


# --- doubles, which run inside of actors ------------------------------------------------------------------------------


class Group:
    """Of vLLM's PyNcclCommunicator: members meet at rank 0, and a broadcast ends when all have taken it, or never."""

    available, disabled = True, False
    kept: ClassVar[
        list[Any]
    ] = []  # stores of groups that were left: a process that leaves NCCL does not wake its peers

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        from torch.distributed import TCPStore

        self.rank, self.world_size, self.sent, self.destroyed = rank, world_size, 0, False
        self.store = TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
        self.kept.append(self.store)
        self.notices = False
        self.store.set(f"member {rank}", str(os.getpid()))
        self.store.add("members", 1)
        self._wait("members")

    def _wait(self, key: str) -> None:
        while self.store.add(key, 0) < self.world_size:
            if self.destroyed:
                raise RuntimeError("NCCL error: the communicator was aborted")
            self._notice()
            time.sleep(0.005)

    def _notice(self) -> None:
        for rank in range(self.world_size if self.notices else 0):
            status = Path(f"/proc/{int(self.store.get(f'member {rank}'))}/status")
            if not status.exists() or "State:\tZ" in status.read_text():
                raise RuntimeError("NCCL error: remote process exited or there was a network error")

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self._notice()
        self.sent += 1
        key = f"broadcast {self.sent}"
        if self.rank == src:
            self.store.set(f"{key} data", tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            data = bytearray(self.store.get(f"{key} data"))
            tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
        self.store.add(key, 1)
        self._wait(key)

    def destroy(self) -> None:
        self.destroyed = True


class Llm:
    """Of vLLM's LLM: takes updates, and does at certain places what it was told."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.faults: dict[str, str] = {}  # "die", "raise" or "block", by place
        self.group: Any = None
        self.destroyed = self.checksum = self.bucket = 0

    def meet(self, place: str) -> None:
        what = self.faults.pop(place, None)
        if what == "die":
            os._exit(1)
        if what == "block":
            time.sleep(STUCK_S)
        if what == "raise":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.meet("behind the gate")
        if self.backend == "nccl":
            info = request["init_info"]
            self.group = Group(info["master_address"], info["master_port"], info["rank_offset"], info["world_size"])

    def start_weight_update(self) -> None:
        self.meet("start")
        self.checksum = self.bucket = 0

    def update_weights(self, request: dict[str, Any]) -> None:
        info = request["update_info"]
        self.meet(f"bucket {self.bucket}")
        self.bucket += 1
        dtypes = [getattr(torch, name) for name in info["dtype_names"]]
        for k, (shape, dtype) in enumerate(zip(info["shapes"], dtypes, strict=True)):
            tensor = torch.empty(shape, dtype=dtype)
            if self.backend == "nccl":
                self.group.broadcast(tensor, src=0)
            else:
                size = os.stat(info["path"]).st_size
                segment = torch.from_file(info["path"], shared=True, size=size, dtype=torch.uint8)
                start = info["offsets"][k]
                tensor = segment[start : start + tensor.numel() * tensor.element_size()].view(dtype).view(shape)
            self.checksum += checksum([info["names"][k]], [tensor])

    def finish_weight_update(self) -> None: ...
    def reset_prefix_cache(self) -> None: ...

    def collective_rpc(self, name: str, args: Any = ()) -> list[Any]:
        if name == "leave_transfer":
            self.meet("before the gate")
            if self.group is not None:
                self.group.destroy()
                self.group, self.destroyed = None, self.destroyed + 1
        told = {"not_loaded": [], "received_checksum": self.checksum % MODULUS, "transfer_is_disabled": False}
        return [told.get(name)]


def hold_an_engine(actor: Any, backend: str) -> None:
    """Puts the real VllmEngine around the double."""
    engine: Any = object.__new__(VllmEngine)
    engine._llm, engine._asleep, engine._parts = Llm(backend), set(), {}
    engine._spec = SimpleNamespace(transfer_backend=backend, model="a double", sleep=False)
    engine._broken, engine.busy_since, engine.weight_version = None, None, -1
    actor._engine = engine


class Together(ModelState):
    """Every bucket is gathered by both ranks, as under ZeRO-3."""

    hang: str | None = None  # a file: while it is there, the third bucket is not gathered

    @contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[list[torch.Tensor]]:
        while self.hang is not None and names[0].startswith("2.") and os.path.exists(self.hang):
            time.sleep(0.02)
        torch.distributed.barrier()
        with super().gathered(names) as tensors:
            yield tensors


def hold_a_model(actor: Any, rank: int, port: int) -> None:
    from rlaif_ray.rollout import nccl

    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(LAYERS)))
    actor._learner, actor._rank = SimpleNamespace(weights=Together(model)), rank
    nccl.ENTER_S = 0.2
    nccl.communicator = lambda address, port, world_size: Group(address, port, 0, world_size)


def change(actor: Any) -> None:
    for parameter in actor._learner.weights._model.parameters():
        parameter.data.mul_(1.5)


# --- the test's side --------------------------------------------------------------------------------------------------


class Counted:
    """An actor's handle that counts the calls made by it."""

    def __init__(self, actor: Any, calls: Counter[str]) -> None:
        self.actor, self.calls = actor, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.actor, name)

        def count(remote: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.calls[name] += 1
                return remote(*args)

            return call

        counted = count(method.remote)
        return SimpleNamespace(
            remote=counted, options=lambda **options: SimpleNamespace(remote=method.options(**options).remote)
        )


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    assert not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
        ray.init(address="local", num_cpus=4, object_store_memory=100 * 2**20, **options)
        yield
        IDLE.clear()
        ray.shutdown()


def spawn(actor_class: type) -> Any:
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": ENVIRONMENT, "concurrency_groups": {HEALTH: 1}}
    return ray.remote(**options)(actor_class).remote()


@pytest.fixture(scope="module")
def ranks(local_ray: None) -> list[Any]:
    actors = [spawn(LearnerActor) for _ in range(2)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    refs = [actor.__ray_call__.remote(hold_a_model, rank, port) for rank, actor in enumerate(actors)]
    ray.get(refs, timeout=scaled(240))
    return actors


IDLE: list[Any] = []  # engine actors that no test uses now


class World:
    """Two learner ranks, some engines, and the way between."""

    def __init__(
        self, ranks: list[Any], backend: Any, engines: int, cfg: WeightSyncConfig, *, count: bool, silent_s: float
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.watch, self.backend, self.count, self.notes = Watch(), backend, count, [""]
        self.replicas = Replicas(
            "rollout engine",
            engines,
            self._launch,
            watch=self.watch,
            limits=Limits(scaled(240), scaled(120), silent_s),
            takes_weights=True,
            note=self.notes.append,
        )
        self.group = EngineGroup(self.replicas)
        self.replicas.wait_started()
        self._ranks = ranks
        watched = [Watched(f"learner rank {k}", self._counted(rank), 600) for k, rank in enumerate(ranks)]
        self.learner = LearnerGroup(watched, SimpleNamespace(**{"cluster.call_timeout_s": 60}), "fp32")  # type: ignore[arg-type]
        self.cfg = cfg

    def connect(self, timeout_s: float | None = None) -> None:
        timeout_s = timeout_s or scaled(60)
        self.sync = Sync(self.learner, self.group, self.cfg, self.backend, engine_workers=1, timeout_s=timeout_s)

    def _counted(self, actor: Any) -> Any:
        return Counted(actor, self.calls) if self.count else actor

    def _launch(self, k: int) -> tuple[Any, Any]:
        actor = IDLE.pop() if IDLE else spawn(EngineActor)
        return self._counted(actor), actor.__ray_call__.remote(hold_an_engine, self.backend)

    def tell(self, k: int, place: str, what: str) -> None:
        def told(actor: Any) -> None:
            actor._engine._llm.faults[place] = what

        ray.get(self.replicas.usable()[k].actor.__ray_call__.remote(told), timeout=scaled(60))

    def push(self, version: int) -> set[str]:
        """Names of the engines that serve after it, all with the learner's weights."""
        ray.get([rank.__ray_call__.remote(change) for rank in self._ranks], timeout=scaled(60))
        report = self.sync.push(version)

        def held(actor: Any) -> tuple[int, int]:
            return actor._engine.weight_version, actor._engine._llm.checksum % MODULUS

        serving = self.replicas.serving()
        found = ray.get([replica.actor.__ray_call__.remote(held) for replica in serving], timeout=scaled(60))
        assert set(found) <= {(version, int(report.checksum, 16))}
        print(f"push {version}: {self.notes}")  # shown of a test that fails
        return {replica.watched.name for replica in serving}

    def llms(self, read: Callable[[Any], Any]) -> list[Any]:
        calls = [r.actor.__ray_call__.remote(lambda a: read(a._engine._llm)) for r in self.replicas.usable()]
        return list(ray.get(calls, timeout=scaled(60)))

    def end(self) -> None:
        """Engines that live serve the next test: starting them is what takes time here."""
        if hasattr(self, "sync"):
            self.sync.close()
        self.watch.stop()
        IDLE.extend(replica.actor.actor if self.count else replica.actor for replica in self.replicas.usable())


@pytest.fixture
def world(ranks: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    monkeypatch.setattr(weight_sync, "GIVE_UP_S", scaled(5.0))
    monkeypatch.setattr(LearnerGroup, "__init__", light_group)
    worlds = []

    def make(
        backend: str,
        engines: int,
        cfg: WeightSyncConfig = EVERY_LAYER,
        *,
        count: bool = False,
        silent_s: float | None = None,
    ) -> World:
        worlds.append(World(ranks, backend, engines, cfg, count=count, silent_s=silent_s or scaled(60)))
        return worlds[-1]

    yield make
    for one in worlds:
        one.end()


def light_group(self: Any, watched: list[Watched], job: Any, precision: str) -> None:
    """A LearnerGroup of which only the ranks count."""
    self.ranks, self.actors = watched, [rank.actor for rank in watched]


def must_say_why_both_are_lost(notes: list[str], what: str) -> None:
    """When one blocks, both stand still: the one that waits for it may be noticed as early."""
    told = " ".join(notes)
    reasons = ["was in an NCCL group that broke when rollout engine 0 was lost"]
    if what == "block":
        assert "rollout engine 0 made no progress for" in told
        reasons.append("made no progress for")
    assert any(f"rollout engine 1 {reason}" in told for reason in reasons), told


NAMES = {f"rollout engine {k}" for k in range(3)}


@pytest.mark.parametrize("backend", ["shm", "nccl"])
def test_calls_of_a_push_follow_the_actors_and_not_the_buckets(world: Callable[..., World], backend: str) -> None:
    counted = []
    for cfg, buckets in ((EVERY_LAYER, LAYERS), (AT_ONCE, 1)):
        one = world(backend, 2, cfg, count=True)
        one.connect()
        assert len(one.sync._buckets) == buckets
        one.calls.clear()
        for version in range(1, 4):
            one.sync.push(version)
        assert len(one.replicas.serving()) == 2
        counted.append(dict(one.calls))
        one.sync.close()
    engines = {"start_update": 6, "update_all": 6, "finish_update": 6}
    assert counted == [engines | {"send_all": 6} | ({"offer": 6} if backend == "shm" else {})] * 2


@pytest.mark.parametrize("what", ["die", pytest.param("raise", marks=pytest.mark.long)])
def test_an_engine_lost_while_it_loads_leaves_the_others_their_weights(world: Callable[..., World], what: str) -> None:
    """By shared memory. Its slot is free at once for the others."""
    one = world("shm", 3)
    one.connect()
    assert one.push(1) == NAMES
    one.tell(1, "bucket 2", what)
    assert one.push(2) == NAMES - {"rollout engine 1"}
    one.replicas.wait_started()
    assert one.push(3) == NAMES


def test_an_engine_that_dies_before_the_gate_is_left_out_of_the_group(world: Callable[..., World]) -> None:
    one = world("nccl", 3)
    one.tell(2, "before the gate", "die")
    began = time.monotonic()
    one.connect()  # it meets without it
    assert time.monotonic() - began < scaled(30)  # where vLLM's own rendezvous waits 300 s
    survivors = NAMES - {"rollout engine 2"}
    assert {engine.watched.name for engine in one.sync._connected} == survivors
    assert one.push(1) == survivors and one.replicas.lost <= 1
    one.replicas.wait_started()
    assert one.push(2) == NAMES  # the group is made anew for it
    assert one.llms(lambda llm: llm.destroyed) == [1, 1, 0]  # communicators of the group before


def test_an_engine_lost_at_the_start_of_a_push_is_left_out_of_its_broadcast(world: Callable[..., World]) -> None:
    one = world("nccl", 3)
    one.connect()
    assert one.push(1) == NAMES
    one.tell(0, "start", "die")
    assert one.push(2) == NAMES - {"rollout engine 0"}


@pytest.mark.parametrize("what", ["raise", *(pytest.param(w, marks=pytest.mark.long) for w in ("die", "block"))])
def test_an_engine_lost_inside_the_broadcast_is_no_end_of_the_run(world: Callable[..., World], what: str) -> None:
    one = world("nccl", 2, silent_s=scaled(8))
    one.connect()
    assert one.push(1) == NAMES - {"rollout engine 2"}
    one.tell(0, "bucket 2", what)
    began = time.monotonic()
    assert one.push(2) == set()  # the other one stood in the broken collective
    assert time.monotonic() - began < scaled(30)
    one.replicas.wait_started()
    must_say_why_both_are_lost(one.notes, what)
    assert one.push(3) == NAMES - {"rollout engine 2"}  # the learner is as it was


def test_nccls_word_of_a_loss_before_the_drivers_is_no_end_of_the_run(
    ranks: list[Any], world: Callable[..., World]
) -> None:
    """Rank 0's broadcast raises at once. Its peer stands in the next gather."""
    one = world("nccl", 2)
    one.connect()
    assert one.push(1) == NAMES - {"rollout engine 2"}

    def notice(actor: Any) -> None:
        actor._sender._group.notices = True

    ray.get(ranks[0].__ray_call__.remote(notice), timeout=scaled(60))
    one.tell(0, "bucket 2", "die")
    assert one.push(2) == set()
    assert one.sync._failed_broadcasts == [
        "RuntimeError: NCCL error: remote process exited or there was a network error"
    ]
    one.replicas.wait_started()
    assert one.push(3) == NAMES - {"rollout engine 2"} and one.sync._failed_broadcasts == []


@pytest.mark.long
@pytest.mark.parametrize("what", ["die", "block"])
def test_an_engine_lost_behind_the_gate_takes_the_others_along(
    world: Callable[..., World], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for it in NCCL's rendezvous. Replacements meet at the next push."""
    monkeypatch.setattr(weight_sync, "GIVE_UP_S", 2.0)  # over before a replacement is there, and takes the first push
    one = world("nccl", 2, silent_s=scaled(8))
    one.tell(0, "behind the gate", what)
    one.connect()
    assert one.push(1) == set()
    one.replicas.wait_started()
    must_say_why_both_are_lost(one.notes, what)
    assert one.push(2) == NAMES - {"rollout engine 2"} and one.sync._failed_meetings == []


def test_a_rank_that_hangs_is_not_taken_for_engines_that_do(
    ranks: list[Any], world: Callable[..., World], tmp_path: Path
) -> None:
    """The learner starts again from its checkpoint when its time is over, and not after as much time once more."""
    (tmp_path / "hang").touch()

    def hang(actor: Any, file: str | None) -> None:
        actor._learner.weights.hang = file

    one = world("nccl", 1)
    one.connect(timeout_s=4)
    ray.get(ranks[1].__ray_call__.remote(hang, str(tmp_path / "hang")), timeout=scaled(60))
    began = time.monotonic()
    with pytest.raises(LearnerLostError, match="no rank answered within 4 s"):
        one.sync.push(1)
    assert time.monotonic() - began < 4 + scaled(3)
    (engine,) = one.replicas._replicas
    assert not engine.serving
    ray.get(ranks[0].break_off.options(concurrency_group=HEALTH).remote(), timeout=scaled(60))
    (tmp_path / "hang").unlink()
    ray.get(ranks[1].__ray_call__.remote(hang, None), timeout=scaled(60))


@pytest.mark.long
def test_a_group_that_never_comes_about_ends_the_run(world: Callable[..., World]) -> None:
    one = world("nccl", 1)
    one.tell(0, "behind the gate", "raise")
    one.connect()
    for version in (1, 2):
        one.replicas.wait_started()
        one.tell(0, "behind the gate", "raise")
        if version == 1:
            assert one.push(version) == set()
        else:
            with pytest.raises(RunError, match=r"could not form an NCCL group 3 times in a row: .*illegal memory"):
                one.push(version)
