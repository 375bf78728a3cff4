"""CUDA IPC as this project uses it: one block of memory is exported whole, and tensors are told of as places in it.

torch counts who opened an export (torch/multiprocessing/reductions.py): the block of one that nobody opens is never
freed, and every tensor that is exported by itself is another such block. Here the sender knows how long the block is
needed, so it takes that count back as soon as it has exported: the block is then freed as any other memory is, however
many opened it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Handle = tuple[Any, ...]  # arguments of torch's `rebuild_cuda_tensor`


def export(block: Tensor) -> tuple[str, Handle]:
    """(UUID of its GPU, handle) of a block of bytes; the block lives for as long as the caller holds it."""
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    handle: Handle = reduce_tensor(block)[1]
    told = _named(handle)
    counter = told["ref_counter_handle"], told["ref_counter_offset"]
    told["storage_cls"]._release_ipc_counter(*counter, device=told["storage_device"])
    return str(torch.cuda.get_device_properties(block.device).uuid), handle


def handle_of(block: Handle, dtype_name: str, shape: tuple[int, ...], offset: int) -> Handle:
    """The handle of a tensor that lies at `offset` bytes of an exported block."""
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name)
    stride = torch.empty(shape, dtype=dtype, device="meta").stride()
    place = {
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size(shape),
        "tensor_stride": stride,
        "tensor_offset": offset // dtype.itemsize,  # in elements
        "dtype": dtype,
        "requires_grad": False,
    }
    return tuple((_named(block) | place).values())


def _named(handle: Handle) -> dict[str, Any]:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return dict(zip(inspect.signature(rebuild_cuda_tensor).parameters, handle, strict=True))
