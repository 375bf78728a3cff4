"""vLLM's weight transfers on GPUs, with a checksum of what they received. Loaded by vLLM through its factory.

vLLM's own engines say nothing of what came. What a worker holds afterwards can't be compared: with tensor parallelism
it is a part of each tensor, and some layers keep their weights in another form. But every worker receives every tensor
whole, and gives it to the model's `load_weights`: that is where the sum is taken, alike in vLLM 0.28 to 0.33.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rlaif_ray.rollout.checksum import Checksum
from rlaif_ray.rollout.ipc import arguments_of
from rlaif_ray.rollout.loaded import not_loaded, own_what_waits


class Received:
    """What one update brought to one worker."""

    def __init__(self) -> None:
        self.checksum = Checksum()
        self.count = 0  # tensors
        self.storages: set[int] = set()  # addresses of the last message's memory

    @contextmanager
    def by(self, model: Any) -> Iterator[None]:
        """Within it the model counts what it is given to load."""
        own, load = vars(model).get("load_weights"), model.load_weights
        self.storages = set()

        def counting(weights: Iterable[tuple[str, Tensor]]) -> Any:
            given = list(weights)
            for name, tensor in given:
                self.checksum.add(name, tensor)
                self.storages.add(tensor.untyped_storage().data_ptr())
            self.count += len(given)
            return load(iter(given))

        model.load_weights = counting
        try:
            yield
        finally:
            if own is None:
                del model.load_weights  # its class has one
            else:
                model.load_weights = own


class _Verified(WeightTransferEngine[Any, Any]):
    """What our two engines add to vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._received = Received()

    def start_weight_update(self) -> None:
        self._received = Received()
        super().start_weight_update()  # type: ignore[safe-super, unused-ignore]

    def receive_weights(self, update_info: Any) -> None:
        with self._received.by(self.model):
            super().receive_weights(update_info)  # type: ignore[safe-super, unused-ignore]

    @property
    def received_checksum(self) -> int:
        return self._received.checksum.value()

    def not_loaded(self) -> list[str]:
        """Parameters that the update under way has not reached."""
        return not_loaded(self.model) if self._received.count else []


class IpcEngine(_Verified, IPCWeightTransferEngine):
    """Reads the learner's memory on the same GPU, which is the learner's again once an update has returned."""

    def receive_weights(self, update_info: Any) -> None:
        told = [{uuid: arguments_of(one) for uuid, one in handles.items()} for handles in update_info.ipc_handles]
        super().receive_weights(replace(update_info, ipc_handles=told))
        own_what_waits(self.model, self._received.storages)


class NcclEngine(_Verified, NCCLWeightTransferEngine):
    """Receives each tensor into memory of its own, which lives for as long as vLLM wants it."""
