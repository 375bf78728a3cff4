"""What a learner rank has to go on from: its DeepSpeed engines and its random numbers, copied, written and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from rlaif_ray.learner.finite import require_finite_weights
from rlaif_ray.learner.state_files import SUFFIX, HostState, copy_to_host, read_state, write_state
from rlaif_ray.storage import Place, StoredFile, StoredFolder


class RankCheckpoint:
    """The state of one rank. `copy` and `load` are collectives; `write` is not, and may run beside training."""

    def __init__(self, engines: Mapping[str, Any], rank: int) -> None:
        self._engines, self._rank = engines, rank
        self._copied: dict[str, HostState] = {}

    def copy(self, beside: Mapping[str, Any] | None = None) -> None:
        """Copies everything to host memory, as it is now; `beside` is kept with it.

        Raises:
            CheckpointError: something in it can't be stored.
            NotFiniteError: weights are no numbers; on all ranks. Nothing is copied.
        """
        from rlaif_ray.learner.deepspeed_states import copy_engine

        trained = {name: engine.module for name, engine in self._engines.items()}
        require_finite_weights(trained, "so no checkpoint is written")
        copied: dict[str, HostState] = {}
        for name, engine in self._engines.items():
            copied |= {f"{name}/{file}": state for file, state in copy_engine(engine).items()}
        own = {"random": random_state(), "beside": dict(beside or {})}
        copied[f"rank-{self._rank}"] = copy_to_host(own, {})
        self._copied = copied

    def write(self, place: Place) -> dict[str, StoredFile]:
        """Writes what was copied, and lets go of it; returns this rank's files by their path below `place`.

        Raises:
            CheckpointError: it can't be written.
        """
        written = {}
        copied, self._copied = self._copied, {}
        for name in list(copied):
            written[name + SUFFIX] = write_state(place / (name + SUFFIX), copied.pop(name))
        return written

    def load(self, folder: StoredFolder) -> dict[str, Any]:
        """Puts the rank back to where the checkpoint was taken; returns what was kept beside it.

        Raises:
            CheckpointError: a file is damaged, or another run's.
        """
        from rlaif_ray.learner.deepspeed_states import restore_engine

        for name, engine in self._engines.items():
            restore_engine(engine, folder, name)
        own = read_state(folder, f"rank-{self._rank}{SUFFIX}", {})
        set_random_state(own["random"])
        beside: dict[str, Any] = own["beside"]
        return beside


def random_state() -> dict[str, Any]:
    """Of every generator that is the process's own."""
    import numpy

    kind, keys, place, has_gauss, gauss = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(place), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts them back to where they were."""
    import numpy

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
