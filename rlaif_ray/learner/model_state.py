"""The model's whole state under its checkpoint's names: the one source of what is pushed, saved and merged.

transformers renames and fuses weights while it loads a checkpoint (the experts of a layer become one tensor), so that
a model's own names are not those that a saved folder has and vLLM reads. What leaves the process goes back by
transformers' own reverse conversion, one layer group at a time. A group is gathered whole under ZeRO-3, converted, and
freed: nobody ever holds a full copy of a sharded model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from rlaif_ray.errors import InputError
from rlaif_ray.learner.engine import full_weights
from rlaif_ray.learner.mixed_precision import has_master, master_of

Metadata = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype, full shape)


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One tensor of the state, under the model's own name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # full
    needs: tuple[Tensor, ...]  # parameters that must be whole while `value` is called
    value: Callable[[], Tensor]
    together: bool = False  # `value` is a collective: every rank calls it


def model_entries(model: torch.nn.Module) -> list[StateEntry]:
    """Parameters and persistent buffers, in the state_dict's order; tied ones once, under the name that is saved."""
    # With `keep_vars` the state_dict has the parameters themselves: their identity tells ties, also under ZeRO-3.
    state = model.state_dict(keep_vars=True)
    copies = set(getattr(model, "all_tied_weights_keys", None) or ())
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    names: dict[int, str] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and name not in left_out and (id(tensor) not in names or name not in copies):
            known = names.get(id(tensor))
            if known is None or known in copies:
                names[id(tensor)] = name
    kept = set(names.values())
    return [tensor_entry(name, state[name]) for name in state if name in kept]


def tensor_entry(name: str, tensor: Tensor) -> StateEntry:
    """A parameter or buffer as it is."""
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    return StateEntry(name, tensor.dtype, shape, (tensor,), lambda: tensor.detach())


def master_entries(entries: Sequence[StateEntry]) -> list[StateEntry]:
    """The same, but of what is trained in bf16 the fp32 weights that the optimizer steps: all that was learned."""
    return [_of_master(e) if len(e.needs) == 1 and has_master(e.needs[0]) else e for e in entries]


def _of_master(entry: StateEntry) -> StateEntry:
    [parameter] = entry.needs
    return replace(entry, dtype=torch.float32, needs=(), value=partial(master_of, parameter), together=True)


def layer_groups(names: Sequence[str]) -> list[list[str]]:
    """Partition of parameter names, in their order, into what is gathered and sent together: what stands before the
    layers, each layer by the outermost number in its names, and what stands after."""

    def layer(name: str) -> tuple[str, ...] | None:
        parts = name.split(".")
        first = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        return None if first is None else tuple(parts[: first + 1])

    return [list(group) for _, group in groupby(names, key=layer)]


class ModelState:
    """The state of a model under checkpoint names, whole, one layer group at a time.

    Follows the contract of vLLM's `WeightSource`: the same names in the same order on every rank, `metadata` without
    a transfer, `gathered` as a collective under ZeRO-3.
    """

    def __init__(self, model: torch.nn.Module, entries: Sequence[StateEntry] | None = None) -> None:
        """`entries` take the place of the model's own where it has adapters to merge (lora.py).

        Raises:
            InputError: what would be pushed and saved is not all of the model.
        """
        self._model = model
        _drop_unused_conversions(model)
        entries = model_entries(model) if entries is None else entries
        by_name = {entry.name: entry for entry in entries}
        groups = [[by_name[name] for name in names] for names in layer_groups(list(by_name))]
        converted = [self._meta(group) for group in groups]
        whole = self._meta(entries)
        if _shapes(whole) != _shapes({name: t for group in converted for name, t in group.items()}):
            groups, converted = [list(entries)], [whole]  # a conversion across layers: all at once
        self._groups = groups
        self._names = [list(group) for group in converted]  # checkpoint names of each group
        self._group_of = {name: k for k, group in enumerate(converted) for name in group}
        self._metadata = [
            (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for group in converted
            for name, tensor in group.items()
        ]
        _require_whole(model, entries, self._metadata)

    def _meta(self, entries: Sequence[StateEntry]) -> dict[str, Tensor]:
        return self._convert({e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries})

    def _convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the model's names and shapes to the checkpoint's, as save_pretrained does."""
        if not hasattr(self._model, "base_model_prefix"):  # no model of transformers
            return tensors
        from transformers.core_model_loading import revert_weight_conversion

        model: Any = self._model
        converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
        return converted

    def metadata(self) -> Metadata:
        """(name, dtype, full shape) of every tensor, tied ones once, in the order of `groups`."""
        return list(self._metadata)

    def groups(self) -> list[list[str]]:
        """The names that are gathered, converted and sent together."""
        return [list(names) for names in self._names]

    @contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[list[Tensor]]:
        """The full tensors of these names, valid inside the context. Ask for whole groups: parts of one are gathered
        with the rest of it. A collective under ZeRO-3: every rank enters with the same names."""
        wanted = sorted({self._group_of[name] for name in names})
        entries = [entry for k in wanted for entry in self._groups[k]]
        with torch.no_grad(), full_weights([t for entry in entries for t in entry.needs], write=False):
            state: dict[str, Tensor] = {}
            for k in wanted:
                state |= self._convert({entry.name: entry.value() for entry in self._groups[k]})
            yield [state[name] for name in names]

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Everything whole, on CPU, gathered group by group; {} where not kept. A collective under ZeRO-3."""
        kept: dict[str, Tensor] = {}
        for names, group in zip(self._names, self._groups, strict=True):
            needs = [tensor for entry in group for tensor in entry.needs]
            with torch.no_grad(), full_weights(needs, write=False):
                values = {entry.name: entry.value() for entry in group if keep or entry.together}
                if keep:
                    state = self._convert(values)
                    kept |= {name: state[name].to("cpu", copy=True).contiguous() for name in names}
        return kept


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _require_whole(model: Any, entries: Sequence[StateEntry], metadata: Metadata) -> None:
    """Raises InputError where a conversion loses numbers, makes some up, or gives them another type.

    That of a checkpoint with quantised weights does: it goes back to packed integers, or leaves weights out, or gives
    those of all layers one name, a pattern.
    """
    own, sent = Counter[str](), Counter[str]()
    for entry in entries:
        own[str(entry.dtype).removeprefix("torch.")] += prod(entry.shape)
    by_name = {name: (dtype, shape) for name, dtype, shape in metadata if re.fullmatch(r"[\w.-]+", name)}
    for dtype, shape in by_name.values():
        sent[dtype] += prod(shape)
    if own != sent:
        name = getattr(model.config, "name_or_path", "") or model.config.model_type
        raise InputError(
            f"model {name} can't be pushed or saved once it is trained: going back to the names of its checkpoint, "
            f"transformers makes {_counted(sent)} out of {_counted(own)}. That is what it does to a checkpoint "
            f"with quantised weights. Train from one with plain weights (bf16 or fp32), or another model."
        )


def _counted(numbers: Counter[str]) -> str:
    return " and ".join(f"{count} numbers in {dtype}" for dtype, count in sorted(numbers.items()))


def _drop_unused_conversions(model: Any) -> None:
    """Forgets conversions that loading didn't need, whose reverse would rename what never was renamed. transformers
    does so itself but under ZeRO-3."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
