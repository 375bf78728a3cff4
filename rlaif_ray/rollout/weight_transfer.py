"""How weights reach vLLM: where the trainer stages them, and the registration of vLLM's half.

vLLM's worker API is driven by its unpacked wire format (start, update any number of times, finish), the same in
vLLM 0.28 to 0.33. On GPUs its own `ipc` and `nccl` backends receive, with a checksum (`gpu_engines.py`); on CPUs,
where it has none, `shm_engine.py`.
This module imports vLLM only where a transport needs it, so that a learner on CPU never loads it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rlaif_ray.output import show_logs_safely
from rlaif_ray.rollout import ipc
from rlaif_ray.rollout.buckets import lay_out
from rlaif_ray.rollout.orphans import end_with_parent, is_engines_child

if TYPE_CHECKING:
    from torch import Tensor

# By our name of a transport: the backend's name in vLLM, and where its engine is.
ENGINES = {
    "shm": ("shm", "rlaif_ray.rollout.shm_engine", "ShmWeightTransferEngine"),
    "ipc": ("rlaif_ipc", "rlaif_ray.rollout.gpu_engines", "IpcEngine"),
    "nccl": ("rlaif_nccl", "rlaif_ray.rollout.gpu_engines", "NcclEngine"),
}


def register() -> None:
    """Adds our backends to vLLM. A process that one of our engines started ends with its parent, and its
    output is masked. Entry point of vLLM's plugin group: runs in every process of any vLLM in this environment."""
    if is_engines_child():
        end_with_parent()
        show_logs_safely()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, module, engine in ENGINES.values():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, engine)


def stale_message(model: str, names: Sequence[str]) -> str:
    """What to say of a model that did not take these parameters from an update."""
    return (
        f"{model} did not take {len(names)} of its parameters from an update (first {names[0]}): the engine would "
        f"sample from old weights. Report this with the model's name."
    )


class Slot(Protocol):
    """Memory of the learner that holds one bucket and that engines read."""

    def reserve(self, size: int) -> Any:
        """Makes room for so many bytes; returns what a reader needs to find them (board.Source)."""

    def stage(self, tensors: Sequence[Tensor]) -> None:
        """Copies the tensors in, one after the other as buckets.lay_out says; done when it returns."""

    def release(self) -> None:
        """A push is over: what only it needs may go."""

    def close(self) -> None:
        """All of it may go."""


class ShmSlot:
    """A shared-memory segment, reused for every bucket and every push.

    The segment is as large as the largest bucket, never the whole model: that is what keeps a ZeRO-3 sync within
    one layer group of extra memory. It has no name in a file system: the kernel frees it with its last process,
    however that ends, and no limit on /dev/shm (64 MB in a plain container) applies.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._segment: Tensor | None = None  # (bytes,) uint8, mapped

    def reserve(self, size: int) -> str:
        """Where other processes of this user open the segment."""
        self._grown_to(size)
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def stage(self, tensors: Sequence[Tensor]) -> None:
        offsets, size = lay_out([tensor.numel() * tensor.element_size() for tensor in tensors])
        _copy(self._grown_to(size), offsets, tensors)

    def _grown_to(self, size: int) -> Tensor:
        import torch

        if self._segment is None or self._segment.numel() < size:
            self.close()  # a new segment, so that an engine's old mapping stays valid
            self._descriptor = os.memfd_create("rlaif-weights", os.MFD_CLOEXEC)
            os.posix_fallocate(self._descriptor, 0, size)  # no memory left fails here and not as a bus error later
            path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
            self._segment = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        return self._segment

    def release(self) -> None:
        """Nothing to do, the segment is reused."""

    def close(self) -> None:
        self._segment = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class IpcSlot:
    """A block of GPU memory, exported once a push to the engines of the same GPU, and reused for every bucket of it.

    It goes back to torch's allocator with the end of the push, and from there to the GPU, which is shared
    (`free_cached` in runtime/actors.py): engines that wake need the room.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None  # (bytes,) uint8

    def reserve(self, size: int) -> dict[str, ipc.Handle]:
        """The block's handle by the UUID of its GPU."""
        import torch

        self._block = torch.empty(size, dtype=torch.uint8, device=own_device())
        uuid, handle = ipc.export(self._block)
        return {uuid: handle}

    def stage(self, tensors: Sequence[Tensor]) -> None:
        assert self._block is not None, "it is reserved first"
        _copy(self._block, lay_out([tensor.numel() * tensor.element_size() for tensor in tensors])[0], tensors)
        synchronize()  # readers in other processes know nothing of this one's streams

    def release(self) -> None:
        self._block = None

    def close(self) -> None:
        self.release()


def own_device() -> Any:
    """The GPU of this process."""
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def synchronize() -> None:
    """Until the GPU has done all that it was told."""
    import torch

    torch.cuda.synchronize()


def _copy(block: Tensor, offsets: Sequence[int], tensors: Sequence[Tensor]) -> None:
    for offset, tensor in zip(offsets, tensors, strict=True):
        count = tensor.numel() * tensor.element_size()
        block[offset : offset + count].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
