"""A run's own folder, and how a run is asked to stop."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from rlaif_ray.config.resolved import git_revision, resolved_yaml, versions
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.chat_date import keep_chat_date, state_of
from rlaif_ray.tracking.files import plain, read_json, write_json

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded


_HELD: dict[Path, int] = {}  # descriptors of lock files, open until this process ends


def make_folder(run_dir: Path) -> None:
    """The run's own folder, tried before anything starts and this process's alone from here on; what is in it stays.

    Raises:
        InputError: it can't be written, or another process works in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=run_dir):
            pass
        _hold(run_dir)
    except OSError as error:
        raise InputError(
            f"run_dir must be a folder this process can write (got {run_dir}): {error.strerror or error}. "
            f"Choose another with run_dir=PATH."
        ) from error


def _hold(folder: Path) -> None:
    """Keeps other processes out of the folder until this one ends, however it ends: the lock is the kernel's.

    This process may enter again, as jobs do that are made of others. Processes on other machines are kept out where
    the file system shares flock (NFS does, Lustre if mounted so); where it has none nobody is. A child that was forked
    without exec holds it too. Not FileLock: it may empty the file, which names the holder.
    """
    path = folder.resolve() / ".lock"
    if path in _HELD and _is_open(path, _HELD[path]):
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InputError(
                f"{folder} is in use by {holder}: two runs in one folder would overwrite each other's results. Wait "
                f"until it ends, end it, or choose another run_dir or output."
            ) from None
        except OSError:  # no flock here
            pass
        if _is_open(path, descriptor):
            break
        os.close(descriptor)  # whoever held it has just removed it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _HELD[path] = descriptor


def _is_open(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@atexit.register
def _leave() -> None:
    for path, descriptor in _HELD.items():
        with suppress(OSError):
            if _is_open(path, descriptor):
                path.unlink()


def output_of(loaded: Loaded, name: str) -> Path:
    """The file that a data-making job writes: the user's, or `name` in the run's own folder."""
    return Path(loaded.config.output).expanduser() if loaded.config.output else loaded.run_dir / name


def open_output(loaded: Loaded, output: Path, identity: dict[str, Any]) -> Path:
    """Makes the folders of a data-making job; returns where it keeps what it goes on from: beside an `output` that the
    user named, so that the same command finds it again; else in the run's own folder.

    Raises:
        InputError: a folder can't be written, is in use, or holds results of another run.
    """
    state = state_of(loaded)
    make_folder(loaded.run_dir)
    make_folder(state)
    must_be_same_run(state, loaded.job, identity)
    keep_chat_date(loaded)
    write_resolved(loaded)
    return state


def fingerprint(path: str) -> str:
    """SHA-256 of a local file; of anything else its name is all that is known."""
    file = Path(path).expanduser()
    if not file.is_file():
        return path
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def must_be_same_run(folder: Path, job: str, identity: dict[str, Any]) -> None:
    """Notes in the folder what its results follow from; a run that goes on in it must have the same.

    Raises:
        InputError: the folder's results were made from something else.
    """
    run_dir, path = folder, folder / "identity.json"
    wanted = {"job": job, **plain(identity)}
    stored = read_json(path)
    changed = [key for key in {**stored, **wanted} if stored and stored.get(key) != wanted.get(key)]
    if changed:
        told = "; ".join(f"{key} was {stored.get(key)!r} and is {wanted.get(key)!r}" for key in changed)
        raise InputError(
            f"{run_dir} holds results of another run ({told}): they would be mixed. Use its settings, name another "
            f"run_dir or output, or remove that folder and its results to start over."
        )
    write_json(path, wanted)


def write_resolved(loaded: Loaded) -> None:
    """resolved.yaml: every value, versions and git revision."""
    text = resolved_yaml(loaded, versions(), git_revision(Path(__file__).parent))
    (loaded.run_dir / "resolved.yaml").write_text(text)


class Stopping:
    """Whether the run was asked to stop: by the first Ctrl-C, or by SIGTERM."""

    def __init__(self, grace_s: float | None) -> None:
        self._grace_s = grace_s
        self._asked = False
        self._soon = False

    def __call__(self) -> bool:
        """Asked to stop at a good moment, such as after a step."""
        return self._asked

    def soon(self) -> bool:
        """Asked by SIGTERM: a step that can be given up is not waited for."""
        return self._soon

    def handle(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        if number == signal.SIGTERM and not self._soon:
            self._soon = True
            if self._grace_s is not None:  # then it is over in any case, as by a second Ctrl-C
                timer = threading.Timer(self._grace_s, os.kill, (os.getpid(), signal.SIGINT))
                timer.daemon = True
                timer.start()


@contextmanager
def stop_when_asked(grace_s: float | None = None) -> Iterator[Stopping]:
    """Within it the first Ctrl-C or SIGTERM asks to stop at a good moment, such as after a step; a second Ctrl-C, or
    the end of `grace_s` seconds after SIGTERM, stops at once."""
    stopping = Stopping(grace_s)
    before = {number: signal.signal(number, stopping.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
