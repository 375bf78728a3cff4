"""What a push sends at a time, and where in a staging slot each tensor lies. Pure, so that both ends know it alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Metadata = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype, shape)
BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}
BYTES |= {"int8": 1, "uint8": 1, "bool": 1}
SLOTS = 2  # of a staging rank: one is filled while the other is read
ALIGNMENT = 64  # bytes; keeps every tensor of a slot aligned for vector loads


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that are gathered, sent and loaded together."""

    names: tuple[str, ...]
    dtype_names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # bytes, of each in a slot
    size: int  # bytes of a slot that holds them all

    def described(self) -> dict[str, Any]:
        """The part of vLLM's update message that every transport shares."""
        return {
            "names": list(self.names),
            "dtype_names": list(self.dtype_names),
            "shapes": [list(shape) for shape in self.shapes],
        }


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = BYTES[dtype]
    for n in shape:
        count *= n
    return count


def lay_out(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Offsets of tensors of these sizes one after the other, each aligned, and where the last one ends, in bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return tuple(offsets), end


def make_buckets(groups: list[list[str]], metadata: Metadata, limit_bytes: int) -> list[Bucket]:
    """Consecutive layer groups together up to the limit; a group is never split, its parts are loaded together."""
    known = {name: (dtype, shape) for name, dtype, shape in metadata}
    sizes = {name: tensor_bytes(dtype, shape) for name, dtype, shape in metadata}
    together: list[list[str]] = []
    used = 0
    for group in groups:
        size = sum(sizes[name] for name in group)
        if not together or used + size > limit_bytes:
            together.append([])
            used = 0
        together[-1] += group
        used += size
    return [
        Bucket(
            tuple(names),
            tuple(known[name][0] for name in names),
            tuple(known[name][1] for name in names),
            *lay_out([sizes[name] for name in names]),
        )
        for names in together
    ]


def largest(buckets: Sequence[Bucket]) -> int:
    """Bytes of a slot that holds any of them."""
    return max((bucket.size for bucket in buckets), default=0)
