"""Low-rank adapters by peft: which layers get them, how they are put in, and how they are merged into whole weights."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from rlaif_ray.errors import InputError
from rlaif_ray.learner.engine import full_weights
from rlaif_ray.learner.mixed_precision import has_master, master_of
from rlaif_ray.learner.model_state import ModelState, StateEntry, master_entries, model_entries

if TYPE_CHECKING:
    from torch import Tensor

    from rlaif_ray.config.data_sections import LoraConfig

ADAPTER = "default"  # peft's name for the only one


# ---- Which layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What adapters are put into. Paths are those of the model without adapters."""

    layers: tuple[str, ...]  # linear layers
    experts: tuple[str, ...]  # weights that hold all experts of a layer: (experts, m, n)
    left_out: Mapping[str, str]  # kinds of other layers with matrices, and why they have no adapters
    trained: int  # parameters, those of a reward head among them
    total: int  # parameters without adapters

    def __str__(self) -> str:
        """What is adapted and what is not, for people."""
        kinds = Counter(_last(path) for path in self.layers)
        kinds.update(f"fused experts' {_last(path)}" for path in self.experts)
        names = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        said = f"adapters on {names}; {self.trained:,} parameters are trained, {self.trained / self.total:.2%} of "
        said += f"{self.total:,}"
        return f"{said}; without adapters: {_spoken(self.left_out)}" if self.left_out else said


def plan_adapters(model: Any, cfg: LoraConfig, name: str, *, sharded: bool) -> AdapterPlan:
    """Which layers of a model get adapters: all that peft adapts and merges exactly, or those in `cfg.targets`.

    Never an output head. No weight is read: `model` may be on the meta device. `sharded`: it is trained with ZeRO-3.

    Raises:
        InputError: a target names no layer or one without adapters, or no layer can have any.
    """
    no_experts = "fused experts take adapters with lora.dropout=0 only" if cfg.dropout > 0 else None
    if sharded:  # peft swaps a weight while the layer runs, and DeepSpeed would not gather it
        no_experts = "fused experts take adapters with learner.zero_stage=2 or less only"
    fits, unfit = _sort_layers(model, no_experts)
    if not fits:
        raise InputError(
            f"model {name} can't be trained with adapters: {type(model).__name__} has no layer that takes them "
            f"(got {_spoken(_by_kind(unfit))}). Leave lora out to train all weights, or use another model."
        )
    if cfg.targets is not None:
        _check_targets(cfg.targets, fits, unfit, name)
        unfit |= {path: "not in lora.targets" for path in fits if not _named(path, cfg.targets)}
        fits = {path: weight for path, weight in fits.items() if _named(path, cfg.targets)}
    shapes = {id(weight): _shape(weight) for weight in fits.values()}  # one that layers share counts once
    adapters = sum(cfg.rank * (shape[0] if len(shape) == 3 else 1) * sum(shape[-2:]) for shape in shapes.values())
    return AdapterPlan(
        layers=tuple(path for path, weight in fits.items() if len(_shape(weight)) == 2),
        experts=tuple(path for path, weight in fits.items() if len(_shape(weight)) == 3),
        left_out=_by_kind(unfit),
        trained=adapters + count_parameters(getattr(model, "score", torch.nn.Identity())),
        total=count_parameters(model),
    )


