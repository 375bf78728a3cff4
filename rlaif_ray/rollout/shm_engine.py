"""vLLM's side of the shared-memory weight transfer, for engines on CPU. Loaded by vLLM through its factory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlaif_ray.rollout.checksum import Checksum
from rlaif_ray.rollout.reload import Reload


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One bucket of weights in a shared-memory file."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    path: str
    offsets: list[int]  # bytes


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Maps the learner's segments, one for each of its slots, and loads from them in place (reload.py)."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mapped: dict[str, tuple[int, torch.Tensor]] = {}  # by path: inode, bytes
        self._checksum = Checksum()
        self._reload: Reload | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """No rendezvous: each message names its file."""

    def start_weight_update(self) -> None:
        self._checksum = Checksum()
        self._reload = Reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator afterwards; there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        weights = list(self._views(update_info))
        for name, tensor in weights:
            self._checksum.add(name, tensor)
        assert self._reload is not None, "vLLM starts an update first"
        self._reload.load(weights)

    def _views(self, info: ShmUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        segment = self._segment(info.path)
        for name, dtype_name, shape, offset in zip(
            info.names, info.dtype_names, info.shapes, info.offsets, strict=True
        ):
            dtype = getattr(torch, dtype_name)
            count = dtype.itemsize * torch.Size(shape).numel()
            yield name, segment[offset : offset + count].view(dtype).view(shape)

    def _segment(self, path: str) -> torch.Tensor:
        """The mapped file. It stays mapped until the learner replaces it by a larger one, under the same path or
        another."""
        stat = os.stat(path)
        if path not in self._mapped or self._mapped[path][0] != stat.st_ino:
            self._mapped = {known: kept for known, kept in self._mapped.items() if _inode(known) == kept[0]}
            self._mapped[path] = stat.st_ino, torch.from_file(path, shared=True, size=stat.st_size, dtype=torch.uint8)
        return self._mapped[path][1]

    @property
    def received_checksum(self) -> int:
        return self._checksum.value()

    def not_loaded(self) -> list[str]:
        """Nothing to say before the end: an update that left something out fails there (reload.py)."""
        return []

    def finish_weight_update(self) -> None:
        assert self._reload is not None, "vLLM starts an update first"
        reload, self._reload = self._reload, None
        reload.finish(self.model_config)

    def shutdown(self) -> None:
        self._mapped = {}


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None
