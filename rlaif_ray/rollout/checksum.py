"""The sum by which both ends of a weight transfer tell that the same bytes arrived, under the same names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODULUS = 2**63


class Checksum:
    """A sum over tensors, modulo 2^63, in any order. It stays on their device until it is asked for.

    Of each tensor: its bytes as 64-bit integers, summed, plus one, times an odd number that follows from its name,
    without the lowest bit (all modulo 2^64). So one wrong bit shows, two tensors whose bytes were exchanged, one that
    is missing (even of zeros), and one that came twice. Elements exchanged within one tensor don't.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None  # () int64

    def add(self, name: str, tensor: Tensor) -> None:
        """Reads the whole tensor, on its device and stream, and waits for nothing."""
        value = (((_words(tensor) + 1) * _key(name)) >> 1) & (MODULUS - 1)
        self._total = value if self._total is None else self._total + value

    def value(self) -> int:
        """The sum so far; waits for the device."""
        return 0 if self._total is None else int(self._total) % MODULUS


def checksum(names: Sequence[str], tensors: Sequence[Tensor]) -> int:
    """Of all of them. Sums of several calls add up, modulo 2^63."""
    total = Checksum()
    for name, tensor in zip(names, tensors, strict=True):
        total.add(name, tensor)
    return total.value()


def _words(tensor: Tensor) -> Tensor:
    """() int64: the sum of the bytes, eight at a time where their number allows it, else by element."""
    import torch

    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() * flat.element_size() % 8:
        by_element = {4: torch.int32, 2: torch.int16, 1: torch.int8}
        return flat.view(by_element[flat.element_size()]).sum(dtype=torch.int64)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # part of a flat buffer, at a place where no 64-bit integer may begin
    return flat.view(torch.int64).sum()


def _key(name: str) -> int:
    """An odd number, as a signed 64-bit integer."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) | 1
