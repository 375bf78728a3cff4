"""vLLM's side of the shared-memory weight transfer, for engines on CPU. Loaded by vLLM through its factory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlaif_ray.rollout.weight_transfer import additive_checksum


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
    """Maps the learner's segment and loads from it in place, by vLLM's layerwise reload."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mapped: tuple[str, int, torch.Tensor] | None = None  # path, inode, bytes
        self.received_checksum = 0

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """No rendezvous: each message names its file."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.received_checksum = 0
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator afterwards; there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        weights = list(self._views(update_info))
        self.received_checksum = (self.received_checksum + additive_checksum([t for _, t in weights])) % 2**63
        load: Any = self.model.load_weights  # vLLM's models have it, torch's Module does not say so
        load(iter(weights))

    def _views(self, info: ShmUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        segment = self._segment(info.path)
        for name, dtype_name, shape, offset in zip(
            info.names, info.dtype_names, info.shapes, info.offsets, strict=True
        ):
            dtype = getattr(torch, dtype_name)
            count = dtype.itemsize * torch.Size(shape).numel()
            yield name, segment[offset : offset + count].view(dtype).view(shape)

    def _segment(self, path: str) -> torch.Tensor:
        """The mapped file; mapped anew when the learner replaced it by a larger one."""
        import os

        stat = os.stat(path)
        if self._mapped is None or self._mapped[:2] != (path, stat.st_ino):
            mapped = torch.from_file(path, shared=True, size=stat.st_size, dtype=torch.uint8)
            self._mapped = (path, stat.st_ino, mapped)
        return self._mapped[2]

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_head()

    def _repack_tied_head(self) -> None:
        """With tied embeddings the layerwise reload refreshes the shared weight but not the copy that the CPU
        kernels packed for the output head at load, so that the engine would sample from the old head. Pack again."""
        head = getattr(self.model, "lm_head", None)
        embedding = getattr(getattr(self.model, "model", None), "embed_tokens", None)
        if head is not None and embedding is not None and (head is embedding or head.weight is embedding.weight):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self._mapped = None
