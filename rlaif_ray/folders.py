"""Folders that appear whole or not at all, however the process that makes them ends."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from rlaif_ray.errors import InputError

BUILD_WAIT_S = 1800.0  # how long a process waits for another one that is making the same folder


def publish_folder(partial: Path, final: Path) -> None:
    """Gives `partial` its final name, once all in it is on disk; replaces what has that name.

    After a power cut too, a folder that exists is a folder that is whole.
    """
    for path in [*partial.rglob("*"), partial]:
        _flush_to_disk(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush_to_disk(final.parent)


def build_folder_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build(temporary folder)` unless it exists already. `folder` exists only when complete.

    Of processes that ask at once one builds and the others wait and reuse. The lock is the kernel's, so it goes with
    its holder even when that is killed; whoever holds it next may therefore remove any temporary folder it finds.
    """
    from filelock import FileLock, Timeout

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}.lock"
    try:
        with FileLock(lock, timeout=BUILD_WAIT_S):
            for abandoned in folder.parent.glob(f".{folder.name}.partial-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            if not folder.is_dir():
                _build_and_publish(folder, build)
    except Timeout:
        raise InputError(
            f"{folder} is not there yet: another process has been making it for {BUILD_WAIT_S:.0f} s and holds {lock}. "
            "End that process if it hangs, then start again."
        ) from None
    return folder


def _build_and_publish(folder: Path, build: Callable[[Path], None]) -> None:
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        build(partial)
        publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
