"""Low-rank adapters by peft: put into a model's linear layers, and merged into whole weights again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rlaif_ray.errors import InputError
from rlaif_ray.learner.model_state import ModelState, StateEntry, model_entries

if TYPE_CHECKING:
    from torch import Tensor

    from rlaif_ray.config.data_sections import LoraConfig


def add_adapters(model: Any, cfg: LoraConfig, seed: int) -> None:
    """Puts adapters into the linear layers of the model's body and freezes the body's own weights; a head stays as it
    is and is trained.

    The model's class doesn't change. An adapter adds alpha / rank * B A x, B zero at first (Hu et al. 2106.09685,
    section 4.1).

    Raises:
        InputError: no layer has a name in `cfg.targets`.
    """
    from peft import LoraConfig as Adapters
    from peft import inject_adapter_in_model

    body = model.base_model
    linear = {name.rpartition(".")[2] for name, module in body.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = sorted(set(cfg.targets or ()) - linear)
    if unknown:
        raise InputError(
            f"lora.targets must name linear layers of the model (got {', '.join(unknown)}): no layer's name ends so. "
            f"Choose among {', '.join(sorted(linear))}, or leave it out for all."
        )
    torch.manual_seed(seed)  # the same adapters on every rank, whatever was drawn while the model was loaded
    adapters = Adapters(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=list(cfg.targets or sorted(linear))
    )
    inject_adapter_in_model(adapters, body)


def merged_state(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """The whole state on CPU, under its checkpoint's names, with adapters added in; {} where not kept.

    One layer group at a time, a collective under ZeRO-3: all ranks call it.
    """
    return ModelState(model, merged_entries(model)).full_state(keep=keep)


def merged_entries(model: Any) -> list[StateEntry]:
    """The model's state under the names that it had without adapters, each weight with its adapter added in."""
    adapted = dict(_adapted_layers(model))
    entries = []
    for entry in model_entries(model):
        layer = next((name for name in adapted if entry.name.startswith(f"{name}.")), None)
        if layer is None:
            entries.append(entry)
            continue
        own = entry.name.removeprefix(f"{layer}.")
        if own == "base_layer.weight":
            entries.append(_merged_weight(f"{layer}.weight", entry, adapted[layer]))
        elif own.startswith("base_layer."):
            entries.append(replace(entry, name=f"{layer}.{own.removeprefix('base_layer.')}"))
    return entries


def _merged_weight(name: str, base: StateEntry, layer: Any) -> StateEntry:
    def value() -> Tensor:
        # As the layer computes: base weights as they are, the adapter's product in fp32, one rounding.
        weight, delta = base.value(), layer.get_delta_weight("default").float()
        return (weight.float() + delta).to(weight.dtype)

    return replace(base, name=name, needs=tuple(layer.parameters()), value=value)


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
