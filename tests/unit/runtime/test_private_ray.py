"""The folder and the token of a local Ray, without Ray."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import AuthenticationTokenLoader

from rlaif_ray.errors import InputError, RunError
from rlaif_ray.runtime import local_ray
from rlaif_ray.runtime.local_ray import (
    HOST,
    KEPT_S,
    LONGEST_PARENT,
    OWNER,
    SETTLED_S,
    Places,
    private_places,
    private_token,
)


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(local_ray, "LONGEST_PARENT", 1000)
    return tmp_path


@contextmanager
def private_folder() -> Iterator[Path]:
    with private_places() as places:
        assert places == Places(places.folder, None, "")  # nothing was wrong with the folder that is named
        yield places.folder


def make_session(folder: Path) -> Path:
    """As Ray leaves one; returns a log of it."""
    session = folder / "ray" / "session_2026-11-30_12-00-00_000000_17"
    for name in ("logs", "sockets", "ray_spilled_objects_0a"):
        (session / name).mkdir(parents=True)
        (session / name / "file").write_text("text")
    (folder / "ray" / "session_latest").symlink_to(session)
    (folder / "ray").chmod(0o777)
    return folder / "ray" / "session_latest" / "logs" / "file"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_the_folder_is_this_users_alone_and_goes(parent: Path) -> None:
    before = os.umask(0)
    try:
        with private_folder() as folder, private_token(folder):
            found = folder.stat()
            assert stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.getuid() and folder.parent == parent
            assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
            make_session(folder)
    finally:
        os.umask(before)
    assert list(parent.iterdir()) == []


def test_a_socket_in_it_has_a_path_that_can_be_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len("/" + "x" * (LONGEST_PARENT - 1) + local_ray._SOCKET) == 107 and LONGEST_PARENT > 20
    monkeypatch.setattr(local_ray, "LONGEST_PARENT", LONGEST_PARENT)
    long = tmp_path / ("x" * 60)
    long.mkdir()
    parents = {"RAY_TMPDIR": str(long), "TMPDIR": "/var/tmp"}
    assert local_ray._parent(parents) == (
        Path("/var/tmp"),
        {long: f"RAY_TMPDIR={long}: more than {LONGEST_PARENT} bytes, too long for sockets"},
    )
    assert local_ray._parent({"RAY_TMPDIR": "/dev/shm", "TMPDIR": "/var/tmp"}) == (Path("/dev/shm"), {})
    assert local_ray._parent({"TMPDIR": ""}) == (Path("/tmp"), {})
    missing = Path("/not/there")
    told = {missing: "TMPDIR=/not/there: not there or can't be written"}
    assert local_ray._parent({"TMPDIR": str(missing)}) == (Path("/tmp"), told)


def test_no_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray, "LONGEST_PARENT", 3)
    told = r"needs a folder .*\(got TMPDIR=/var/tmp: more than 3 bytes.*; /tmp: .*Set TMPDIR"
    with pytest.raises(InputError, match=told):
        local_ray._parent({"TMPDIR": "/var/tmp"})


@pytest.mark.parametrize("error", [RunError("lost"), ZeroDivisionError(), InputError("wrong"), KeyboardInterrupt()])
def test_logs_stay_after_a_failure_and_are_named(error: BaseException, parent: Path) -> None:
    kept = not isinstance(error, InputError | KeyboardInterrupt)
    with pytest.raises(type(error)), private_folder() as folder, private_token(folder):
        log = make_session(folder)
        raise error
    assert log.exists() == folder.exists() == kept
    assert getattr(error, "__notes__", []) == ([f"Ray's logs: {log.parent}"] if kept else [])
    if kept:
        assert not {"token", "sockets", "ray_spilled_objects_0a"} & names(folder)


def test_what_a_killed_run_left_is_cleared(parent: Path) -> None:
    folder = parent / "rlaif-abcd_123"
    folder.mkdir(0o700)
    log = make_session(folder)
    (folder / "token").touch()
    code = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print(flush=True); time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, folder / OWNER], stdout=subprocess.PIPE)
    try:
        assert run.stdout is not None and run.stdout.readline()
        age(folder, SETTLED_S + 1)
        with private_folder():
            assert "token" in names(folder)  # it lives
    finally:
        run.kill()
        run.wait()
    with private_folder():
        assert log.exists() and not {"token", "sockets", "ray_spilled_objects_0a"} & names(folder)
    age(folder, KEPT_S + 1)
    with private_folder():
        assert not folder.exists()


# ---- Objects that Ray moves to disk ----------------------------------------------------------------------------------


@pytest.fixture
def long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR as clusters have it, too long for sockets, beside a short one that is used instead."""
    long = tmp_path / ("scratch-of-a-job-" * 8)
    long.mkdir()
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
        monkeypatch.setattr(local_ray, "LONGEST_PARENT", len(short))
        monkeypatch.setenv("RAY_TMPDIR", str(long))
        monkeypatch.setenv("TMPDIR", short)
        yield long


