"""Prompts dealt out step by step, in seeded epochs."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Sequence
from typing import Any

from rlaif_ray.data.prompt_table import prompts_digest
from rlaif_ray.errors import InputError
from rlaif_ray.types import Prompt


class PromptSource:
    """Deals prompts out, `prompts_per_step` at a time, every prompt once an epoch, without end.

    A step may take the last prompts of one epoch and the first of the next, and never holds a prompt twice unless
    there are fewer prompts than a step takes. The order follows from the seed alone.
    """

    def __init__(self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int, shuffle: bool) -> None:
        assert prompts and prompts_per_step >= 1
        self.prompts = prompts
        self.prompts_per_step, self.seed, self.shuffle = prompts_per_step, seed, shuffle
        self.step = 0  # steps dealt out
        self.epoch, self.position = 0, 0  # the epoch under way, and how many of its prompts were dealt out
        self.order = self._epoch_order(0, begun=[])
        self.identity = {  # what the order of the prompts follows from
            "prompts": prompts_digest(prompts),
            "prompts_per_step": prompts_per_step,
            "seed": seed,
            "shuffle": shuffle,
        }

    def next(self) -> list[Prompt]:
        """The prompts of the next step."""
        return [self.prompts[index] for index in self._deal()]

    def _deal(self) -> list[int]:
        """The numbers of the prompts of the next step."""
        chosen: list[int] = []
        while len(chosen) < self.prompts_per_step:
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self.order = self._epoch_order(self.epoch, begun=chosen)
            part = self.order[self.position : self.position + self.prompts_per_step - len(chosen)]
            chosen += part
            self.position += len(part)
        self.step += 1
        return chosen

    def state(self) -> dict[str, Any]:
        """Where the source stands, for `restore`; goes into JSON. It does not grow with the prompts."""
        return {"step": self.step, "epoch": self.epoch, "position": self.position, **self.identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken, also in another process. InputError where it does not fit."""
        for key, here in self.identity.items():
            if state.get(key) != here:
                raise InputError(
                    f"the checkpoint's place in the prompts does not fit this run: {key} was {state.get(key)!r} and is "
                    f"{here!r}, so the order of the prompts is another. Restore that setting or those prompts, or "
                    "start a new run (checkpoint.resume=never, or another run_dir)."
                )
        self.step, self.epoch, self.position, self.order = 0, 0, 0, self._epoch_order(0, begun=[])
        for _ in range(state["step"]):  # an epoch's order depends on how the one before it ended, so walk there
            self._deal()
        assert (self.epoch, self.position) == (state["epoch"], state["position"])

    def _epoch_order(self, epoch: int, begun: Sequence[int]) -> array[int]:
        """The order of one epoch. `begun` is what the step at its start already holds: that comes later."""
        order = array("I", range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        if not begun or len(order) < self.prompts_per_step:
            return order
        taken, missing = set(begun), self.prompts_per_step - len(begun)
        head = dict.fromkeys(itertools.islice((index for index in order if index not in taken), missing))
        return array("I", itertools.chain(head, (index for index in order if index not in head)))
