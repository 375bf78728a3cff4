"""Which Ray a job joins, and when it starts its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from rlaif_ray.config.jobs import LabelJob, TrainJob
from rlaif_ray.errors import InputError, RunError
from rlaif_ray.runtime import cluster, session
from rlaif_ray.runtime.local_ray import AUTH, tokens_reloaded
from rlaif_ray.runtime.session import Named, named_cluster
from tests.jobs import embedded

Calls = list[dict[str, Any]]
SUBMITTED = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


@pytest.fixture(autouse=True)
def a_machine_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its files; nothing surrounds this process."""
    for name in ("RAY_ADDRESS", *AUTH, "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("rlaif_ray.runtime.local_ray.LONGEST_PARENT", 1000)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's may be there
    yield tmp_path
    monkeypatch.undo()
    tokens_reloaded()


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@dataclass
class Head:
    """As a cluster's head answers, by gRPC; asks for `token` where it has one."""

    token: str | None
    address: str = ""

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if call.method != "/ray.rpc.NodeInfoGcsService/GetClusterId":
            return None
        sent = dict(call.invocation_metadata).get("authorization")

        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            if self.token is not None and sent != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def head() -> Iterator[Head]:
    with ThreadPoolExecutor(1) as pool:
        server, made = grpc.server(pool), Head("f" * 64)
        server.add_generic_rpc_handlers([made])  # type: ignore[list-item]
        made.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield made
        server.stop(None).wait()


@pytest.fixture
def dead() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What Ray was started with, and with which token."""
    calls: Calls = []
    settings = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    monkeypatch.setattr(
        "ray.init", lambda **given: calls.append(given | {name: os.environ.get(name) for name in settings})
    )
    monkeypatch.setattr("ray.shutdown", lambda: calls.append({"shutdown": True}))
    return calls


def note_current(folder: Path, address: str) -> Path:
    """As `ray start` does it."""
    (folder / "ray").mkdir()
    path = folder / "ray" / "ray_current_cluster"
    path.write_text(address)
    return path


def job_on(**cluster: Any) -> TrainJob:
    return embedded(TrainJob, {"cluster": cluster})


def connect(address: str | None) -> None:
    job = job_on(address=address, device="cpu")
    with session.open_session(job.cluster, [job]):
        pass


# ---- What is named ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "environment", "named"),
    [
        (None, {}, None),
        ("", {"RAY_ADDRESS": ""}, None),
        ("local", {}, None),
        ("local", {"RAY_ADDRESS": "10.0.0.1:6379"}, None),
        (None, {"RAY_ADDRESS": "local"}, None),
        ("auto", {"RAY_ADDRESS": "local"}, None),
        ("10.0.0.2:6379", {}, Named("10.0.0.2:6379", "cluster.address")),
        ("10.0.0.2:6379", {"RAY_ADDRESS": "10.0.0.1:6379"}, Named("10.0.0.2:6379", "cluster.address")),
        ("[::1]:6379", {}, Named("[::1]:6379", "cluster.address")),
        ("ray://head:10001", {}, Named("ray://head:10001", "cluster.address")),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, Named("10.0.0.1:6379", "RAY_ADDRESS")),
        ("auto", {"RAY_ADDRESS": "10.0.0.1:6379"}, Named("10.0.0.1:6379", "RAY_ADDRESS")),
        (None, SUBMITTED, Named("10.0.0.1:6379", "RAY_ADDRESS of the submitted job")),
        ("auto", SUBMITTED, Named("10.0.0.1:6379", "RAY_ADDRESS of the submitted job")),
        ("local", SUBMITTED, None),
    ],
)
def test_what_names_a_cluster(configured: str | None, environment: dict[str, str], named: Named | None) -> None:
    assert named_cluster(configured, environment) == named


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": "local"}, {"RAY_JOB_ID": "01000000"}])
def test_what_ray_start_left_names_none(environment: dict[str, str], tmp_path: Path, listening: str) -> None:
    note_current(tmp_path, listening)
    assert named_cluster(None, environment) is None


@pytest.mark.parametrize(("configured", "environment"), [("auto", {}), (None, {"RAY_ADDRESS": "auto"})])
def test_auto_is_what_this_user_started(configured: str | None, environment: dict[str, str], tmp_path: Path) -> None:
    path = note_current(tmp_path, "127.0.0.1:6379\n")
    found = named_cluster(configured, environment)
    key = "cluster.address" if configured else "RAY_ADDRESS"
    assert found == Named("127.0.0.1:6379", f"{key}=auto, from {path} of user {os.getuid()}")


def test_auto_where_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cluster.address=auto joins .* \(got none: .*No such file.*ray start --head"):
        named_cluster("auto", {})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_auto_refuses_a_strangers_cluster(tmp_path: Path) -> None:
    os.chown(note_current(tmp_path, "127.0.0.1:6379"), 12345, 12345)
    with pytest.raises(InputError, match=r"got .*ray_current_cluster of user 12345, .*cluster.address=HOST:PORT"):
        named_cluster("auto", {})


@pytest.mark.parametrize("how", ["writable by all", "link", "pipe"])
def test_auto_refuses_a_file_that_others_may_have_made(how: str, tmp_path: Path) -> None:
    path = note_current(tmp_path, "127.0.0.1:6379")
    if how == "writable by all":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere") if how == "link" else os.mkfifo(path)
    with pytest.raises(InputError, match=r"cluster.address=auto joins"):
        named_cluster("auto", {})


WRONG = ["http://127.0.0.1:8265", "https://head", "head", "head:", ":6379", "head:port", "a b:1", "head:6379/x", "Auto"]


@pytest.mark.parametrize("address", WRONG)
@pytest.mark.parametrize("way", ["cluster.address", "RAY_ADDRESS", "ray_current_cluster"])
def test_what_is_no_address(address: str, way: str, tmp_path: Path) -> None:
    if way == "ray_current_cluster":
        note_current(tmp_path, address)
    configured = {"cluster.address": address, "ray_current_cluster": "auto"}.get(way)
    with pytest.raises(InputError, match=rf"{way} must be HOST:PORT") as caught:
        named_cluster(configured, {"RAY_ADDRESS": address} if way == "RAY_ADDRESS" else {})
    assert address in str(caught.value) and ("launch/submit.py" in str(caught.value)) == address.startswith("http")


# ---- What is joined or started ---------------------------------------------------------------------------------------


def test_its_own_when_none_is_named(
    inits: Calls, tmp_path: Path, listening: str, capsys: pytest.CaptureFixture[str]
) -> None:
    note_current(tmp_path, listening)
    connect(None)
    started, ended = inits
    folder = Path(started["_temp_dir"]).parent
    assert started["address"] == "local" and ended == {"shutdown": True}
    assert started["RAY_AUTH_MODE"] == "token" and started["RAY_AUTH_TOKEN_PATH"] == str(folder / "token")
    assert capsys.readouterr().out == (
        f"ray: started a local one for this run, on 127.0.0.1; its files are in {folder}\n"
    )
    assert folder.parent == tmp_path and not folder.exists() and "RAY_AUTH_MODE" not in os.environ


def test_what_ray_moves_to_disk_goes_below_a_tmpdir_that_is_too_long(
    inits: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
        monkeypatch.setattr("rlaif_ray.runtime.local_ray.LONGEST_PARENT", len(short))
        monkeypatch.setenv("TMPDIR", short)
        connect(None)
        started = inits[0]
        assert started["_temp_dir"].startswith(f"{short}/rlaif-")
        assert started["object_spilling_directory"].startswith(f"{tmp_path}/rlaif-")
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("ray: started a local one")
        assert second.startswith(f"ray: sockets and logs are below {short} (RAY_TMPDIR={tmp_path}: more than")


@pytest.mark.parametrize("way", ["cluster.address", "RAY_ADDRESS"])
def test_the_named_one_is_joined_and_goes_on(
    inits: Calls, head: Head, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head.token, address = None, head.address
    if way == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    connect(address if way == "cluster.address" else None)
    (joined,) = inits
    assert joined["address"] == address and not {"num_cpus", "_temp_dir"} & set(joined)
    assert joined["RAY_AUTH_MODE"] is None
    assert capsys.readouterr().out == f"ray: joined the cluster at {address} (named by {way})\n"


def test_its_own_if_told_so_whatever_surrounds_it(
    inits: Calls, listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", listening)
    connect("local")
    assert inits[0]["address"] == "local"


def test_one_that_this_process_has_is_used(inits: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    connect("local")
    assert inits == []


@pytest.mark.parametrize("way", ["cluster.address", "RAY_ADDRESS", "ray_current_cluster"])
def test_a_named_one_that_does_not_answer(
    inits: Calls, dead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", dead)
    if way == "ray_current_cluster":
        note_current(tmp_path, dead)
    told = rf"no Ray cluster answers at {dead} \(named by .*{way}.*cluster.address=local"
    with pytest.raises(InputError, match=told):
        connect({"cluster.address": dead, "ray_current_cluster": "auto"}.get(way))
    assert inits == []


def test_one_that_refuses(inits: Calls, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    head.token = None

    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect.\nand more")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(InputError, match=r"can't be joined: Failed to connect\. Join it from a machine on which"):
        connect(head.address)


@pytest.mark.parametrize(
    ("asked", "here", "mode", "used"),
    [
        (None, None, None, None),
        (None, "f" * 64, None, None),  # its workers would not reach a process that asks for one
        ("f" * 64, "f" * 64, None, "token"),
        ("f" * 64, "f" * 64, "token", "token"),
    ],
)
def test_a_token_is_sent_where_it_is_asked_for(
    head: Head,
    inits: Calls,
    asked: str | None,
    here: str | None,
    mode: str | None,
    used: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head.token = asked
    keep_token(here, mode, tmp_path, monkeypatch)
    connect(head.address)
    assert [call["RAY_AUTH_MODE"] for call in inits] == [used]


@pytest.mark.parametrize(
    ("here", "mode", "got"),
    [
        (None, None, "none is sent from here"),
        ("f" * 64, "disabled", "none is sent from here"),
        ("0" * 64, None, "it refuses the one that is sent"),
        ("0" * 64, "token", "it refuses the one that is sent"),
    ],
)
def test_one_that_asks_for_another_token(
    head: Head,
    inits: Calls,
    here: str | None,
    mode: str | None,
    got: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_token(here, mode, tmp_path, monkeypatch)
    with pytest.raises(
        InputError, match=rf"named by cluster.address\) asks for a token \(got: {got}\).*RAY_AUTH_TOKEN"
    ):
        connect(head.address)
    assert inits == [] and os.environ.get("RAY_AUTH_MODE") == mode


# Ray's own server for ray:// addresses, with what it checks tokens by, and no cluster behind it.
CLIENT_SERVER = """
import sys, time
from ray.util.client.server import proxier
server = proxier.serve_proxier("127.0.0.1", int(sys.argv[1]), None)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def client_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; it asks for the token of 64 f."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path_factory.mktemp("server") / "token"
    path.write_text("f" * 64)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    command = [sys.executable, "-c", CLIENT_SERVER, str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        yield f"ray://127.0.0.1:{port}"
        server.kill()


@pytest.mark.parametrize("mode", [None, "token"])
def test_a_token_is_sent_to_rays_own_client_server(
    client_server: str, inits: Calls, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_token("f" * 64, mode, tmp_path, monkeypatch)
    connect(client_server)
    assert [call["RAY_AUTH_MODE"] for call in inits] == ["token"]


@pytest.mark.parametrize(("here", "got"), [(None, "none is sent"), ("0" * 64, "it refuses the one that is sent")])
def test_rays_own_client_server_asks_for_another_token(
    client_server: str, inits: Calls, here: str | None, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's client tries for half a minute, and says no word of a token."""
    keep_token(here, None, tmp_path, monkeypatch)
    with pytest.raises(InputError, match=rf"cluster at {client_server} .*asks for a token \(got: {got}"):
        connect(client_server)
    assert inits == []


def keep_token(token: str | None, mode: str | None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a home folder, as Ray does; with RAY_AUTH_MODE."""
    monkeypatch.setenv("HOME", str(home))
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if token is not None:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(token)
    tokens_reloaded()


def test_a_local_one_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(**given: Any) -> None:
        (Path(given["_temp_dir"]) / "session_1" / "logs").mkdir(parents=True)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(RunError, match="Ray did not start on this machine: The current node timed out") as caught:
        connect(None)
    (folder,) = tmp_path.iterdir()
    assert caught.value.__notes__ == [f"Ray's logs: {folder}/ray/session_latest/logs"]
    assert (folder / "ray" / "session_1" / "logs").is_dir()


def test_one_ray_for_several_jobs_has_room_for_the_largest(inits: Calls) -> None:
    jobs = [job_on(cpus_per_actor=n, device="cpu") for n in (1, 50, 2)]
    with cluster.open_ray(jobs[0].cluster, jobs):
        assert inits[0]["num_cpus"] == 150 and len(inits) == 1  # rollout, judge, learner
    assert inits[1:] == [{"shutdown": True}]


def test_no_ray_for_jobs_without_actors(inits: Calls) -> None:
    longer = LabelJob.model_validate({"data": {"path": "x"}, "judge": {"type": "longer"}})
    with cluster.open_ray(longer.cluster, [longer]):
        assert not inits