def test_objects_that_ray_moves_to_disk_go_where_the_user_has_room(long: Path) -> None:
    with private_places() as places:
        assert places.spilled is not None and places.spilled.parent == long
        assert places.folder.parent == Path(os.environ["TMPDIR"])
        assert stat.S_IMODE(places.spilled.stat().st_mode) == stat.S_IMODE(places.folder.stat().st_mode) == 0o700
        assert places.note == (
            f"sockets and logs are below {places.folder.parent} (RAY_TMPDIR={long}: more than "
            f"{local_ray.LONGEST_PARENT} bytes, too long for sockets); objects that Ray moves to disk go to "
            f"{places.spilled}"
        )
        (places.spilled / "ray_spilled_objects_0a").mkdir()
    assert list(long.iterdir()) == [] == list(places.folder.parent.iterdir())


def test_of_a_run_that_failed_logs_stay_and_objects_go(long: Path) -> None:
    with pytest.raises(RunError) as caught, private_places() as places:
        log = make_session(places.folder)
        assert places.spilled is not None
        (places.spilled / "ray_spilled_objects_0a").mkdir()
        raise RunError("lost")
    assert log.exists() and list(long.iterdir()) == []
    assert caught.value.__notes__ == [f"Ray's logs: {log.parent}"]


@pytest.mark.parametrize("host", [None, "another"])
def test_objects_that_a_killed_run_left_are_removed_on_its_own_machine(long: Path, host: str | None) -> None:
    """A lock that another machine holds may not show here."""
    left = long / "rlaif-abcd_123"
    (left / "ray_spilled_objects_0a").mkdir(parents=True)
    left.chmod(0o700)
    (left / OWNER).touch()
    (left / HOST).write_text(host or platform.node())
    age(left, SETTLED_S + 1)
    with private_places():
        assert left.exists() == (host is not None)


@pytest.mark.parametrize("name", local_ray.SPILLING)
def test_the_users_own_choice_for_them_counts(long: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/somewhere")
    with private_places() as places:
        assert places.spilled is None and "objects" not in places.note and str(long) in places.note


def test_a_folder_without_locks_is_left_out(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre is mounted without flock."""
    acquire = local_ray.FileLock.acquire

    def acquire_if_possible(self: Any) -> Any:
        if str(long) in self.lock_file:
            raise NotImplementedError("FileSystem does not appear to support flock")
        return acquire(self)

    monkeypatch.setattr(local_ray.FileLock, "acquire", acquire_if_possible)
    with private_places() as places:
        assert places.spilled is None and list(long.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


@pytest.mark.parametrize("kind", ["without an owner", "young", "open to others", "a link", "another name", "a file"])
def test_what_is_not_ours_stays(kind: str, parent: Path) -> None:
    folder = parent / ("rlaif-abcd_123" if kind != "another name" else "rlaif-abcd_1234")
    target = parent / "target" if kind == "a link" else folder
    if kind == "a file":
        folder.write_text("text")
    else:
        target.mkdir(0o700)
        if kind == "a link":
            folder.symlink_to(target)
        make_session(target)
        if kind != "without an owner":
            (target / OWNER).touch()
        if kind == "open to others":
            target.chmod(0o750)
    if kind != "young":
        age(folder, KEPT_S + 1)
    before = names(parent)
    with private_folder() as mine:
        assert names(parent) - {mine.name, OWNER, HOST} == before - {OWNER}
    assert names(parent) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_stays(parent: Path) -> None:
    folder = parent / "rlaif-abcd_123"
    folder.mkdir(0o700)
    (folder / OWNER).touch()
    os.chown(folder, 12345, 12345)
    age(folder, KEPT_S + 1)
    with private_folder():
        pass
    assert (folder / OWNER).exists()


@pytest.mark.parametrize("home", ["/proc/nonexistent", None])
@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "the user's"}])
def test_its_token_is_its_own(
    home: str | None, given: dict[str, str], parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray reads it from the file, whatever the user has set, and what the user has set comes back."""
    for name in local_ray.AUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    tokens = set()
    for _ in range(2):
        with private_folder() as folder, private_token(folder):
            token = (folder / "token").read_text()
            sent = AuthenticationTokenLoader.instance().get_token_for_http_header()
            assert sent == {"authorization": f"Bearer {token}"} and len(token) == 64
            assert token not in str(dict(os.environ))
            tokens.add(token)
    assert len(tokens) == 2 and dict(os.environ) == before
