"""The number types in which a model's weights are stored. What is trained goes back into them.

A run computes in the precision that its device is fast in; a policy given in bf16 is saved in bf16 all the same, half
as large as in fp32 and what engines would make of it anyway. Small updates in fp32 are lost that way: a run says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.documents import read_json

if TYPE_CHECKING:
    import torch

CHUNK = 2**24  # numbers that are compared at a time: a large embedding has a hundred times as many
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' and torch's
_WIDE = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # bytes of those of more than one


@dataclass(frozen=True, slots=True)
class WeightTypes:
    """Types by torch's names, such as "bfloat16"."""

    usual: str | None = None  # of most numbers; None: not known
    other: Mapping[str, str] = field(default_factory=dict)  # of single tensors, by name: some stay in fp32
    folder: Path | None = field(default=None, compare=False)  # with the weights that were given

    def of(self, name: str) -> str | None:
        """That of a tensor, by the name that it has in the folder."""
        return self.other.get(name, self.usual)

    @property
    def is_narrow(self) -> bool:
        """Whether fp32 numbers are rounded to be stored."""
        return self.usual in ("float16", "bfloat16")

    @property
    def wider_than_bf16(self) -> bool:
        """Whether some of them hold more of a number than bf16 does; not where they are not known."""
        return self.usual is not None and {self.usual, *self.other.values()} != {"bfloat16"}

    def saved_as(self, precision: Literal["auto", "fp32", "bf16"]) -> WeightTypes:
        """Those to save in, given these, where a user asks for that one; tensors in fp32 stay so."""
        if precision == "auto":
            return self
        if precision == "fp32":
            return WeightTypes("float32", folder=self.folder)
        wide = {name: kind for name, kind in self.other.items() if kind == "float32"} if self.is_narrow else {}
        return WeightTypes("bfloat16", wide, self.folder)

    def note(self, name: str, saved: WeightTypes, trained: Literal["fp32", "bf16"]) -> list[str]:
        """What a run says at its start of a policy that was given in these types and goes back into them."""
        if trained != "fp32" or not self.is_narrow or saved != self:
            return []
        return [
            f"{name} was given in {self.usual} and is trained in fp32: what is saved is rounded to {self.usual}, and "
            f"small updates may be lost in that. policy.save_precision=fp32 keeps all of them."
        ]


def stored_types(source: Path | str, config: Any, *, revision: str | None = None) -> WeightTypes:
    """Those of a model in a folder, or on the hub as far as it is in the local cache.

    Where no weights are at hand they are taken to have the type that `config`, transformers' of the model, names; of
    those that can't be looked at it is not known.
    """
    folder = _folder_of(source, revision)
    sizes: Counter[str] = Counter()
    by_name: dict[str, str] = {}
    for file in weight_files(folder):
        for name, (kind, size) in _tensors_in(file).items():
            by_name[name] = kind
            sizes[kind] += size
    if not sizes:
        named = getattr(config, "dtype", None) if not folder.is_dir() else None
        return WeightTypes(str(named).removeprefix("torch.") if named is not None else None)
    usual = sizes.most_common(1)[0][0]
    return WeightTypes(usual, {name: kind for name, kind in by_name.items() if kind != usual}, folder)


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads: beside them others may have the same weights in another form."""
    return [folder / name for name in _listed(folder) if (folder / name).is_file()]


def _tensors_in(file: Path) -> dict[str, tuple[str, int]]:
    """Type and count of numbers of every tensor of floating-point numbers in a file; {} where they can't be read."""
    import torch
    from safetensors import safe_open

    found: dict[str, tuple[str, int]] = {}
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                if (kind := _NAMES.get(part.get_dtype())) is not None:
                    found[name] = kind, prod(part.get_shape())
        return found
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # an old or odd format: transformers may read it all the same
        return {}
    for name, tensor in tensors.items():
        kind = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
        if kind in _NAMES.values():
            found[name] = kind, tensor.numel()
    return found


