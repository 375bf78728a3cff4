"""Low-rank adapters by peft: put into a model's linear layers, and merged into whole weights again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from rlaif_ray.errors import InputError
from rlaif_ray.learner.engine import full_weights

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
    """Every weight whole and on CPU, under the names it had without adapters, with these added in; {} where not kept.

    One layer at a time, a collective under ZeRO-3: all ranks call it.
    """
    state: dict[str, Tensor] = {}
    adapted = dict(_adapted_layers(model))
    for name, layer in adapted.items():
        with torch.no_grad(), full_weights(list(layer.parameters()), write=False):
            if keep:
                weight = layer.base_layer.weight
                # As the layer computes: base weights as they are, the adapter's product in fp32, one rounding.
                delta = layer.get_delta_weight("default").float()
                state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype).cpu()
                if layer.base_layer.bias is not None:
                    state[f"{name}.bias"] = layer.base_layer.bias.detach().cpu().clone()
    for name, parameter in model.named_parameters():
        if not any(name.startswith(f"{layer}.") for layer in adapted):
            with full_weights([parameter], write=False):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
    return state


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
