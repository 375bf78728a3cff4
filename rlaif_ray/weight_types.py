"""The number types in which a model's weights are stored. What is trained goes back into them.

A run computes in the precision that its device is fast in; a policy given in bf16 is saved in bf16 all the same, half
as large as in fp32 and what engines would make of it anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' and torch's


@dataclass(frozen=True, slots=True)
class WeightTypes:
    """Types by torch's names, such as "bfloat16"."""

    usual: str | None = None  # of most numbers; None: not known
    other: Mapping[str, str] = field(default_factory=dict)  # of single tensors, by name: some stay in fp32

    def of(self, name: str) -> str | None:
        """That of a tensor, by the name that it has in the folder."""
        return self.other.get(name, self.usual)

    @property
    def is_narrow(self) -> bool:
        """Whether fp32 numbers are rounded to be stored."""
        return self.usual in ("float16", "bfloat16")


def stored_types(source: Path | str, config: Any, *, revision: str | None = None) -> WeightTypes:
    """Those of a model in a folder, or on the hub as far as it is in the local cache.

    Weights that are no safetensors are taken to have the type that `config`, transformers' of the model, names.
    """
    from safetensors import safe_open

    sizes: Counter[str] = Counter()
    by_name: dict[str, str] = {}
    for file in sorted(_folder_of(source, revision).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                kind = _NAMES.get(part.get_dtype())
                if kind is not None:
                    by_name[name] = kind
                    sizes[kind] += prod(part.get_shape())
    if not sizes:
        named = getattr(config, "dtype", None)
        return WeightTypes(str(named).removeprefix("torch.") if named is not None else None)
    usual = sizes.most_common(1)[0][0]
    return WeightTypes(usual, {name: kind for name, kind in by_name.items() if kind != usual})


def _folder_of(source: Path | str, revision: str | None) -> Path:
    if isinstance(source, Path):
        return source
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else Path("/nonexistent")


def cast(state: dict[str, torch.Tensor], types: WeightTypes) -> bool:
    """Gives the tensors of a state the types, one by one and in place; False, and nothing done, where a number is too
    large for fp16."""
    import torch

    wanted: dict[str, torch.dtype] = {}
    for name, tensor in state.items():
        kind = types.of(name)
        if kind is not None and tensor.is_floating_point() and tensor.dtype != getattr(torch, kind):
            wanted[name] = getattr(torch, kind)
    largest = torch.finfo(torch.float16).max
    if any(dtype == torch.float16 and state[name].abs().max() > largest for name, dtype in wanted.items()):
        return False
    for name, dtype in wanted.items():
        state[name] = state[name].to(dtype)
    return True
