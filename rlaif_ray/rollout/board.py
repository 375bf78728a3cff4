"""How a learner rank and the engines that read what it stages keep in step, without anybody between them.

Both are on one node. A page of memory holds a number for the rank, how many buckets it has staged, and one for every
reader, how many it has taken; each number has one writer and only grows. It is read and written by system calls: they
order it after the weights themselves on every processor. Nobody here watches whether the other side lives, and no
wait has a deadline: the driver does and has both (runtime/weight_sync.py). It leaves a lost engine out, and ends the
engines that wait for a lost rank.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from typing import Any

from rlaif_ray.errors import EngineError

LOOK_S = 0.0005  # between looks at the other side's number: a thousandth of what a bucket of 64 MB takes on CPU
_NUMBER = struct.Struct("<q")
_FAILED = -1  # in place of the rank's number: no more will come
_EVERYTHING = 2**62  # in place of a reader's number: it takes nothing more


class Board:
    """The rank's end, for one push."""

    def __init__(self, readers: int) -> None:
        self._readers = readers
        self._left_out: set[int] = set()  # by another thread, while the rank waits
        self._descriptor = os.memfd_create("rlaif-board", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, _NUMBER.size * (1 + readers))

    @property
    def path(self) -> str:
        """Where other processes of this user open it, for as long as it isn't closed."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def staged(self, count: int) -> None:
        """So many buckets are staged by now."""
        _write(self._descriptor, 0, count)

    def wait_taken(self, count: int) -> None:
        """Until every reader has taken so many buckets, but for those that were left out."""
        for reader in range(self._readers):
            while reader not in self._left_out and _read(self._descriptor, 1 + reader) < count:
                time.sleep(LOOK_S)

    def leave_out(self, reader: int) -> None:
        """That reader is lost."""
        self._left_out.add(reader)

    def fail(self) -> None:
        """No more will come: readers that wait are told."""
        _write(self._descriptor, 0, _FAILED)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Source:
    """Where one learner rank stages, as told to one of its readers."""

    board: str  # path
    reader: int  # the reader's number there
    slots: tuple[Any, ...]  # of each staging slot: the path of its memory, or its IPC handle by the GPU's UUID


class Reading:
    """A reader's end of the boards of all ranks that it takes weights from."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self._numbers = [1 + source.reader for source in sources]
        self._descriptors: list[int] = []
        try:
            self._descriptors += [os.open(source.board, os.O_RDWR | os.O_CLOEXEC) for source in sources]
        except OSError as error:
            self.close()
            raise EngineError(f"the learner's staging memory is gone ({error})") from error

    def wait_staged(self, count: int) -> None:
        """Until every rank has staged so many buckets.

        Raises:
            EngineError: one failed.
        """
        for descriptor in self._descriptors:
            while (staged := _read(descriptor, 0)) < count:
                if staged == _FAILED:
                    raise EngineError("the learner failed in the middle of a weight sync")
                time.sleep(LOOK_S)

    def taken(self, count: int) -> None:
        """So many buckets are loaded by now: their slots may be used again."""
        for descriptor, number in zip(self._descriptors, self._numbers, strict=True):
            _write(descriptor, number, count)

    def close(self) -> None:
        """Whatever it has taken, nobody waits for it any more."""
        for descriptor, number in zip(self._descriptors, self._numbers, strict=False):
            _write(descriptor, number, _EVERYTHING)
            os.close(descriptor)
        self._descriptors = []


def _read(descriptor: int, number: int) -> int:
    value: int = _NUMBER.unpack(os.pread(descriptor, _NUMBER.size, number * _NUMBER.size))[0]
    return value


def _write(descriptor: int, number: int, value: int) -> None:
    os.pwrite(descriptor, _NUMBER.pack(value), number * _NUMBER.size)
