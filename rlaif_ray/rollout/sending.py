"""The learner's half of a push: one bucket after the other is gathered by all ranks, and sent by those that send."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rlaif_ray.rollout.board import Board, Source
from rlaif_ray.rollout.buckets import Bucket
from rlaif_ray.rollout.checksum import Checksum
from rlaif_ray.rollout.weight_transfer import Slot

if TYPE_CHECKING:
    from torch import Tensor


class Weights(Protocol):
    """Where the weights come from (learner/model_state.py)."""

    def gathered(self, names: Sequence[str]) -> AbstractContextManager[list[Tensor]]: ...


class Sender(Protocol):
    """How one rank sends. Calls come in the order start, wait, start, wait ..., finish."""

    keeps: bool  # whether it needs a bucket's tensors until `wait` returns
    failure: str | None  # why it sends no more, where that was its own end's fault

    def start(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Begins to send a bucket."""

    def wait(self) -> None:
        """Until that is done, or will never be."""

    def finish(self) -> None:
        """Until all is done."""

    def fail(self) -> None:
        """This rank can't go on: whoever waits for it is told."""

    def close(self) -> None:
        """Frees all it holds."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What one rank says of a push."""

    checksum: int  # of what it gathered, modulo 2^63; 0 where it was not to count
    failure: str | None = None  # why it stopped sending; it gathered to the end all the same


@dataclass(slots=True)
class Staging:
    """A sender that fills slots by turns: while the engines load one bucket, the learner fills the other slot."""

    slots: Sequence[Slot]
    board: Board | None = None  # of the push under way; None while no engine reads here
    keeps: bool = False
    failure: str | None = None

    def offer(self, size: int, readers: int) -> list[Source]:
        """Prepares a push of buckets of up to `size` bytes: what to tell each of its readers. Without any it stages
        nothing."""
        self.fail()  # what is left of a push that broke off
        if readers == 0:
            return []
        slots = tuple(slot.reserve(size) for slot in self.slots)
        self.board = Board(readers)
        return [Source(self.board.path, self.board.token, reader, slots) for reader in range(readers)]

    def start(self, number: int, tensors: Sequence[Tensor]) -> None:
        if self.board is not None:
            self.board.wait_taken(number + 1 - len(self.slots))
            self.slots[number % len(self.slots)].stage(tensors)
            self.board.staged(number + 1)

    def wait(self) -> None:
        """It is done when `start` returns."""

    def finish(self) -> None:
        if self.board is not None:
            self.board.wait_taken(2**62)  # until all have left
            self._end()

    def fail(self) -> None:
        if self.board is not None:
            self.board.fail()
            self._end()

    def leave_out(self, source: Source) -> None:
        """From another thread: the reader who was told of `source` is lost. Of a push that is over it says nothing."""
        board = self.board
        if board is not None and board.token == source.token:
            board.leave_out(source.reader)

    def close(self) -> None:
        self.fail()
        for slot in self.slots:
            slot.close()

    def _end(self) -> None:
        board, self.board = self.board, None
        assert board is not None
        board.close()
        for slot in self.slots:
            slot.release()


def send_all(weights: Weights, buckets: Sequence[Bucket], sender: Sender | None, *, counted: bool) -> Sent:
    """Sends all weights, and sums up what this rank gathered where it is `counted`. All ranks enter together, with or
    without something to send.

    A sender that fails or is broken off on the way sends no more, and this rank still gathers to the end: its peers do.
    """
    total = Checksum()
    # Each bucket's `gathered` leaves out gradients and puts back what it found, but not one inside the other here.
    with torch.no_grad(), ExitStack() as held:
        try:
            for number, bucket in enumerate(buckets):
                with ExitStack() as gathering:
                    tensors = gathering.enter_context(weights.gathered(bucket.names))
                    if counted:
                        for name, tensor in zip(bucket.names, tensors, strict=True):
                            total.add(name, tensor)
                    if sender is None:
                        continue
                    sender.wait()
                    held.close()  # the bucket before is sent
                    sender.start(number, tensors)
                    if sender.keeps:
                        held.enter_context(gathering.pop_all())
            if sender is not None:
                sender.finish()
        except BaseException:
            if sender is not None:
                sender.fail()
            raise
    return Sent(total.value(), None if sender is None else sender.failure)
