"""What keeps a local Ray this user's own: a folder that nobody else enters, and a token that lies in it."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined, unused-ignore]

from rlaif_ray.errors import InputError

NAME = re.compile(r"rlaif-[a-z0-9_]{8}")  # of a folder, as tempfile makes it
OWNER = "owner.lock"  # held while the run lives; the kernel lets go of it however the run ends
# What stands behind the parent folder in a socket's path, which has 107 bytes at most; the last number is a process id.
_SOCKET = "/rlaif-XXXXXXXX/ray/session_YYYY-MM-DD_HH-MM-SS_ffffff_4194304/sockets/plasma_store"
LONGEST_PARENT = 107 - len(_SOCKET)
HOST = "host"  # on storage that machines share, whether a lock is held shows on its own machine only
SETTLED_S = 60.0  # a folder that is younger may not have its lock yet
KEPT_S = 7 * 24 * 3600.0  # logs of runs that failed or were killed
REMOVAL_TRIES = 10  # processes that are ending still write
SPILLING = ("RAY_object_spilling_directory", "RAY_object_spilling_config")  # the user's own choice for moved objects
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, slots=True)
class Places:
    """Where one local Ray keeps its files, in folders of mode 0700."""

    folder: Path  # sockets, logs and the token; objects that Ray moves to disk too, where `spilled` is None
    spilled: Path | None
    note: str  # why the folder that the user named is not used for all of it; "" where it is


@contextmanager
def private_places() -> Iterator[Places]:
    """New folders for one local Ray: one that is short enough for Ray's sockets, and where that is not below the user's
    own TMPDIR, one there for objects that Ray moves to disk: they may be larger than what /tmp has room for.

    Raises:
        InputError: there is no place for the sockets.
    """
    parent, refused = _parent(os.environ)
    with ExitStack() as stack:
        spilled = None if any(os.environ.get(name) for name in SPILLING) else _place_for_objects(refused, stack)
        folder = stack.enter_context(_private_folder(parent))
        note = f"sockets and logs are below {parent} ({'; '.join(refused.values())})" if refused else ""
        if spilled is not None:
            note += f"; objects that Ray moves to disk go to {spilled}"
        yield Places(folder, spilled, note)


def _place_for_objects(candidates: Iterable[Path], stack: ExitStack) -> Path | None:
    """A folder below the first of these that takes one; some file systems of clusters have no locks."""
    for path in filter(_can_be_written, candidates):
        with suppress(OSError, NotImplementedError):
            return stack.enter_context(_private_folder(path))
    return None


@contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """A new folder of mode 0700 below `parent`.

    It goes at the end. After a failure (anything but wrong input or an interruption) the logs in it stay for a week,
    and the error has a note of where they are. Folders that killed runs left are emptied here likewise.
    """
    _clear_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix="rlaif-", dir=parent))
    try:
        held = FileLock(folder / OWNER).acquire()
        (folder / HOST).write_text(platform.node())
    except BaseException:
        _remove(folder)
        raise
    with held:
        try:
            yield folder
        except Exception as error:
            if isinstance(error, InputError):
                _remove(folder)
            else:
                _keep_logs(folder)
                if folder.exists():
                    error.add_note(f"Ray's logs: {folder}/ray/session_latest/logs")
            raise
        except BaseException:
            _remove(folder)
            raise
        _remove(folder)


@contextmanager
def private_token(folder: Path) -> Iterator[None]:
    """Within it Ray asks for a token that is made here and lies in `folder`. The user's own, ~/.ray/auth_token, is
    neither read nor written, so that a local Ray needs no home folder."""
    path = folder / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    before = {name: os.environ.pop(name) for name in AUTH if name in os.environ}
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    tokens_reloaded()
    try:
        yield
    finally:
        for name in AUTH:
            os.environ.pop(name, None)
        os.environ |= before
        tokens_reloaded()


def tokens_reloaded() -> None:
    """Ray reads the environment anew for whether it uses a token, and for which: it remembers both."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _parent(environment: Mapping[str, str]) -> tuple[Path, dict[Path, str]]:
    """The first of RAY_TMPDIR, TMPDIR and /tmp that is short enough and can be written, and why those before it are
    not.

    Raises:
        InputError: none of them is.
    """
    refused: dict[Path, str] = {}
    for name, given in (*((name, environment.get(name)) for name in ("RAY_TMPDIR", "TMPDIR")), ("", "/tmp")):
        if not given:
            continue
        path = Path(given).absolute()
        shown = f"{name}={path}" if name else str(path)
        if not _can_be_written(path):
            refused[path] = f"{shown}: not there or can't be written"
        elif len(os.fsencode(path)) > LONGEST_PARENT:
            refused[path] = f"{shown}: more than {LONGEST_PARENT} bytes, too long for sockets"
        else:
            return path, refused
    raise InputError(
        f"a local Ray needs a folder for its sockets and logs (got {'; '.join(refused.values())}). Set TMPDIR to a "
        f"short path that this user can write."
    )


def _can_be_written(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _clear_leftovers(parent: Path) -> None:
    """Removes what runs of this user left that were killed, but for logs, which have a week."""
    now = time.time()
    folders: list[Path] = []
    with suppress(OSError):  # a parent that can't be listed
        folders = [folder for folder in parent.iterdir() if NAME.fullmatch(folder.name) is not None]
    for folder in folders:
        with suppress(OSError, Timeout):
            found = folder.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and found.st_mode & 0o077 == 0
            if not ours or now - found.st_mtime < SETTLED_S or not (folder / OWNER).is_file():
                continue
            if _of_another_machine(folder):
                continue
            with FileLock(folder / OWNER, timeout=0):
                if now - found.st_mtime > KEPT_S:
                    _remove(folder)
                else:
                    _keep_logs(folder)


def _of_another_machine(folder: Path) -> bool:
    return (folder / HOST).is_file() and (folder / HOST).read_text() != platform.node()


def _keep_logs(folder: Path) -> None:
    """Removes all but the logs: objects that Ray moved to disk may be large. Without logs nothing stays."""
    if not (folder / "ray").is_dir():
        _remove(folder)
        return
    for session in (folder / "ray").glob("session_*"):
        if session.is_symlink():
            continue
        for path in session.iterdir():
            if path.name != "logs":
                _remove(path)
    _remove(folder / "token")


def _remove(path: Path) -> None:
    """Removes a file or folder, as far as that can be done."""
    for _ in range(REMOVAL_TRIES):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        time.sleep(0.1)