def _sort_layers(model: Any, no_experts: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that take adapters, by path, and why other matrices don't; embeddings and heads are in neither.

    `no_experts`: why fused experts don't, if they don't.
    """
    fits: dict[str, Tensor] = {}
    unfit: dict[str, str] = {}
    for path, module in _decoder_modules(model):
        weights = {name: weight for name, weight in module.named_parameters(recurse=False) if len(_shape(weight)) > 1}
        if not weights:
            continue
        if _is_linear(module):
            why = _why_unfit(model, path, module)
            if why is None:
                fits[path] = module.weight
            else:
                unfit[path] = why
            continue
        fused = {name for name, weight in weights.items() if len(_shape(weight)) == 3} if _is_experts(module) else set()
        for name, weight in weights.items():
            if name in fused and no_experts is None:
                fits[f"{path}.{name}"] = weight
            elif name in fused:
                unfit[f"{path}.{name}"] = no_experts or ""
            elif not name.endswith("bias"):
                unfit[path] = f"{type(module).__name__} is no linear layer"
    return fits, unfit


def _decoder_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that a language model is made of, by path, without embeddings and heads."""
    body = {id(module) for module in model.get_decoder().modules()}
    inside = body - {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    for path, module in model.named_modules():
        if id(module) in inside and not isinstance(module, torch.nn.Embedding):
            yield path, module


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _is_experts(module: Any) -> bool:
    """Whether its weights of three dimensions have an expert in each row of the first."""
    return isinstance(getattr(module, "num_experts", None), int)


def _why_unfit(model: Any, path: str, module: Any) -> str | None:
    """Why adapters in a linear layer would not be what is merged later; None where they would.

    peft adds to what the layer returns. So the layer must compute a product and nothing else, and nobody may read its
    weight past it, as Mamba's kernels do.
    """
    kind = type(module)
    if kind.__name__ not in ("Linear", "Conv1D", "FalconLinear") and kind.forward is not torch.nn.Linear.forward:
        return f"{kind.__name__} computes more than a linear layer"
    parent, attribute = path.rpartition(".")[::2]
    pattern = rf"\.{attribute}\.weight\b"
    if attribute.isdigit():  # in a list
        parent, attribute = parent.rpartition(".")[::2]
        pattern = rf"\.{attribute}\[[^\]]*\]\.weight\b"
    owner: Any = type(model.get_submodule(parent))
    # Not of slices: those only imitate another machine's rounding (BLOOM's slow_but_exact).
    if re.search(pattern + r"(?!\.(dtype|device|shape|size)|\[)", _source(owner)):
        return f"{owner.__name__} reads its weight itself"
    return None


@cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # none on disk: the trial of the merge still sees what is wrong
        return ""


def _check_targets(targets: Sequence[str], fits: Mapping[str, Any], unfit: Mapping[str, str], name: str) -> None:
    """Raises InputError for targets that name no layer, or only such as have no adapters."""
    for target in targets:
        if any(_named(path, [target]) for path in fits):
            continue
        why = next((why for path, why in unfit.items() if _named(path, [target])), None)
        if why is not None:
            raise InputError(
                f"lora.targets must name layers that take adapters (got {target} of model {name}: {why}). Leave it out."
            )
        known = sorted({_last(path) for path in fits})
        ends = {".".join(path.split(".")[-k:]) for path in fits for k in range(1, path.count(".") + 2)}
        near = difflib.get_close_matches(target, sorted(ends), n=3) or known
        raise InputError(
            f"lora.targets must name linear layers of model {name} by the end of their path (got {target}): no layer's "
            f"path ends so. The nearest: {', '.join(near)}. Choose among {', '.join(known)}, or leave it out for all."
        )


def _named(path: str, targets: Sequence[str]) -> bool:
    """Whether a target is the end of a path; that of a fused weight may be named by its layer, `experts`."""
    layer = path.rpartition(".")[0]
    ends = [path, layer] if layer.endswith(".experts") else [path]
    return any(end == target or end.endswith(f".{target}") for end in ends for target in targets)


def _by_kind(unfit: Mapping[str, str]) -> dict[str, str]:
    """Paths without their numbers, of which the last two names stay."""
    return {".".join(re.sub(r"\.\d+(?=\.|$)", "", path).split(".")[-2:]): why for path, why in unfit.items()}


def _spoken(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{kind} ({why})" for kind, why in left_out.items()) or "none at all"


def _last(path: str) -> str:
    """The last name of a path that is no number."""
    return next(name for name in reversed(path.split(".")) if not name.isdigit())


def _shape(weight: Tensor) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))  # ZeRO-3 leaves an empty tensor


# ---- Putting them in -------------------------------------------------------------------------------------------------


def add_adapters(model: Any, cfg: LoraConfig, seed: int, name: str) -> AdapterPlan:
    """Puts adapters into a model and freezes its own weights, except for a reward head.

    The model's class doesn't change. An adapter adds alpha / rank * B A x, B zero at first (Hu et al. 2106.09685,
    section 4.1). Layers that share a weight share its adapter.

    Raises:
        InputError: as `plan_adapters`.
    """
    from peft import LoraConfig as Adapters
    from peft import inject_adapter_in_model

    plan = plan_adapters(model, cfg, name, sharded=any(hasattr(p, "ds_id") for p in model.parameters()))
    # peft rewrites targets by the type of a transformers model (experts that it knows by their old names). The plan is
    # by path and needs no rewriting, so peft sees a module without a config.
    shell = torch.nn.Module()
    shell.model = model
    torch.manual_seed(seed)  # the same adapters on every rank, whatever was drawn while the model was loaded
    adapters = Adapters(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=[f"model.{path}" for path in plan.layers],
        target_parameters=[f"model.{path}" for path in plan.experts],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that GPT-2 keeps its weights transposed
        inject_adapter_in_model(adapters, shell, ADAPTER)
    found = {path.replace(".base_layer", "") for path, layer in _adapted_layers(model)}
    assert found == {*plan.layers, *(path.rpartition(".")[0] for path in plan.experts)}, "peft adapted other layers"
    _share_adapters(model)
    for parameter in getattr(model, "score", torch.nn.Identity()).parameters():
        parameter.requires_grad_(True)
    return plan


def _share_adapters(model: Any) -> None:
    first: dict[int, Any] = {}
    for _, layer in _adapted_layers(model):
        other = first.setdefault(id(_weight(layer)), layer)
        layer.lora_A, layer.lora_B = other.lora_A, other.lora_B


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's layers by path. An expert layer is one in another, for each of its weights."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _weight(layer: Any) -> Tensor:
    """What an adapter of peft's is added to."""
    weight: Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    return weight


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """As the layer computes: base weights as they are, the adapter's product in fp32, one rounding."""
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    return (weight.float() + delta.float()).to(weight.dtype)


# ---- Merging ---------------------------------------------------------------------------------------------------------


def merged_state(model: Any, *, keep: bool, masters: bool = False) -> dict[str, Tensor]:
    """The whole state on CPU, under its checkpoint's names, with adapters added in; {} where not kept.

    One layer group at a time, a collective under ZeRO-3 and of masters: all ranks call it.
    """
    return ModelState(model, merged_entries(model, masters=masters)).full_state(keep=keep)


def merged_entries(model: Any, *, masters: bool = False) -> list[StateEntry]:
    """The model's state under the names that it had without adapters, each weight with its adapter added in.

    With `masters` what was trained in bf16, adapters too, is taken from the fp32 weights that the optimizer steps, and
    what adapters are added to is not rounded.
    """
    layers = dict(_adapted_layers(model))
    adapted = {id(_weight(layer)): layer for layer in layers.values()}
    adapters = {id(factor) for layer in layers.values() for factor in _factors(layer)}
    entries = []
    for entry in model_entries(model):
        [tensor] = entry.needs
        if id(tensor) not in adapters:
            named = replace(entry, name=_own_name(entry.name, layers))
            layer = adapted.get(id(tensor))
            entries.append(named if layer is None else _merged_entry(named, layer, masters=masters))
    return master_entries(entries) if masters else entries


def _merged_entry(base: StateEntry, layer: Any, *, masters: bool) -> StateEntry:
    if masters and all(map(has_master, _factors(layer))):

        def value() -> Tensor:
            with _masters(layer):
                delta: Tensor = layer.get_delta_weight(ADAPTER)
                return base.value().float() + delta.float()

        return replace(base, dtype=torch.float32, value=value, together=True)
    return replace(base, needs=(*base.needs, *_factors(layer)), value=lambda: _merged(layer, base.value()))


@contextmanager
def _masters(layer: Any) -> Iterator[None]:
    """Within it a layer's adapter has the fp32 weights that the optimizer steps. A collective."""
    parts = [layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]]
    before = [part.weight for part in parts]
    whole = [torch.nn.Parameter(master_of(weight), requires_grad=False) for weight in before]
    try:
        for part, weight in zip(parts, whole, strict=True):
            part._parameters["weight"] = weight  # past hooks: nobody is to take them for the trained ones
        yield
    finally:
        for part, weight in zip(parts, before, strict=True):
            part._parameters["weight"] = weight


def _own_name(name: str, layers: Mapping[str, Any]) -> str:
    """A parameter's name without what peft put into its path."""
    for path in sorted(layers, key=len, reverse=True):  # the inner one of an expert layer first
        if name.startswith(f"{path}.base_layer."):
            name = path + name.removeprefix(f"{path}.base_layer")
    return name


def try_merge(model: Any, run: Callable[[], Tensor], name: str, *, seed: int) -> None:
    """Merges before anything is trained, so that nothing fails when the model is saved.

    One layer of each kind gets a random adapter; then these are merged into the weights, and `run()`, the model's
    output, must stay the same. All is put back. Three short forward passes; a collective under ZeRO-3.

    Raises:
        InputError: the merged model computes something else, or the model doesn't run with adapters.
    """
    chosen: dict[str, Any] = {}
    for path, layer in _adapted_layers(model):
        chosen.setdefault(re.sub(r"\.\d+(?=\.|$)", "", path), layer)
    try:
        if not _merge_differs(list(chosen.values()), run, seed):
            return
        wrong = [path for path, layer in chosen.items() if _merge_differs([layer], run, seed)]
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"model {name} can't be trained with adapters: {type(model).__name__} fails with them "
            f"(got {type(error).__name__}: {error}). {_REMEDY}"
        ) from error
    kinds = sorted({_last(path.replace(".base_layer", "")) for path in wrong or chosen})
    raise InputError(
        f"model {name} can't be trained with adapters: merged into the weights of {type(model).__name__} they compute "
        f"something else (got other outputs with adapters on {', '.join(kinds)}). {_REMEDY}"
    )


