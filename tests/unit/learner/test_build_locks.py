"""A killed build of an extension leaves torch's lock: a later start removes it or says so, and never waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils.file_baton import FileBaton

from rlaif_ray.errors import InputError, RunError
from rlaif_ray.learner import build_locks
from rlaif_ray.learner.build_locks import free_build_locks, watch_waits
from tests.pace import scaled

# Any extension of DeepSpeed's on every accelerator; torch's own class takes the lock.
BUILDER = """
import os, sys, time
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("file_baton", sys.argv[2])  # all of torch would take seconds
module = module_from_spec(spec)
spec.loader.exec_module(module)
baton = module.FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
sys.stdin.readline()
baton.release()
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "fused_adam"
    folder.mkdir()
    return folder / "lock"


@contextmanager
def builder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    import torch.utils.file_baton as module

    command = [sys.executable, "-c", BUILDER, str(lock), str(module.__file__)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "building\n"
        try:
            yield process
        finally:
            process.kill()


def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_locks, "_file_system", lambda path: "nfs4")


def test_a_killed_builders_lock_is_removed(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    with builder(lock) as process:
        free_build_locks()
        assert lock.exists()  # it builds
        process.kill()
    assert lock.exists()
    free_build_locks()
    assert FileBaton(str(lock)).try_acquire()
    assert f"Removed {lock}: a killed build of DeepSpeed's extension fused_adam left it." in caplog.text


def test_compilers_that_outlive_their_builder_are_waited_for(lock: Path) -> None:
    """ninja and what it started go on in the folder."""
    lock.touch()
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as compiler:
        free_build_locks()
        assert lock.exists()
        compiler.kill()
    free_build_locks()
    assert not lock.exists()


def test_locks_of_others_are_let_alone(tmp_path: Path, lock: Path) -> None:
    other = tmp_path / "somebodys_extension" / "lock"
    deeper = tmp_path / "py311_cu130" / "cpu_adam" / "lock"  # as torch has it where no folder is set
    for path in (other, deeper):
        path.parent.mkdir(parents=True)
        path.touch()
    free_build_locks()
    assert other.exists() and not deeper.exists()


def test_on_a_shared_file_system_the_start_ends_with_one_message(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared(monkeypatch)
    lock.touch()
    free_build_locks()  # somebody elsewhere may have begun a moment ago
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 7 * 60,) * 2)
    with pytest.raises(InputError, match=rf"{lock} says .* changed for 7 minutes\. .*TORCH_EXTENSIONS_DIR"):
        free_build_locks()
    assert lock.exists()
    (lock.parent / "one.o").touch()  # a compiler's, on another machine
    free_build_locks()


def test_another_users_lock_is_let_alone_while_its_builder_cannot_be_seen(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another user's process has open the system doesn't show."""

    def denied(self: psutil.Process) -> str:
        raise psutil.AccessDenied(self.pid)

    with builder(lock) as process:
        monkeypatch.setattr(psutil.Process, "cwd", denied)
        monkeypatch.setattr(os, "getuid", lambda: lock.stat().st_uid + 1)
        free_build_locks()
        assert lock.exists()  # it builds
        for path in (lock, lock.parent):
            os.utime(path, (time.time() - 7 * 60,) * 2)
        with pytest.raises(
            InputError, match=r"that can be seen does, .* changed for 7 minutes\..* or user builds there"
        ):
            free_build_locks()
        assert lock.exists()
        process.kill()
    monkeypatch.setattr(os, "getuid", lambda: lock.stat().st_uid)
    free_build_locks()  # one's own builder would show, whoever else can't be seen
    assert not lock.exists()


def waiting(lock: Path) -> tuple[threading.Thread, list[BaseException]]:
    """Somebody in this process who found the lock taken."""
    errors: list[BaseException] = []
    baton = FileBaton(str(lock))
    assert not baton.try_acquire()

    def wait() -> None:
        try:
            baton.wait()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, errors


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = FileBaton.wait
    monkeypatch.setattr(FileBaton, "wait", plain)  # put back afterwards
    watch_waits()


@pytest.mark.usefixtures("watched")
def test_who_waits_for_a_builder_that_is_killed_ends_within_seconds(lock: Path) -> None:
    with builder(lock) as process:
        thread, errors = waiting(lock)
        thread.join(1.5 * build_locks.LOOK_S)
        assert thread.is_alive() and not errors  # it builds
        process.kill()
        thread.join(scaled(10))
    assert not thread.is_alive() and not lock.exists()
    assert [type(error) for error in errors] == [RunError]
    assert f"extension fused_adam was killed while this process waited for it in {lock.parent}" in str(errors[0])


@pytest.mark.usefixtures("watched")
def test_an_extension_of_somebody_else_is_not_called_deepspeeds(tmp_path: Path) -> None:
    lock = tmp_path / "somebodys_extension" / "lock"
    lock.parent.mkdir()
    lock.touch()  # of a build that was killed
    thread, errors = waiting(lock)
    thread.join(scaled(10))
    assert "The build of PyTorch extension somebodys_extension was killed" in str(errors[0])


@pytest.mark.usefixtures("watched")
def test_who_waits_for_a_builder_goes_on_when_it_is_done(lock: Path) -> None:
    with builder(lock) as process:
        thread, errors = waiting(lock)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        thread.join(scaled(10))
    assert not thread.is_alive() and not errors and not lock.exists()
