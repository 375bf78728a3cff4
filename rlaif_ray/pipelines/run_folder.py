"""A run's own folder, and how a run is asked to stop."""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from rlaif_ray.config.resolved import git_revision, resolved_yaml, versions
from rlaif_ray.data.identity import data_content
from rlaif_ray.documents import at
from rlaif_ray.errors import InputError
from rlaif_ray.output import say
from rlaif_ray.paths import expand_home
from rlaif_ray.pipelines.begun import KEPT, PRECISION
from rlaif_ray.pipelines.settings import changed_settings, history, kept_settings, noted
from rlaif_ray.tracking.files import read_json, write_json
from rlaif_ray.writing import open_lock, replace_bytes

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.pipelines.inputs import Inputs


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
        hold_folder(run_dir)
    except OSError as error:
        raise InputError(
            f"run_dir must be a folder this process can write (got {run_dir}): {error.strerror or error}. "
            f"Choose another with run_dir=PATH."
        ) from error


def hold_folder(folder: Path, named_by: str = "run_dir or output") -> None:
    """Keeps other processes out of the folder until this one ends, however it ends: the lock is the kernel's.

    This process may enter again, as jobs do that are made of others. Processes on other machines are kept out where
    the file system shares flock (NFS does, Lustre if mounted so); where it has none nobody is. A child that was forked
    without exec holds it too. Not FileLock: it may empty the file, which names the holder.
    """
    path = folder.resolve() / ".lock"
    if path in _HELD and _is_open(path, _HELD[path]):
        return
    while True:
        descriptor = open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InputError(
                f"{folder} is in use by {holder}: two runs in one folder would overwrite each other's results. Wait "
                f"until it ends, end it, or choose another {named_by}."
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
    return expand_home(loaded.config.output) if loaded.config.output else loaded.run_dir / name


def state_of(loaded: Loaded) -> Path:
    """Where a data-making job keeps what it goes on from: beside an `output` that the user named, so that the same
    command finds it again; else in the run's own folder."""
    named = getattr(loaded.config, "output", None)
    if not named:
        return loaded.run_dir
    output = expand_home(named)
    return output.with_name(f"{output.name}.state")


def open_output(loaded: Loaded, output: Path, inputs: Inputs, made: Sequence[str] = ()) -> Path:
    """Makes the folders of a data-making job; returns where it keeps what it goes on from, its state_of.

    `made` are the files there that are results too, beside `output`, as patterns.

    Raises:
        InputError: a folder can't be written, is in use, or holds results of another run; the output can't be written.
    """
    state = state_of(loaded)
    if output.is_symlink() or output.is_dir():  # told now, not once all is made
        got = f"a link to {output.resolve()}" if output.is_symlink() else "a folder"
        raise InputError(
            f"output must be a file (got {output}, {got}): records are not written through links. Name the file itself "
            f"with output=PATH."
        )
    make_folder(loaded.run_dir)
    make_folder(state)
    go_on(loaded, state, inputs, output, made=made)
    return state


def go_on(loaded: Loaded, state: Path, inputs: Inputs, output: Path | None = None, *, made: Sequence[str]) -> None:
    """Keeps in the folder `state` what its results follow from, the settings and what the inputs hold; a run that goes
    on there must have the same. Writes resolved.yaml.

    Args:
        output: where the results are, if not in that folder alone.
        made: patterns of files in that folder that are results: without any a change mixes nothing.

    Raises:
        InputError: the folder's results were made from something else.
    """
    path = state / KEPT
    inputs.note_commits()
    results = _results(state, output, made)
    kept = read_json(path) if results else {}
    changes = at(kept, "changes", expected=list) or []
    if results and not kept:
        raise InputError(
            f"{results[0]} is there, but nothing that says what it was made from ({path} is missing, or can't be "
            f"read): what is made now might be mixed with other results. Use another run_dir or output, or remove it."
        )
    before = len(changes)
    if kept:
        where = "that folder" if output is None or state in output.parents else f"that folder and {output}"
        try:
            found = changed_settings(
                kept,
                loaded.config,
                inputs.contents,
                holds=f"{state} holds results of another run",
                anew=f"another run_dir or output, or remove {where}",
            )
        except InputError:
            raise
        except ValueError as error:
            raise InputError(
                f"{state} can't be resumed ({error}): another job or another version of rlaif_ray made it. Use "
                f"that, or another run_dir or output."
            ) from error
        changes = [*changes, *noted(found, None)]
    now = kept_settings(loaded.config, inputs.contents)
    known = {PRECISION: kept[PRECISION]} if PRECISION in kept else {}
    write_json(path, {**now, **known, "changes": changes})
    write_resolved(loaded, history(changes))
    for line in history(changes[before:]):
        say(f"changed {line}")


def _results(folder: Path, output: Path | None, made: Sequence[str]) -> list[Path]:
    """What was made in the folder that a change would be mixed with."""
    inside = [path for pattern in made for path in folder.glob(pattern)]
    found = [*inside, *([output, output.with_name(f"{output.name}.partial.jsonl")] if output else [])]
    return [path for path in found if path.is_file() and path.stat().st_size]


def fingerprint(path: str) -> str:
    """Of the content of a job's data."""
    return data_content(path).digest


def write_resolved(loaded: Loaded, changes: Sequence[str] = ()) -> None:
    """resolved.yaml: every value, versions and git revision, and what was changed on the way, a line each.

    One that is there and says something else stays readable, as resolved.1.yaml, resolved.2.yaml and so on.
    """
    path = loaded.run_dir / "resolved.yaml"
    text = resolved_yaml(loaded, versions(), git_revision(Path(__file__).parent), changes)
    data = text.encode("utf-8", "backslashreplace")
    if path.is_file() and not path.is_symlink() and (before := path.read_bytes()) != data:  # any bytes by now
        aside = next(f for k in itertools.count(1) if not (f := path.with_name(f"resolved.{k}.yaml")).exists())
        replace_bytes(aside, before)
    replace_bytes(path, data)


class Stopping:
    """Whether the run was asked to stop: by the first Ctrl-C, or by SIGTERM or SIGHUP."""

    def __init__(self, grace_s: float | None) -> None:
        self._grace_s = grace_s
        self._asked = False
        self._soon = False

    def __call__(self) -> bool:
        """Asked to stop at a good moment, such as after a step."""
        return self._asked

    def soon(self) -> bool:
        """Asked by SIGTERM or SIGHUP: a step that can be given up is not waited for."""
        return self._soon

    def handle(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        if number != signal.SIGINT and not self._soon:
            self._soon = True
            if self._grace_s is not None:  # then it is over in any case, as by a second Ctrl-C
                timer = threading.Timer(self._grace_s, os.kill, (os.getpid(), signal.SIGINT))
                timer.daemon = True
                timer.start()


@contextmanager
def stop_when_asked(grace_s: float | None = None) -> Iterator[Stopping]:
    """Within it the first Ctrl-C, SIGTERM or SIGHUP (a terminal that is gone, unless nohup took it) asks to stop at a
    good moment, such as after a step; a second Ctrl-C, or the end of `grace_s` seconds after another signal, stops at
    once."""
    stopping = Stopping(grace_s)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stopping.handle) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
