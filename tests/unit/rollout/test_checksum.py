"""The sum that both ends of a weight transfer compare, by hand and by what it must see."""

from __future__ import annotations

import hashlib

import pytest
import torch

from rlaif_ray.rollout.checksum import MODULUS, Checksum, checksum


def key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def mixed(name: str, words: int) -> int:
    return ((words + 1) * key(name) % 2**64) >> 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_hand(dtype: torch.dtype) -> None:
    one = {torch.float32: 0x3F800000, torch.bfloat16: 0x3F80}[dtype]
    assert checksum(["a"], [torch.ones(3, dtype=dtype)]) == mixed("a", 3 * one)  # an odd count is summed by element
    bits = 8 * dtype.itemsize
    word = sum(one << shift for shift in range(0, 64, bits))
    assert checksum(["b"], [torch.ones(16, dtype=dtype)]) == mixed("b", 16 * bits // 64 * word)
    assert checksum([], []) == 0
    assert checksum(["c"], [torch.zeros(0, dtype=dtype)]) == mixed("c", 0)


def test_negative_words_and_overflow_by_hand() -> None:
    words = [-(2**63), 2**63 - 1, -5, 2**62]
    assert checksum(["w"], [torch.tensor(words)]) == mixed("w", sum(words))
    many = [f"n{k}" for k in range(40)]
    total = sum(mixed(name, 7) for name in many) % MODULUS
    assert checksum(many, [torch.tensor([7])] * 40) == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_every_single_bit_shows(dtype: torch.dtype) -> None:
    """The highest of eight bytes too, which is a sign: a sum modulo 2^63 of the bare words would lose it."""
    raw = torch.arange(16, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    whole = checksum(["a"], [raw.view(dtype)])
    for byte in range(16):
        for bit in range(1 if dtype == torch.bool else 8):
            changed = raw.clone()
            changed[byte] ^= 1 << bit
            assert checksum(["a"], [changed.view(dtype)]) != whole, (byte, bit)


def test_what_came_twice_or_not_at_all_or_under_another_name() -> None:
    torch.manual_seed(0)
    q, k, zeros = torch.randn(4, 8), torch.randn(4, 8), torch.zeros(4)
    whole = checksum(["q", "k", "z"], [q, k, zeros])
    assert checksum(["q", "k"], [q, k]) != whole
    assert checksum(["q", "k", "z", "z"], [q, k, zeros, zeros]) != whole
    assert checksum(["q", "k", "z"], [k, q, zeros]) != whole
    assert checksum(["z", "q", "k"], [zeros, q, k]) == whole  # order is of no meaning
    in_parts = Checksum()
    in_parts.add("z", zeros)
    assert (in_parts.value() + checksum(["q", "k"], [q, k])) % MODULUS == whole


def test_a_tensor_counts_as_it_is_and_not_as_it_lies() -> None:
    """Learners send parts of flat buffers and transposed views, engines receive them alone."""
    flat = torch.arange(64, dtype=torch.bfloat16)
    part = flat[3:35].view(4, 8)
    assert checksum(["a"], [part]) == checksum(["a"], [part.clone()])
    assert checksum(["a"], [part.T]) == checksum(["a"], [part.T.contiguous()])
    assert checksum(["a"], [torch.nn.Parameter(part)]) == checksum(["a"], [part])
    assert checksum(["a"], [torch.tensor(1.0)]) == mixed("a", 0x3F800000)


def test_a_count_of_names_that_is_not_that_of_tensors() -> None:
    with pytest.raises(ValueError):
        checksum(["a"], [])
