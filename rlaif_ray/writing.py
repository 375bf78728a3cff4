"""The one door to files that are written: whole or as they were, and never through a symbolic link.

A link may stand where a run writes: planted in a folder that others write too, or unpacked from somebody's archive.
Followed, it would let the run overwrite any file of its user. Links among the folders above are followed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of what `path` names once the body has ended well; a link is itself replaced.

    Raises:
        OSError: it can't be written; what was there stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.unlink(missing_ok=True)  # of a process that was killed and had the same number
    try:
        with open(beside, "xb", opener=_without_links) as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes the file whole, or leaves what was there.

    Raises:
        OSError: it can't be written.
    """
    with replacing(path) as file:
        file.write(data)


def replace_text(path: Path, text: str) -> None:
    """As replace_bytes, in UTF-8. A lone surrogate, which models do emit, becomes \\udxxx: JSON's escape of itself."""
    replace_bytes(path, text.encode("utf-8", "backslashreplace"))


def open_to_append(path: Path, buffering: int = -1) -> BinaryIO:
    """The file, made if it isn't there; what is written goes to its end.

    Raises:
        OSError: it can't be opened, or is a link.
    """
    return open(path, "ab", buffering=buffering, opener=_without_links)


def open_in_place(path: Path) -> BinaryIO:
    """The file as it is, to read, change and cut.

    Raises:
        OSError: it can't be opened, or is a link.
    """
    return cast(BinaryIO, open(path, "r+b", opener=_without_links))


def open_anew(path: Path) -> BinaryIO:
    """The file, emptied: for a folder in the making, whose files count only once it is published.

    Raises:
        OSError: it can't be opened, or is a link.
    """
    return cast(BinaryIO, open(path, "wb", opener=_without_links))


def open_lock(path: Path) -> int:
    """Descriptor of a file to lock, made if it isn't there, and left as it is.

    Raises:
        OSError: it can't be opened, or is a link.
    """
    return _without_links(path, os.O_RDWR | os.O_CREAT)


def _without_links(path: str | Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP or (error.errno == errno.EEXIST and os.path.islink(path)):
            reason = "it is a symbolic link, and files are not written through links: name the file itself"
            raise OSError(errno.ELOOP, reason, str(path)) from None
        raise