@dataclass(frozen=True, slots=True)
class Stored:
    """A model's weights as its files have them."""

    floats: int  # numbers of 16 bits and more: who loads them has them in the type that it computes in
    packed: int = 0  # bytes of all others, integers and floats of 8 bits: quantised weights, which stay as they are

    @property
    def is_quantized(self) -> bool:
        """Whether the packed ones are more than a few counters and masks."""
        return self.packed * 10 > self.floats


def stored_weights(
    source: Path | str,
    *,
    revision: str | None = None,
    tied: bool = False,
    dtype: str = "bfloat16",
    online: bool = False,
) -> Stored | None:
    """Counted from the files' headers, in a folder or in the hub's local cache, else with `online` at the hub; None
    where they aren't all there. A head that is `tied` isn't loaded, whether it is stored or not. Numbers in a
    pytorch_model.bin are taken to be of `dtype`."""
    folder = _folder_of(source, revision)
    files = [folder / name for name in _listed(folder)]
    if not files or not all(file.is_file() for file in files):
        return _stored_at_hub(source, revision) if online and isinstance(source, str) else None
    if files[0].suffix != ".safetensors":
        return Stored(sum(file.stat().st_size for file in files) // (4 if dtype == "float32" else 2))
    from safetensors import safe_open

    floats = packed = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                kind, count = weights.get_slice(name).get_dtype(), prod(weights.get_slice(name).get_shape())
                if kind in _NAMES:
                    floats += 0 if tied and name == "lm_head.weight" else count
                else:
                    packed += count * _WIDE.get(kind, 1)
    return Stored(floats, packed)


def _listed(folder: Path) -> list[str]:
    """Names of the files that transformers would load, there or not."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [whole]
        if (folder / f"{whole}.index.json").is_file():
            parts = read_json(folder / f"{whole}.index.json", dict, lenient=True).get("weight_map", {})
            return sorted(set(parts.values()))
    return []


def _stored_at_hub(name: Path | str, revision: str | None) -> Stored | None:
    """From the headers alone, which the hub gives without the weights."""
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(str(name), revision=revision).files_metadata.values()
    except Exception:  # offline, another kind of files, no right to read: whoever loads it says so
        return None
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    floats = sum(tensor.parameter_count for tensor in tensors if tensor.dtype in _NAMES)
    packed = sum(t.data_offsets[1] - t.data_offsets[0] for t in tensors if t.dtype not in _NAMES)
    return Stored(floats, packed)


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
    half = [state[name] for name, dtype in wanted.items() if dtype == torch.float16]
    if any(tensor.numel() and tensor.abs().max() > largest for tensor in half):
        return False
    for name, dtype in wanted.items():
        state[name] = state[name].to(dtype)
    return True


def rounding(state: Mapping[str, torch.Tensor], types: WeightTypes) -> float | None:
    """How far rounding to the types moves a trained state, as a share of how far training moved it: both are norms
    over the tensors that are rounded and were given in the folder. None where there are none.

    Near 1 and above it the model that is saved has little to do with what was trained.
    """
    import torch
    from safetensors import safe_open

    rounded = trained = 0.0
    known = False
    files = weight_files(types.folder) if types.folder is not None else []
    for file in (file for file in files if file.suffix == ".safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor, kind = state.get(name), types.of(name)
                if tensor is None or kind is None or list(tensor.shape) != weights.get_slice(name).get_shape():
                    continue
                if not tensor.is_floating_point() or tensor.dtype == (dtype := getattr(torch, kind)):
                    continue
                known = True
                before = weights.get_tensor(name).flatten().split(CHUNK)
                for now, then in zip(tensor.detach().cpu().flatten().split(CHUNK), before, strict=True):
                    rounded += float((now.to(dtype).float() - now).double().square().sum())
                    trained += float((now - then.float()).double().square().sum())
    if not known:
        return None
    return (rounded / trained) ** 0.5 if trained else 0.0
