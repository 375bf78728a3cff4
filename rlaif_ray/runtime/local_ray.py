"""What keeps a local Ray this user's own: a folder that nobody else enters, and a token that lies in it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # its stub is shorter

from rlaif_ray.errors import InputError

NAME = re.compile(r"rlaif-[a-z0-9_]{8}")  # of a folder, as tempfile makes it
OWNER = "owner.lock"  # held while the run lives; the kernel lets go of it however the run ends
# What stands behind the parent folder in a socket's path, which has 107 bytes at most; the last number is a process id.
_SOCKET = "/rlaif-XXXXXXXX/ray/session_YYYY-MM-DD_HH-MM-SS_ffffff_4194304/sockets/plasma_store"
LONGEST_PARENT = 107 - len(_SOCKET)
SETTLED_S = 60.0  # a folder that is younger may not have its lock yet
KEPT_S = 7 * 24 * 3600.0  # logs of runs that failed or were killed
REMOVAL_TRIES = 10  # processes that are ending still write
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder of mode 0700 for one local Ray, short enough for Ray's sockets.

    It goes at the end. After a failure (anything but wrong input or an interruption) the logs in it stay for a week,
    and the error has a note of where they are. Folders that killed runs left are emptied here likewise.

    Raises:
        InputError: there is no place for it.
    """
    parent = _parent(os.environ)
    _clear_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix="rlaif-", dir=parent))
    with FileLock(folder / OWNER):
        try:
            yield folder
        except Exception as error:
            if isinstance(error, InputError):
                _remove(folder)
            else:
                _keep_logs(folder)
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


def _parent(environment: Mapping[str, str]) -> Path:
    """The first of RAY_TMPDIR, TMPDIR and /tmp that is short enough and can be written."""
    refused = []
    for given in (environment.get("RAY_TMPDIR"), environment.get("TMPDIR"), "/tmp"):
        if not given:
            continue
        path = Path(given).absolute()
        if len(os.fsencode(path)) > LONGEST_PARENT:
            refused.append(f"{path}: more than {LONGEST_PARENT} bytes, too long for sockets")
        elif not os.access(path, os.W_OK | os.X_OK):
            refused.append(f"{path}: not there or can't be written")
        else:
            return path
    raise InputError(
        f"a local Ray needs a folder for its sockets and logs (got {'; '.join(refused)}). Set TMPDIR to a short path "
        f"that this user can write."
    )


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
            with FileLock(folder / OWNER, timeout=0):
                if now - found.st_mtime > KEPT_S:
                    _remove(folder)
                else:
                    _keep_logs(folder)


def _keep_logs(folder: Path) -> None:
    """Removes all but the logs: objects that Ray moved to disk may be large."""
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