_REMEDY = "Name other layers in lora.targets, or leave lora out to train all weights."


@torch.no_grad()
def _merge_differs(layers: Sequence[Any], run: Callable[[], Tensor], seed: int) -> bool:
    """Whether merging random adapters of these layers changes what `run` gives; B is zero before and after."""
    plain = run()
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        b = _factors(layer)[1]
        with full_weights([b]):
            # As large as a usual weight: with A's own spread, sqrt(1 / 3m), the product's is about that.
            spread = 1 / (layer.scaling[ADAPTER] * layer.r[ADAPTER] ** 0.5)
            b.copy_(torch.randn(b.shape, generator=generator) * spread)
    adapted = run()
    before: list[Tensor] = []
    for layer in layers:
        weight, (_, b) = _weight(layer), _factors(layer)
        with full_weights([weight, *_factors(layer)]):
            before.append(weight.detach().clone())
            weight.copy_(_merged(layer, weight))
            b.zero_()
    merged = run()
    for layer, weight in zip(layers, before, strict=True):
        with full_weights([_weight(layer)]):
            _weight(layer).copy_(weight)
    gap, effect = (float((adapted - other).double().pow(2).mean().sqrt()) for other in (merged, plain))
    # Rounding of bf16 weights grows over the layers; what is merged wrongly is off by as much as adapters change.
    bound = 0.02 if _weight(layers[0]).dtype == torch.float32 else 0.5
    return not gap <= bound * effect + 1e-6


def count_parameters(model: torch.nn.Module) -> int:
    """The number of parameters: tied ones once, and those DeepSpeed ZeRO-3 has sharded (empty here) in full."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
