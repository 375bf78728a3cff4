"""New weights into a vLLM model that runs on CPU, as vLLM's layerwise reload loads them and complete.

The layerwise reload of vLLM 0.32 leaves four things as they were on CPU, each without an error: the packed copy of an
output head that shares its weight with the embedding; the packed experts of a mixture (packed at the first load
alone); parameters that a model's own loader copies into directly rather than through their weight loader (GPT-OSS's
experts and attention sinks, MiMo's sinks); and it keeps views of what it can't process yet, which our segment
overwrites with the next bucket. All are found here by type and identity, not by a model's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload import layerwise as vllm_reload
from vllm.model_executor.model_loader.reload.meta import materialize_layer

from rlaif_ray.errors import StaleWeightsError
from rlaif_ray.rollout.loaded import not_loaded, own_what_waits
from rlaif_ray.rollout.weight_transfer import stale_message

# By bytes an element: integers of that size, and bits that no weight has. As floats they are NaN, but not the one that
# arithmetic gives.
_MARK = {2: (torch.int16, 0x7FA5), 4: (torch.int32, 0x7FA5A5A5), 8: (torch.int64, 0x7FFA5A5A5A5A5A5A)}


class Reload:
    """One update of all weights: make it, `load` any number of times, `finish`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shared = _shared_embeddings(model)  # before the reload, which gives each module a tensor of its own
        methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
        self._kernels = {method: method.moe_kernel for method in methods if getattr(method, "moe_kernel", None)}
        initialize_layerwise_reload(model)
        for method in self._kernels:
            method.moe_kernel = None  # experts are packed where the kernel is built, so it is built again
        self._direct = _by_direct_copies(model)
        self._marked = {prefix: _materialize(module) for prefix, module in self._direct.items()}
        self._loaded: set[str] | None = set()
        self._begun = False  # whether any weight came

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads some of the weights, under checkpoint names. The tensors may be overwritten afterwards."""
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        given = list(weights)
        self._begun = True
        load: Any = self._model.load_weights  # vLLM's models have it, torch's Module does not say so
        with disable_mtp_completeness_check():
            loaded = load(iter(given))
        if loaded is None:
            self._loaded = None  # this model doesn't say
        elif self._loaded is not None:
            self._loaded |= loaded
        own_what_waits(self._model, {tensor.untyped_storage().data_ptr() for _, tensor in given})

    @torch.no_grad()
    def finish(self, model_config: Any) -> None:
        """Makes the new weights current. Where none came, those that were there stay.

        Raises:
            StaleWeightsError: vLLM's loader left parameters as they were.
        """
        stale = not_loaded(self._model, besides=self._direct) + self._not_copied() if self._begun else []
        for prefix, module in self._direct.items():
            info = vllm_reload.get_layerwise_info(module)
            if info.can_load() and (info.load_numel > 0 or self._any_copied(prefix, module)):
                _fill(module, info, self._marked[prefix])
                vllm_reload._layerwise_process(module, info)
        finalize_layerwise_reload(self._model, model_config)  # where nothing came it puts back what was there
        for method, kernel in self._kernels.items():
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        for modules in self._shared:
            for module in modules:
                module.quant_method.process_weights_after_loading(module)
        if stale:
            raise StaleWeightsError(stale_message(type(self._model).__name__, stale))

    def _any_copied(self, prefix: str, module: nn.Module) -> bool:
        marked = self._marked[prefix]
        return any(not bool(_marks(module._parameters[name]).all()) for name in marked)

    def _not_copied(self) -> list[str]:
        """Of the modules that a loader may write by itself, the parameters that it left as they were."""
        found = []
        for prefix, module in self._direct.items():
            if not vllm_reload.get_layerwise_info(module).can_load():
                continue
            for name, parameter in module._parameters.items():
                full = f"{prefix}.{name}".lstrip(".")
                if parameter is None:
                    continue
                if name in self._marked[prefix]:
                    left = bool(_marks(parameter).all())
                else:  # it never left its device: only the loader itself can tell
                    left = self._loaded is not None and full not in self._loaded
                if left:
                    found.append(full)
        return found


def _shared_embeddings(model: nn.Module) -> list[list[Any]]:
    """Embeddings and output heads that are one tensor, together."""
    by_weight: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            by_weight.setdefault(id(module.weight), []).append(module)
    return [modules for modules in by_weight.values() if len(modules) > 1]


def _by_direct_copies(model: nn.Module) -> dict[str, nn.Module]:
    """Modules, by name, whose parameters a model's loader may write without their weight loader, which a tensor on
    the meta device would swallow: those with nothing to process (small: norms, sinks), and GPT-OSS's experts."""
    from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

    experts_too = isinstance(model, GptOssForCausalLM)
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        plain = not isinstance(method, QuantizeMethodBase) and not is_deferred_attention_layer(module)
        if module._parameters and (plain or (experts_too and hasattr(method, "moe_kernel"))):
            found[name] = module
    return found


def _materialize(module: nn.Module) -> set[str]:
    """Real tensors in the place of those on the meta device; buffers, which an update may not have, as they were.

    Returns the names of the parameters that are full of a mark now, by which it shows where nothing was written.
    """
    info = vllm_reload.get_layerwise_info(module)
    absent = [name for name, p in module._parameters.items() if p is not None and p.is_meta]
    materialize_layer(module, info)
    assert info.kernel_tensors is not None
    for name, buffer in info.kernel_tensors[1].items():
        restored = module._buffers.get(name)
        if restored is not None and restored.shape == buffer.shape:
            restored.copy_(buffer)
    marked = set()
    for name in absent:
        parameter = module._parameters[name]
        assert parameter is not None
        if parameter.numel() and parameter.element_size() in _MARK:
            bits, mark = _MARK[parameter.element_size()]
            parameter.data.view(bits).fill_(mark)
            marked.add(name)
    return marked


def _marks(parameter: Any) -> Tensor:
    """Where the mark still is."""
    bits, mark = _MARK[parameter.element_size()]
    marked: Tensor = parameter.data.view(bits) == mark
    return marked


def _fill(module: nn.Module, info: Any, marked: set[str]) -> None:
    """What nothing was written into (padding, or a whole parameter) is as it was; of kernels that pack weights, 0."""
    packs = isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)
    for name in marked:
        parameter = module._parameters[name]
        assert parameter is not None
        marks, old = _marks(parameter), info.kernel_tensors[0].get(name)
        if bool(marks.any()):
            fits = not packs and old is not None and (old.shape, old.dtype) == (parameter.shape, parameter.dtype)
            parameter.data.copy_(torch.where(marks, old.data if fits else torch.zeros_like(parameter.data), parameter))
