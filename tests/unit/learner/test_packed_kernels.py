"""Which kernel packed attention calls on GPUs, and with what: doubles with the real signatures, on tensors of a CPU.

Nothing here runs on a GPU; tests/gpu/test_packed_attention.py does, where one is at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from rlaif_ray.learner.packing import _flash, build_input, packed_attention
from tests.learner_ranks import random_samples

PROMPTS, COMPLETIONS = random_samples([9, 3], [[4, 1, 6], [8]], seed=1)
HEADS, SIZE = 4, 16


class OnGpu(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


class Kernel:
    """torch's variable-length attention by its documentation, one sequence at a time; keeps its last arguments."""

    def __init__(self) -> None:
        self.called: dict[str, Any] = {}

    def compute(self, query: Tensor, key: Tensor, value: Tensor, **called: Any) -> Tensor:
        self.called = called | {"key_heads": key.shape[1]}
        assert key.shape[1] == query.shape[1] or called.get("enable_gqa")
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        left, right = called["window_size"]
        assert right == 0  # causal
        out = torch.empty_like(query)
        bounds_q, bounds_k = called["cu_seq_q"].tolist(), called["cu_seq_k"].tolist()
        for k in range(len(bounds_q) - 1):
            own, seen = slice(bounds_q[k], bounds_q[k + 1]), slice(bounds_k[k], bounds_k[k + 1])
            queries, keys = own.stop - own.start, seen.stop - seen.start
            assert queries <= called["max_q"] and keys <= called["max_k"]
            scores = torch.einsum("qhd,khd->hqk", query[own], key[seen]) * (called["scale"] or query.shape[-1] ** -0.5)
            back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)  # aligned at the end
            hidden = (back < 0) | ((back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool))
            out[own] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[seen])
        return out


def since_212(kernel: Kernel) -> Callable[..., Tensor]:
    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        given = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k, "max_q": max_q, "max_k": max_k, "scale": scale}
        return kernel.compute(query, key, value, **given, window_size=window_size, enable_gqa=enable_gqa)

    return varlen_attn


def before_212(kernel: Kernel) -> Callable[..., Tensor]:
    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        given = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k, "max_q": max_q, "max_k": max_k, "scale": scale}
        return kernel.compute(query, key, value, **given, window_size=window_size)

    return varlen_attn


VERSIONS = {"since 2.12": since_212, "before 2.12": before_212}


def draw(key_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of the packed row."""
    generator = torch.Generator().manual_seed(0)
    tokens = build_input(PROMPTS, COMPLETIONS, packed=True, device="cpu").tokens.numel()
    heads = (HEADS, key_heads, key_heads)
    return [torch.randn(1, count, tokens, size, generator=generator).to(dtype) for count in heads]


def test_the_doubles_have_torchs_own_arguments() -> None:
    theirs = inspect.signature(varlen.varlen_attn).parameters
    for make in VERSIONS.values():
        for name, parameter in inspect.signature(make(Kernel())).parameters.items():
            if name in theirs or name != "enable_gqa":
                assert parameter.kind == theirs[name].kind, name
                assert parameter.default == theirs[name].default, name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_is_given_what_makes_it_packed_attention(
    version: str, key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(varlen, "varlen_attn", VERSIONS[version](kernel))
    batch = build_input(PROMPTS, COMPLETIONS, packed=True, device="cpu")
    layout = batch.attention["packed_layout"]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, batch.tokens.numel(), SIZE, generator=generator)
        for heads in (HEADS, key_heads, key_heads)
    )
    found = _flash(query, key, value, layout, 0.3, window)
    expected, _ = packed_attention(
        torch.nn.Module(), query, key, value, packed_layout=layout, scaling=0.3, sliding_window=window
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grouped = key_heads < HEADS and version == "since 2.12"
    assert kernel.called["key_heads"] == (key_heads if grouped else HEADS)  # repeated only where it has to be
    assert kernel.called.get("enable_gqa", False) == grouped


@pytest.mark.parametrize(
    ("dtype", "size", "flash"),
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.float32, 64, False),  # variable-length flash kernels take no fp32
        (torch.bfloat16, 512, False),  # nor heads above 256
    ],
)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_what_the_kernel_does_not_take_goes_through_sdpa_on_gpus(
    dtype: torch.dtype, size: int, flash: bool, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(varlen, "varlen_attn", since_212(kernel))
    calls: list[torch.dtype] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.dtype)
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    batch = build_input(PROMPTS, COMPLETIONS, packed=True, device="cpu")
    layout = batch.attention["packed_layout"]
    query, key, value = draw(key_heads, size, dtype)
    on_gpu = (tensor.as_subclass(OnGpu) for tensor in (query, key, value))
    out, _ = packed_attention(torch.nn.Module(), *on_gpu, packed_layout=layout, sliding_window=5)
    assert bool(kernel.called) == flash
    assert calls == ([] if flash else [dtype] * len(layout.segments))
    exact = (tensor.float() for tensor in (query, key, value))
    expected, _ = packed_attention(torch.nn.Module(), *exact, packed_layout=layout, sliding_window=5)
    assert out.dtype == dtype
    rounding = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    torch.testing.assert_close(out.as_subclass(Tensor).float(), expected, **rounding)
