"""How a learner rank and the engines that read what it stages keep in step, without a process between them.

Both are on one node and share a page of memory, the board. It holds a random token, the number of buckets that the
rank has staged, and for each reader the number of buckets it has taken. Each number has one writer and only grows. All
access is by system calls, which put it in order with the weights themselves on every processor.

No wait here has a deadline, and neither side watches the other. The driver does both (runtime/weight_sync.py): it tells
the rank of a lost engine, and ends the engines that wait for a lost rank.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from dataclasses import dataclass
from typing import Any

from rlaif_ray.errors import EngineError

LOOK_S = 0.0005  # between looks at the other side's number: a thousandth of what a bucket of 64 MB takes on CPU
_NUMBER = struct.Struct("<q")
_TOKEN_BYTES = 16  # before the numbers
_FAILED = -1  # in place of the rank's number: no more will come
_EVERYTHING = 2**62  # in place of a reader's number: it takes nothing more


class Board:
    """The rank's end, for one push."""

    def __init__(self, readers: int) -> None:
        self._readers = readers
        self._left_out: set[int] = set()  # by another thread, while the rank waits
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._descriptor = os.memfd_create("rlaif-board", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, _TOKEN_BYTES + _NUMBER.size * (1 + readers))
        os.pwrite(self._descriptor, self.token, 0)

    @property
    def path(self) -> str:
        """Where other processes of this user open it until it is closed. Later the path may lead to another file, which
        doesn't begin with `token`."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def staged(self, count: int) -> None:
        """`count` buckets are staged."""
        _write(self._descriptor, 0, count)

    def wait_taken(self, count: int) -> None:
        """Until every reader has taken `count` buckets, except those that were left out."""
        for reader in range(self._readers):
            while reader not in self._left_out and _read(self._descriptor, 1 + reader) < count:
                time.sleep(LOOK_S)

    def leave_out(self, reader: int) -> None:
        """This reader is lost: it is not waited for."""
        self._left_out.add(reader)

    def fail(self) -> None:
        """Tells the readers that no more buckets will come."""
        _write(self._descriptor, 0, _FAILED)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Source:
    """Where one learner rank stages, as told to one of its readers."""

    board: str  # path
    token: bytes  # of that board
    reader: int  # the reader's number there
    slots: tuple[Any, ...]  # of each staging slot: the path of its memory, or its IPC handle by the GPU's UUID


class Reading:
    """A reader's end of the boards of all ranks that it takes weights from."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        """Raises EngineError: a board is closed already."""
        self._numbers = [1 + source.reader for source in sources]
        self._descriptors: list[int] = []
        try:
            for source in sources:
                self._descriptors.append(_opened(source))
        except OSError as error:
            self.close()
            raise EngineError(f"the learner's staging memory is gone ({error})") from error

    def wait_staged(self, count: int) -> None:
        """Until every rank has staged `count` buckets.

        Raises:
            EngineError: one failed.
        """
        for descriptor in self._descriptors:
            while (staged := _read(descriptor, 0)) < count:
                if staged == _FAILED:
                    raise EngineError("the learner failed in the middle of a weight sync")
                time.sleep(LOOK_S)

    def taken(self, count: int) -> None:
        """`count` buckets are loaded: their slots may be used again."""
        for descriptor, number in zip(self._descriptors, self._numbers, strict=True):
            _write(descriptor, number, count)

    def close(self) -> None:
        """From now on no rank waits for this reader, whatever it has taken."""
        for descriptor, number in zip(self._descriptors, self._numbers, strict=False):
            _write(descriptor, number, _EVERYTHING)
            os.close(descriptor)
        self._descriptors = []


def _opened(source: Source) -> int:
    """The board's descriptor. Raises OSError where its path leads nowhere, or to another file by now."""
    descriptor = os.open(source.board, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, _TOKEN_BYTES, 0) != source.token:
            raise FileNotFoundError(f"{source.board} is another file by now")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _read(descriptor: int, number: int) -> int:
    value: int = _NUMBER.unpack(os.pread(descriptor, _NUMBER.size, _place(number)))[0]
    return value


def _write(descriptor: int, number: int, value: int) -> None:
    os.pwrite(descriptor, _NUMBER.pack(value), _place(number))


def _place(number: int) -> int:
    return _TOKEN_BYTES + number * _NUMBER.size
