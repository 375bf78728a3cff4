"""What an update under way has not reached, and what of it waits, by the account that vLLM's layerwise reload keeps.

vLLM itself puts the old weights back where none came, and only logs it ("Failed to load weights"). To be read before an
update is finished: finishing it clears the account. Uses what vLLM 0.28 to 0.33 share.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import layerwise, meta

# Stay on their device during an update, so that a loader may write them past the account.
_UNCOUNTED: Collection[str] = meta.SKIP_TENSORS


def not_loaded(model: nn.Module, besides: Collection[str] = ()) -> list[str]:
    """Parameters that no weight of this update went into, but for those of the modules named in `besides`.

    One that is the same tensor as one of a module that was loaded (an output head tied to the embedding) was loaded.
    """
    missing: dict[str, int] = {}  # name: identity of the tensor that the engine computes with
    loaded: set[int] = set()  # such identities
    for prefix, module in model.named_modules():
        if prefix in besides:
            continue
        info = layerwise.get_layerwise_info(module)
        own = {name: p for name, p in module._parameters.items() if p is not None}
        if not info.can_load():  # it has all it needs, and is back in place
            loaded |= {id(p) for p in own.values()}
            continue
        kept: dict[str, Any] = (info.kernel_tensors or ({}, {}))[0]
        came = {name for name, _ in info.loaded_weights}
        loaded |= {id(kept[name]) for name in came if name in kept}
        if not _waits_for_the_end(module):
            missing |= {
                f"{prefix}.{name}".lstrip("."): id(kept.get(name))
                for name in own
                if name not in came and name not in _UNCOUNTED
            }
    return [name for name, tensor in missing.items() if tensor not in loaded]


def own_what_waits(model: nn.Module, storages: Collection[int]) -> None:
    """Clones what vLLM keeps until a layer is complete (a padded embedding stays so to the end of the update) out of
    memory that the sender will use again; `storages` are the addresses of that memory."""
    for module in model.modules():
        for _, arguments in layerwise.get_layerwise_info(module).loaded_weights:
            for key, value in arguments.arguments.items():
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in storages:
                    arguments.arguments[key] = value.clone()


def _waits_for_the_end(module: nn.Module) -> bool:
    """Whether vLLM completes it as an attention layer: its parameters are scales, which a learner has none of."""
    known: Any = getattr(layerwise, "is_deferred_attention_layer", None)
    if known is not None:
        return bool(known(module))
    from vllm.model_executor.layers.attention import Attention, MLAAttention  # 0.26, of the GPU kit (tests/gpu)

    return isinstance(module, (Attention, MLAAttention))
