"""How ragged samples become the rectangular tensors a transformer takes: packed end to end, or padded.

Packed is the default. All samples of a micro-batch stand in one row without a single padding token, and a prompt
that several samples share stands there once: its completions follow it, each attending to the prompt and to itself.
What a dense layer computes falls from S x (P + T) tokens to P + S x T for S samples of one prompt, with the same
numbers (tests/unit/learner/test_packing.py compares both layouts).

Letters: S samples of a micro-batch, N tokens of the packed row, M completion tokens, L longest sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

PACKED = "rlaif_packed"  # name of our attention in transformers' registry


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the packed row whose tokens attend causally to themselves and to all of `prefix`."""

    start: int
    end: int
    prefix_start: int  # prefix_start == prefix_end: none
    prefix_end: int


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where attention may look in the packed row."""

    segments: tuple[Segment, ...]
    keys: Tensor  # (K,) int64: for each segment in turn, the positions of its prefix and its own
    cumulative_queries: Tensor  # (segments + 1,) int32 bounds of the segments in the row
    cumulative_keys: Tensor  # (segments + 1,) int32 bounds in `keys`
    longest_query: int
    longest_key: int


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A micro-batch as a model reads it. In either layout M targets have their logits at `rows`, `columns`."""

    tokens: Tensor  # packed (1, N), padded (S, L): int64
    positions: Tensor | None  # the same shape: position of each token in its sample; None: the model counts
    attention_mask: Tensor | None  # padded (S, L): 1 on tokens; packed: None
    attention: dict[str, Any]  # further arguments of the model's forward
    rows: Tensor  # (M,) row whose hidden state predicts each completion token
    columns: Tensor  # (M,) its column: the token before
    targets: Tensor  # (M,) the completion tokens, samples one after the other


def build_input(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, packed: bool, device: torch.device | str
) -> ModelInput:
    """Lays out S samples; every prompt and completion has at least one token."""
    layout = _packed_input if packed else _padded_input
    return layout(prompts, completions, torch.device(device))


def _packed_input(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device
) -> ModelInput:
    samples_of: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        samples_of.setdefault(tuple(prompt), []).append(i)
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    columns: list[list[int]] = [[] for _ in prompts]
    for prompt, samples in samples_of.items():
        start = len(tokens)
        end = start + len(prompt)
        tokens += prompt
        positions += range(len(prompt))
        segments.append(Segment(start, end, start, start))
        for i in samples:
            own = len(tokens)
            # The last completion token predicts nothing that is trained on, so it is never computed.
            inputs = completions[i][:-1]
            tokens += inputs
            positions += range(len(prompt), len(prompt) + len(inputs))
            columns[i] = [end - 1, *range(own, own + len(inputs))]
            if inputs:
                segments.append(Segment(own, own + len(inputs), start, end))
    flat = [c for sample in columns for c in sample]
    return ModelInput(
        tokens=torch.tensor([tokens], device=device),
        positions=torch.tensor([positions], device=device),
        attention_mask=None,
        attention={"packed_layout": _layout(segments, device)},
        rows=torch.zeros(len(flat), dtype=torch.int64, device=device),
        columns=torch.tensor(flat, device=device),
        targets=torch.tensor([t for c in completions for t in c], device=device),
    )


def _layout(segments: Sequence[Segment], device: torch.device) -> PackedLayout:
    keys: list[int] = []
    key_bounds = [0]
    for s in segments:
        keys += [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        key_bounds.append(len(keys))
    query_bounds = [s.start for s in segments] + [segments[-1].end]
    return PackedLayout(
        segments=tuple(segments),
        keys=torch.tensor(keys, device=device),
        cumulative_queries=torch.tensor(query_bounds, dtype=torch.int32, device=device),
        cumulative_keys=torch.tensor(key_bounds, dtype=torch.int32, device=device),
        longest_query=max(s.end - s.start for s in segments),
        longest_key=max(b - a for a, b in pairwise(key_bounds)),
    )


def _padded_input(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device
) -> ModelInput:
    samples = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([len(s) for s in samples])
    width = int(lengths.max())
    positions = torch.arange(width).expand(len(samples), width)
    columns = [torch.arange(len(p) - 1, len(s) - 1) for p, s in zip(prompts, samples, strict=True)]
    rows = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(c) for c in completions]))
    return ModelInput(
        tokens=torch.tensor([s + [0] * (width - len(s)) for s in samples], device=device),
        positions=positions.contiguous().to(device),
        attention_mask=(positions < lengths[:, None]).long().to(device),
        attention={},
        rows=rows.to(device),
        columns=torch.cat(columns).to(device),
        targets=torch.tensor([t for c in completions for t in c], device=device),
    )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, N, head_dim)
    key: Tensor,  # (1, key-value heads, N, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sample; transformers' attention interface. Returns (1, N, heads, head_dim).

    On GPUs PyTorch's variable-length flash attention, on CPUs one fused call per segment: in both no score between
    two samples is ever computed.
    """
    layout = packed_layout
    assert layout is not None, "the model did not pass the packed layout on to its attention"
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest_key else None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # the fused CPU kernel takes equal head counts only, and so does torch 2.11's on GPUs
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query[0].transpose(0, 1),
            key[0][:, layout.keys].transpose(0, 1),
            value[0][:, layout.keys].transpose(0, 1),
            layout.cumulative_queries,
            layout.cumulative_keys,
            layout.longest_query,
            layout.longest_key,
            scale=scaling,
            # Aligned at the end of queries and keys: a completion's first token sees all of its prompt.
            window_size=(window - 1 if window else -1, 0),
        )
        assert isinstance(out, torch.Tensor)
        return out[None], None
    pieces = []
    for s in layout.segments:
        own = slice(s.start, s.end)
        k, v = key[:, :, own], value[:, :, own]
        prefix = s.prefix_end - s.prefix_start
        if prefix:
            before = slice(s.prefix_start, s.prefix_end)
            k, v = torch.cat([key[:, :, before], k], 2), torch.cat([value[:, :, before], v], 2)
        plain = prefix == 0 and window is None
        pieces.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, own],
                k,
                v,
                attn_mask=None if plain else _visible(s.end - s.start, prefix, window, query.device),
                is_causal=plain,
                scale=scaling,
            )
        )
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


def _visible(length: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """(length, prefix + length) bool, True where a token may look: back to the start, or `window` tokens."""
    distance = torch.arange(prefix, prefix + length, device=device)[:, None] - torch.arange(
        prefix + length, device=device
    )
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def register_packed_attention() -> None:
    """Makes `attn_implementation="rlaif_packed"` known to transformers. Safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    # No mask is built: the layout says all there is to say.
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def choose_attention(requested: str, config: Any) -> str:
    """The attn_implementation for a model: `requested`, or for "auto" packed attention where the model allows it.

    Not for models whose attention has terms that a fused kernel doesn't (soft-capped scores, sinks, biases).
    """
    special = any(getattr(config, name, None) for name in ("attn_logit_softcapping", "attn_logit_softcap"))
    special = special or getattr(config, "model_type", "") in ("gpt_oss", "bloom", "mpt", "falcon")
    if requested == "packed":
        return PACKED
    if requested != "auto":
        return requested
    return "sdpa" if special else PACKED
