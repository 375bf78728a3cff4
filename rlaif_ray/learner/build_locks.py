"""Locks that a killed build of one of DeepSpeed's C++ extensions left: torch would wait on them for ever.

torch builds an extension in a folder of its own, under a file `lock` there. Whoever finds that file waits until it is
gone. A builder that is killed leaves it, and the file names no owner.

The rule: a builder keeps its lock open, and its compilers work in the folder. Where no process of this machine does
either, the lock is nobody's, and is removed. A builder may be out of sight: on a file system that other machines share
it may be on one of them, and what another user's processes have open is not shown to us. In both cases a lock that
nothing has moved beside for five minutes ends the start with an error, and nothing is removed. (Containers that share a
local folder and don't see each other's processes are not told apart from a killed build.)
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlaif_ray.errors import InputError, RunError

log = logging.getLogger(__name__)

LOCAL = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
QUIET_S = 300.0  # a compiler works on one file for less
LOOK_S = 1.0


def free_build_locks() -> None:
    """Removes what killed builds left. To be called before the first extension is built.

    Raises:
        InputError: a lock seems to be nobody's, where that can't be known.
    """
    names = _deepspeeds()
    for lock in [*_root().glob("*/lock"), *_root().glob("*/*/lock")]:
        if lock.parent.name in names and _is_nobodys(lock):
            _remove(lock)


def _deepspeeds() -> set[str]:
    """Names of DeepSpeed's extensions."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    return {builder.name for builder in ALL_OPS.values()}


def _called(lock: Path) -> str:
    """The extension that is built under this lock, in words."""
    name = lock.parent.name
    return f"DeepSpeed's extension {name}" if name in _deepspeeds() else f"PyTorch extension {name}"


def watch_waits() -> None:
    """From now on, whoever in this process waits for another's build ends with an error when that one is gone."""
    from torch.utils import file_baton

    baton: Any = file_baton.FileBaton
    baton.wait = _wait


def _wait(baton: Any) -> None:
    """In the place of `FileBaton.wait`.

    Raises:
        RunError: the builder was killed.
        InputError: as `free_build_locks`.
    """
    lock, looked = Path(baton.lock_file_path), time.monotonic()
    while lock.exists():
        time.sleep(baton.wait_seconds)
        if time.monotonic() - looked < LOOK_S:
            continue
        if _is_nobodys(lock):
            _remove(lock)
            raise RunError(
                f"The build of {_called(lock)} was killed while this process waited for it in {lock.parent}. "
                f"Its lock is removed: start again."
            )
        looked = time.monotonic()


def _root() -> Path:
    """Where torch builds extensions: in folders of this one, or of its folders (by Python and CUDA version)."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _is_nobodys(lock: Path) -> bool:
    """Whether no builder is left who would remove it.

    Raises:
        InputError: it seems so, where that can't be known.
    """
    with suppress(FileNotFoundError):  # gone meanwhile
        is_ours = lock.stat().st_uid == os.getuid()  # then so was its builder, whom we would see
        builders, unseen = _builders(lock)
        if builders:
            return False
        if _file_system(lock) in LOCAL and (is_ours or not unseen):
            return True
        quiet_s = time.time() - max(path.stat().st_mtime for path in (lock, lock.parent, *lock.parent.iterdir()))
        if quiet_s > QUIET_S:
            raise InputError(
                f"{_called(lock)} can't be built: {lock} says that somebody builds it, but no process of this machine "
                f"that can be seen does, and nothing there has changed for {quiet_s / 60:.0f} minutes. A build that "
                f"was killed leaves such a file. Remove it if no other machine or user builds there, or set "
                f"TORCH_EXTENSIONS_DIR to a folder of your own on a local disk."
            )
    return False


def _builders(lock: Path) -> tuple[list[int], bool]:
    """(processes of this machine that have the lock open, or work in its folder; whether there are others that can't
    be looked into)."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    file, folder = os.path.realpath(lock), os.path.realpath(lock.parent)
    found, unseen = [], False
    for process in psutil.process_iter():
        try:
            if process.cwd() == folder or any(opened.path == file for opened in process.open_files()):
                found.append(process.pid)
        except (psutil.AccessDenied, PermissionError):  # another user's
            unseen = True
        except (psutil.Error, OSError):  # ended meanwhile
            continue
    return found, unseen


def _file_system(path: Path) -> str:
    import psutil

    real = Path(os.path.realpath(path))
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in real.parents if folder in mounts), "")


def _remove(lock: Path) -> None:
    lock.unlink(missing_ok=True)
    log.warning("Removed %s: a killed build of %s left it.", lock, _called(lock))
