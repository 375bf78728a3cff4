"""CUDA IPC as this project uses it: one block of memory is exported whole, and tensors are told of as places in it.

torch counts who opened an export (torch/multiprocessing/reductions.py): the block of one that nobody opens is never
freed, and every tensor that is exported by itself is another such block. Here the sender knows how long the block is
needed, so it takes that count back as soon as it has exported: the block is then freed as any other memory is, however
many opened it.

A handle travels as plain data. An engine core in a process of its own, which vLLM starts for tensor parallelism, gets
its messages by msgpack, and that refuses torch's types.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Handle = dict[str, Any]  # arguments of torch's `rebuild_cuda_tensor` by name, those that are plain data
_TYPES = ("tensor_cls", "storage_cls", "dtype")  # the others: types of torch, or told by name


def export(block: Tensor) -> tuple[str, Handle]:
    """(UUID of its GPU, handle) of a block of bytes; the block lives for as long as the caller holds it."""
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    told = _named(reduce_tensor(block)[1])
    counter = told["ref_counter_handle"], told["ref_counter_offset"]
    told["storage_cls"]._release_ipc_counter(*counter, device=told["storage_device"])
    plain = {name: value for name, value in told.items() if name not in _TYPES}
    plain |= {name: list(plain[name]) for name in ("tensor_size", "tensor_stride")}
    return str(torch.cuda.get_device_properties(block.device).uuid), plain


def handle_of(block: Handle, dtype_name: str, shape: tuple[int, ...], offset: int) -> Handle:
    """The handle of a tensor that lies at `offset` bytes of an exported block."""
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name)
    stride = torch.empty(shape, dtype=dtype, device="meta").stride()
    place = {
        "tensor_size": list(shape),
        "tensor_stride": list(stride),
        "tensor_offset": offset // dtype.itemsize,  # in elements
        "dtype": dtype_name,
        "requires_grad": False,
    }
    return block | place


def arguments_of(handle: Handle) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor`, in its order, of a handle that `handle_of` made."""
    import torch

    full = handle | {
        "tensor_cls": torch.Tensor,
        "storage_cls": storage_class(),
        "tensor_size": torch.Size(handle["tensor_size"]),
        "tensor_stride": tuple(handle["tensor_stride"]),
        "dtype": getattr(torch, handle["dtype"]),
    }
    return tuple(full[name] for name in _parameters())


def storage_class() -> Any:
    """The class of storage that torch exports and rebuilds by."""
    import torch

    return torch.storage.TypedStorage


def _named(arguments: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(_parameters(), arguments, strict=True))


def _parameters() -> list[str]:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return list(inspect.signature(rebuild_cuda_tensor).parameters)
