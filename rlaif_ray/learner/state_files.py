"""A nested state as one safetensors file: its tensors as they are, and all else as JSON in the file's metadata.

What comes back is what went in: tuples, None, NaN, key types, dtypes, and names that share a tensor. Types that are
not known here are an error on writing; nothing is pickled. The file is written as a stream, so that it is hashed on
the way and needs no second copy in memory; safetensors itself reads it.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from rlaif_ray.documents import parse_json
from rlaif_ray.errors import CheckpointError
from rlaif_ray.storage import READ_BYTES, Place, StoredFile, StoredFolder, told, verified

SUFFIX = ".safetensors"
# As the format names them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
STATE_BYTES = 100 << 20  # of a state beside its tensors: as much as safetensors takes
_PLAIN = (str, bool, int, type(None))
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(slots=True)
class HostState:
    """A state that has left the device: it stays as it is while training goes on."""

    tree: Any  # JSON
    tensors: dict[str, Tensor] = field(default_factory=dict)  # on CPU, contiguous, nobody else's


def copy_to_host(state: Any, objects: Mapping[str, type]) -> HostState:
    """The state as it is now.

    Args:
        objects: classes, by name, of which instances may be in it; they hold nothing but a state themselves.

    Raises:
        CheckpointError: something in it has another type.
    """
    copying = _Copying({kind: name for name, kind in objects.items()})
    return HostState(copying.encode(state, ""), copying.tensors)


class _Copying:
    def __init__(self, objects: Mapping[type, str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._objects = objects
        self._seen: dict[Any, str] = {}  # name by what a tensor is a view of

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, Tensor):
            return {"tensor": self._copy(value.detach(), path)}
        if kind is list:
            return self._items(value, path)
        if kind in (tuple, torch.Size):
            return {"tuple" if kind is tuple else "size": self._items(value, path)}
        if kind in (dict, OrderedDict):
            pairs = [[self.encode(k, path), self.encode(v, f"{path}/{k}")] for k, v in value.items()]
            return {"dict" if kind is dict else "ordered": pairs}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind in self._objects and isinstance(value, Enum):
            return {"enum": [self._objects[kind], self.encode(value.value, path)]}
        if kind in self._objects:
            return {"object": [self._objects[kind], self.encode(vars(value), path)]}
        raise CheckpointError(
            f"{path.lstrip('/') or 'the state'} can't be stored: it is a {kind.__module__}.{kind.__qualname__}, and "
            f"only tensors, numbers, text, lists, tuples and mappings of them can. Leave out what brings it into the "
            f"learner (learner.deepspeed_overrides)."
        )

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.encode(item, f"{path}/{k}") for k, item in enumerate(values)]

    def _copy(self, tensor: Tensor, path: str) -> str:
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(f"{path.lstrip('/')} can't be stored: it is a tensor of {tensor.dtype}.")
        view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
        if tensor.numel() and view in self._seen:
            return self._seen[view]
        name = base = path.lstrip("/") or "tensor"
        for number in range(2, 2 + len(self.tensors)):
            if name not in self.tensors:
                break
            name = f"{base}#{number}"
        self.tensors[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._seen[view] = name
        return name


def decode(tree: Any, tensors: Mapping[str, Tensor], objects: Mapping[str, type]) -> Any:
    """The state of a tree and its tensors."""
    if not isinstance(tree, dict | list):
        return tree
    if isinstance(tree, list):
        return [decode(item, tensors, objects) for item in tree]
    ((kind, value),) = tree.items()
    if kind == "float":
        return _SPECIAL[value]
    if kind == "tensor":
        return tensors[value]
    if kind == "dtype":
        return getattr(torch, value)
    if kind in ("enum", "object"):
        name, inner = value
        made, content = objects[name], decode(inner, tensors, objects)
        if kind == "enum":
            return made(content)
        instance: Any = object.__new__(made)
        vars(instance).update(content)
        return instance
    items = decode(value, tensors, objects)
    rebuilt: dict[str, Any] = {"tuple": tuple, "size": torch.Size, "dict": dict, "ordered": OrderedDict}
    return rebuilt[kind](items)


def write_state(place: Place, state: HostState) -> StoredFile:
    """Writes the file, durable; returns what it is.

    Raises:
        CheckpointError: it can't be written.
    """
    # Widest types first: then every tensor is aligned. The reader expects no gaps.
    order = sorted(state.tensors, key=lambda name: (-state.tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(state.tree, allow_nan=False)}}
    end = 0
    for name in order:
        tensor = state.tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with place.writing() as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            data = state.tensors[name].reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), READ_BYTES):
                file.write(data[start : start + READ_BYTES])
    return file.stored


def read_state(folder: StoredFolder, name: str, objects: Mapping[str, type]) -> Any:
    """The state in a file of the folder, verified.

    Raises:
        CheckpointError: the file is another than was written, or can't be read.
    """
    place, expected = folder.file(name)
    if place.folder is not None:
        verified(place, expected)
        return _load(place.folder, place, objects)
    with TemporaryDirectory(prefix="rlaif-checkpoint-") as scratch:
        local = Place(scratch) / "state"
        try:
            with place.opened() as source, local.writing() as copy:
                while data := source.read(READ_BYTES):
                    copy.write(data)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{place} can't be read ({told(error)}).") from error
        if copy.stored != expected:
            raise CheckpointError(f"{place} is damaged: it is not what was written.")
        return _load(local.folder, place, objects)


def _load(path: Any, place: Place, objects: Mapping[str, type]) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return decode(parse_json(file.metadata()["state"], most_bytes=STATE_BYTES, lenient=True), tensors, objects)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place} can't be read ({told(error)}).") from error
