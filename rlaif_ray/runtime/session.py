"""Which Ray a job runs on: the cluster that is named for it, or a local one that ends with it. No other is joined."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import grpc
import ray
from ray._common.utils import get_ray_address_file
from ray._private import worker
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined, unused-ignore]
from ray.core.generated import ray_client_pb2
from ray.exceptions import AuthenticationError

from rlaif_ray.errors import InputError, RunError
from rlaif_ray.output import say
from rlaif_ray.runtime.local_ray import Places, private_places, private_token, tokens_reloaded
from rlaif_ray.runtime.loopback import on_loopback
from rlaif_ray.runtime.placement import actor_slots, totals

if TYPE_CHECKING:
    from rlaif_ray.config.sections import ClusterConfig

CONNECT_TIMEOUT_S = 5.0
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it, and RAY_ADDRESS, in the environment of a submitted job


@dataclass(frozen=True, slots=True)
class Named:
    """A cluster that a job is told to join."""

    address: str  # host:port, or ray://host:port
    by: str  # what names it


def named_cluster(configured: str | None, environment: Mapping[str, str]) -> Named | None:
    """The cluster that `cluster.address` or else RAY_ADDRESS names; None where the job starts a Ray of its own.

    What `ray start` noted in /tmp/ray may be anybody's cluster: it is looked at only where one of the two says `auto`,
    and then it must be this user's. As in Ray, RAY_ADDRESS comes before `cluster.address=auto`.

    Raises:
        InputError: it is no address, or auto and there is no cluster of this user.
    """
    by, address = "cluster.address", configured or ""
    given = environment.get("RAY_ADDRESS", "")
    if address in ("", "auto") and given not in ("", "auto"):
        by = "RAY_ADDRESS of the submitted job" if _SUBMITTED in environment else "RAY_ADDRESS"
        address = given
    elif address == "" and given == "auto":
        by, address = "RAY_ADDRESS", "auto"
    if address in ("", "local"):
        return None
    if address == "auto":
        return _current_cluster(f"{by}=auto")
    return Named(_checked(address, by), by)


def _checked(address: str, by: str) -> str:
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{by} must be HOST:PORT of a cluster's head, as `ray start --head` prints it (got {address}): that is "
            f"its dashboard, for launch/submit.py --address. Correct it, or use cluster.address=local."
        )
    if re.fullmatch(r"(ray://)?(\[[^\]\s]+\]|[^\s:/\[\]]+):\d{1,5}", address) is None:
        raise InputError(
            f"{by} must be HOST:PORT of a cluster's head, auto or local (got {address!r}): Ray joins nothing else. "
            f"Correct it."
        )
    return address


def _current_cluster(by: str) -> Named:
    """The cluster that `ray start` noted on this machine, in a folder that all users write to."""
    path = Path(get_ray_address_file(None))
    remedy = "Start one with `ray start --head`, or name its address: cluster.address=HOST:PORT."
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(
            f"{by} joins the cluster that `ray start` left on this machine (got none: {path}: {error.strerror}). "
            f"{remedy}"
        ) from error
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        found = os.fstat(descriptor)
        # Root can read and change whatever this user has; anybody else may have left it to be joined.
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.getuid(), 0) or found.st_mode & stat.S_IWOTH:
            raise InputError(
                f"{by} joins only a cluster that user {os.getuid()} or root started (got {path} of user "
                f"{found.st_uid}, mode {found.st_mode & 0o777:o}): whoever wrote that file would run what this job "
                f"runs. {remedy}"
            )
        address = file.read(1000).strip()
    return Named(_checked(address, f"{by}: {path}"), f"{by}, from {path} of user {found.st_uid}")


@contextmanager
def open_session(cfg: ClusterConfig, jobs: Sequence[Any]) -> Iterator[None]:
    """Ray, for jobs that run one after the other in this process. One that this process has already stays as it is;
    one that is joined goes on; a local one is started with room for each of the jobs, and ends here.

    Raises:
        InputError: what names a cluster is wrong, or the cluster can't be joined.
        RunError: no local Ray could start.
    """
    if ray.is_initialized():
        yield
        return
    worker._worker_logs_enabled = False  # a thousand characters for every process that is lost: we tell it in one line
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    named = named_cluster(cfg.address, os.environ)
    if named is not None:
        _join(named)
        say(f"ray: joined the cluster at {named.address} (named by {named.by})")
        yield
        return
    device: Literal["cpu", "cuda"] = "cuda" if cfg.device == "gpu" else "cpu"
    cpus = max(totals(actor_slots(job, device))["CPU"] for job in jobs)
    with private_places() as places, private_token(places.folder):
        try:
            _start(places, num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)), memory=int(cfg.object_store_gb * 2**30))
            say(f"ray: started a local one for this run, on 127.0.0.1; its files are in {places.folder}")
            if places.note:
                say(f"ray: {places.note}")
            yield
        finally:
            ray.shutdown()


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def _start(places: Places, *, num_cpus: int, memory: int) -> None:
    spilled: dict[str, Any] = {} if places.spilled is None else {"object_spilling_directory": str(places.spilled)}
    with on_loopback(), _sigterm_kept(), _hangups_ignored():
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=memory,
                _temp_dir=str(places.folder / "ray"),  # Ray opens it to all users; the folder around it is closed
                **spilled,
                **_QUIET,
            )
        except Exception as error:
            raise RunError(f"Ray did not start on this machine: {_first_line(error)}") from error


def _join(named: Named) -> None:
    remedy = "correct the address, or use cluster.address=local"
    if not _answers(named.address):  # Ray itself would try for many minutes
        raise InputError(
            f"no Ray cluster answers at {named.address} (named by {named.by}). Start one (ray start --head), {remedy}."
        )
    _take_token_if_asked(named)
    try:
        with _sigterm_kept():
            ray.init(address=named.address, **_QUIET)
    except (ConnectionError, AuthenticationError) as error:
        raise InputError(
            f"the Ray cluster at {named.address} (named by {named.by}) can't be joined: {_first_line(error)}. Join it "
            f"from a machine on which `ray start` has run for it, {remedy}."
        ) from error


def _take_token_if_asked(named: Named) -> None:
    """`ray start` makes a cluster that asks for the token of its machine wherever one is, and Ray sends the one that is
    here only where RAY_AUTH_MODE says so. It is no general setting: a process that asks for a token turns away workers
    of a cluster that has none.

    Raises:
        InputError: the cluster asks for a token, and the one that is here, if any, is another.
    """
    tokens = AuthenticationTokenLoader.instance()
    tokens.reset_cache()
    if not _turns_away(named.address, {}):
        return
    taken = "RAY_AUTH_MODE" not in os.environ and tokens.has_token(ignore_auth_mode=True)
    if taken:
        os.environ["RAY_AUTH_MODE"] = "token"
        tokens_reloaded()
    if not _turns_away(named.address, tokens.get_token_for_http_header()):
        return
    got = "none is sent from here" if not tokens.get_token_for_http_header() else "it refuses the one that is sent"
    if taken:
        del os.environ["RAY_AUTH_MODE"]
        tokens_reloaded()
    raise InputError(
        f"the Ray cluster at {named.address} (named by {named.by}) asks for a token (got: {got}). Set "
        f"RAY_AUTH_TOKEN to it, or put it into ~/.ray/auth_token. RAY_AUTH_MODE must be token, or not set."
    )


_PING: bytes = ray_client_pb2.ClusterInfoRequest(  # type: ignore[attr-defined, unused-ignore]
    type=ray_client_pb2.ClusterInfoType.PING  # type: ignore[attr-defined, unused-ignore]
).SerializeToString()
# A method that each kind of server has, and its request: a server checks the token only for methods that it has.
_CHEAP_QUESTIONS = {
    "": ("/ray.rpc.NodeInfoGcsService/GetClusterId", b""),
    "ray": ("/ray.rpc.RayletDriver/ClusterInfo", _PING),
}


def _turns_away(address: str, headers: Mapping[str, str]) -> bool:
    """Whether the head refuses a request with these headers for want of a token. Ray's own client tells a refusal from
    silence only by half a minute of waiting."""
    scheme, _, target = address.rpartition("://")
    method, request = _CHEAP_QUESTIONS[scheme]
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(request, timeout=CONNECT_TIMEOUT_S, metadata=list(headers.items()))
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].removesuffix(".") if lines else type(error).__name__


@contextmanager
def _hangups_ignored() -> Iterator[None]:
    """For what is started within: when a terminal is gone, its whole job gets SIGHUP, and Ray's processes are needed
    for a last checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Gives SIGTERM back to whoever had asked for it: `ray.init` takes it for itself, and ends the process at once."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _answers(address: str) -> bool:
    """Whether something listens at host:port; what is no such address is left to Ray."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
