"""How ragged samples become the rectangular tensors a transformer takes: packed end to end, or padded.

Packed is the default. All samples of a micro-batch stand in one row without a single padding token, and a prompt
that several samples share stands there once: its completions follow it, each attending to the prompt and to itself.
What a dense layer computes falls from S x (P + T) tokens to P + S x T for S samples of one prompt, with the same
numbers (tests/unit/learner/test_packing.py compares both layouts).

Letters: S samples of a micro-batch, N tokens of the packed row, M completion tokens, L longest sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from rlaif_ray.attention import PACKED, check_length, longest_exact
from rlaif_ray.errors import InputError
from rlaif_ray.learner.sequence_parallel import PADDED, SequencePart, across_ranks, padded_attention, whole_mask

if TYPE_CHECKING:
    from torch import Tensor


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
    positions: Tensor  # the same shape: position of each token in its sample
    attention_mask: Tensor | None  # padded (S, L): 1 on tokens; packed: None
    attention: dict[str, Any]  # further arguments of the model's forward
    rows: Tensor  # (M,) row whose hidden state predicts each completion token
    columns: Tensor  # (M,) its column: the token before
    targets: Tensor  # (M,) the completion tokens, samples one after the other
    part: SequencePart | None = None  # where this is a rank's part of it; tokens, positions and M are that part's alone

    def whole(self, values: Tensor) -> Tensor:
        """(M,) values of all targets of the micro-batch, out of those of this part."""
        return values if self.part is None else self.part.whole(values)


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


# Arguments that transformers' models give every attention and that change nothing of what ours computes.
HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(slots=True)
class Observed:
    """What packed attention was asked for and can't do, in the passes of a probe."""

    problems: set[str] = field(default_factory=set)
    mask_sizes: set[int] = field(default_factory=set)  # windows or chunks that masks were made for, tokens
    windows: set[int] = field(default_factory=set)  # windows that attention was told of

    def problem(self) -> str:
        """Why the model can't be packed; "" for nothing seen."""
        if self.problems:
            return " and ".join(sorted(self.problems))
        untold = sorted(self.mask_sizes - self.windows)
        return f"its masks limit attention to {untold[0]} tokens, and its attention is not told" if untold else ""


_observed: Observed | None = None


@contextmanager
def observed_packing() -> Iterator[Observed]:
    """Inside, packed attention notes what it can't compute rather than raise: a pass that breaks off leaves
    ZeRO-3's weights gathered."""
    global _observed
    _observed = Observed()
    try:
        yield _observed
    finally:
        _observed = None


def _refuse_unknown(
    module: torch.nn.Module, mask: Tensor | None, layout: PackedLayout | None, arguments: Mapping[str, Any]
) -> None:
    """Raises InputError where attention is asked for something that packed attention doesn't compute."""
    unknown = [name for name, value in arguments.items() if not _is_harmless(name, value)]
    if mask is not None:
        unknown.append("attention_mask")
    if getattr(module, "is_causal", True) is False and "is_causal" not in arguments:
        unknown.append("is_causal=False")
    problems = [f"packed attention does not compute {name}" for name in unknown]
    if layout is None:
        problems.append("it does not hand the bounds of samples to its attention")
    if _observed is not None:
        _observed.problems.update(problems)
    elif problems:
        config = getattr(module, "config", None)
        name = getattr(config, "name_or_path", "") or getattr(config, "model_type", "?")
        raise InputError(
            f"samples of model {name} can't be packed (in {type(module).__name__}): {problems[0]}. Its numbers would "
            f"be wrong. Use policy.attention=auto or eager."
        )


def _is_harmless(name: str, value: Any) -> bool:
    """Whether an argument changes nothing of what is computed here: None is a term that this layer doesn't have."""
    if value is None or name in HARMLESS:
        return True
    return bool((name == "dropout" and value == 0.0) or (name == "is_causal" and value is True))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, N, head_dim)
    key: Tensor,  # (1, key-value heads, N, head_dim)
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    packed_layout: PackedLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sample; transformers' attention interface. Returns (1, N, heads, head_dim).

    On GPUs PyTorch's variable-length flash attention where it can, else one fused call per segment: in both no score
    between two samples is ever computed.

    Raises:
        InputError: the model gives an argument that would change the result, and that is not computed here.
    """
    _refuse_unknown(module, attention_mask, packed_layout, arguments)
    layout = packed_layout or _whole_row(query)
    if _observed is not None and sliding_window is not None:
        _observed.windows.add(sliding_window)
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest_key else None
    if _has_flash(query, value):
        return _flash(query, key, value, layout, scaling, window), None
    key, value = _for_each_query_head(query, key, value)  # the fused CPU kernel takes equal head counts only
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


def _for_each_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as queries (grouped-query attention, Ainslie et al. 2305.13245)."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _has_flash(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's variable-length flash attention takes these: half precision, one head size, at most 256.

    fp32 on GPUs goes segment by segment through scaled_dot_product_attention, which has kernels for it.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] == value.shape[-1] <= 256


def _flash(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    """(1, N, heads, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # from torch 2.12 on
            grouped = {"enable_gqa": True}
        else:
            key, value = _for_each_query_head(query, key, value)
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
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def _whole_row(query: Tensor) -> PackedLayout:
    """One segment: for a probe's pass through a model that does not pass the layout on, whose result nobody uses."""
    return _layout([Segment(0, query.shape[2], 0, 0)], query.device)


def _visible(length: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """(length, prefix + length) bool, True where a token may look: back to the start, or `window` tokens."""
    distance = torch.arange(prefix, prefix + length, device=device)[:, None] - torch.arange(
        prefix + length, device=device
    )
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def register_packed_attention() -> None:
    """Makes "rlaif_packed" and "rlaif_padded" known to transformers as attn_implementation. Safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, across_ranks(packed_attention))
    AttentionMaskInterface.register(PACKED, _no_mask)
    AttentionInterface.register(PADDED, across_ranks(padded_attention))
    AttentionMaskInterface.register(PADDED, whole_mask)


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """No mask is built: the layout and each layer's window say all there is to say. `local_size`: the window."""
    if _observed is not None and local_size:  # 0: for layers that the model does not have
        _observed.mask_sizes.add(local_size)


class Arguments:
    """What a model's forward pass takes of a micro-batch: old and recurrent ones know no positions, or no choice of
    logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Of the class: DeepSpeed and hooks put wrappers of their own on the object.
        self._names = set(inspect.signature(type(model).forward).parameters)
        self._config: Any = model.config

    @property
    def choose_logits(self) -> bool:
        """Whether it computes logits only where asked to."""
        return "logits_to_keep" in self._names

    def of(self, batch: ModelInput) -> dict[str, Any]:
        """Keyword arguments. Without positions a padded model counts for itself, from each row's beginning.

        Raises:
            InputError: the model can't compute such samples together.
        """
        if longest_exact(self._config) is not None:
            check_length(self._config, self._config.name_or_path, int(batch.positions.max()) + 1)
        found: dict[str, Any] = {"input_ids": batch.tokens, "attention_mask": batch.attention_mask, "use_cache": False}
        if "position_ids" in self._names:
            found["position_ids"] = batch.positions
        elif batch.attention_mask is None:
            raise InputError("samples can't be packed for a model without position_ids. Use policy.attention=auto.")
        if batch.part is not None:
            found["sequence_part"] = batch.part
        return found | batch.attention
