"""How weights reach vLLM: the trainer's half of each transport, and the registration of vLLM's half.

vLLM's worker API is driven by its unpacked wire format (start, update any number of times, finish), the same in
vLLM 0.26 to 0.33. On GPUs its own `ipc` and `nccl` backends receive, with a checksum (`gpu_engines.py`); on CPUs,
where it has none, `shm_engine.py`.
This module imports vLLM only where a transport needs it, so that a learner on CPU never loads it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlaif_ray.output import show_logs_safely
from rlaif_ray.rollout.orphans import end_with_parent, is_engines_child

if TYPE_CHECKING:
    from torch import Tensor

# By our name of a transport: the backend's name in vLLM, and where its engine is.
ENGINES = {
    "shm": ("shm", "rlaif_ray.rollout.shm_engine", "ShmWeightTransferEngine"),
    "ipc": ("rlaif_ipc", "rlaif_ray.rollout.gpu_engines", "IpcEngine"),
    "nccl": ("rlaif_nccl", "rlaif_ray.rollout.gpu_engines", "NcclEngine"),
}
_ALIGNMENT = 64  # bytes; keeps every tensor of a segment aligned for vector loads


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


def describe(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The part of an update message that every transport shares."""
    return {
        "names": list(names),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors],
        "shapes": [list(t.shape) for t in tensors],
    }


class ShmSender:
    """Stages weights in one shared-memory segment, reused for every bucket and every push.

    The segment is as large as the largest bucket, never the whole model: that is what keeps a ZeRO-3 sync within
    one layer group of extra memory. It has no name in a file system: the kernel frees it with its last process,
    however that ends, and no limit on /dev/shm (64 MB in a plain container) applies.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._segment: Tensor | None = None  # (bytes,) uint8, mapped

    def stage(self, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Copies the tensors into the segment; returns vLLM's update message."""
        offsets, size = [], 0
        for tensor in tensors:
            offsets.append(size)
            size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        segment = self._grown_to(size)
        for offset, tensor in zip(offsets, tensors, strict=True):
            count = tensor.numel() * tensor.element_size()
            segment[offset : offset + count].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        return {**describe(names, tensors), "path": self.path, "offsets": offsets}

    @property
    def path(self) -> str:
        """Where other processes of this user open the segment."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def _grown_to(self, size: int) -> Tensor:
        import torch

        if self._segment is None or self._segment.numel() < size:
            self.close()  # a new segment, so that an engine's old mapping stays valid
            self._descriptor = os.memfd_create("rlaif-weights", os.MFD_CLOEXEC)
            os.posix_fallocate(self._descriptor, 0, size)  # no memory left fails here and not as a bus error later
            self._segment = torch.from_file(self.path, shared=True, size=size, dtype=torch.uint8)
        return self._segment

    def release(self) -> None:
        """After a push: nothing to do, the segment is reused."""

    def close(self) -> None:
        self._segment = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class IpcSender:
    """Hands CUDA IPC handles to engines on the same GPU. Staged tensors live until `release`."""

    def __init__(self) -> None:
        self._staged: list[Tensor] = []

    def stage(self, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        # A parameter's storage may be one large flat buffer of DeepSpeed's: a clone exports just this tensor.
        staged = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        self._staged += staged
        torch.cuda.synchronize()
        return {**describe(names, staged), "ipc_handles": [{uuid: reduce_tensor(t)[1]} for t in staged]}

    def release(self) -> None:
        """After the engines took a bucket: its staging memory may go."""
        import torch

        self._staged.clear()
        torch.cuda.ipc_collect()

    def close(self) -> None:
        self.release()


def with_handles_of_all(messages: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One rank's update message, with every rank's IPC handles: a worker takes those of its own GPU."""
    sent = [message for message in messages if message is not None]
    if "ipc_handles" not in sent[0]:
        return sent[0]
    each = zip(*(message["ipc_handles"] for message in sent), strict=True)  # by tensor
    return {**sent[0], "ipc_handles": [{k: v for handles in ranks for k, v in handles.items()} for ranks in each]}


class NcclSender:
    """Broadcasts from the learner's rank 0 to all engine workers, for engines on GPUs of their own."""

    def __init__(self, address: str, port: int, world_size: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group: Any = trainer_init({"master_address": address, "master_port": port, "world_size": world_size})

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Sends in order; runs while the engines are inside `update_weights` of the same names."""
        import torch

        stream = torch.cuda.current_stream()
        for tensor in tensors:
            self._group.broadcast(tensor.detach().contiguous(), src=0, stream=stream)
        torch.cuda.synchronize()

    def release(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        self._group = None
