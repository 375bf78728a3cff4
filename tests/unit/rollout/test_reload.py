"""Weights into a small tree of modules through vLLM's own layerwise reload, without an engine: what comes is there
afterwards, what does not come stays as it was, and an update that left something out says so.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from rlaif_ray.errors import StaleWeightsError
from rlaif_ray.rollout.loaded import not_loaded
from rlaif_ray.rollout.reload import Reload

CONFIG: Any = SimpleNamespace(dtype=torch.float32)


class Method(QuantizeMethodBase):
    """Of a module that has weights to process, as vLLM's linear layers do."""

    moe_kernel: Any = None

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any: ...
    def process_weights_after_loading(self, layer: nn.Module) -> None: ...


class Leaf(nn.Module):
    """Parameters by name; `processed` as linear layers are."""

    def __init__(self, *, processed: bool = False, dtype: torch.dtype = torch.float32, **shapes: int) -> None:
        super().__init__()
        for name, size in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full((size,), 1.0, dtype=dtype), requires_grad=False))
        if processed:
            self.quant_method = Method()


class Model(nn.Module):
    """A projection and a norm, loaded by their weight loaders; sinks, which the model's own loader copies."""

    says = True  # whether `load_weights` returns what it loaded

    def __init__(self) -> None:
        super().__init__()
        self._make()

    def _make(self) -> None:
        self.proj = Leaf(processed=True, weight=6, bias=2)
        self.norm = Leaf(weight=4)
        self.attn = Leaf(sinks=4)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Any) -> set[str] | None:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            parameter = parameters[name]
            if name.endswith("sinks") or "experts" in name:
                parameter.data[: len(tensor)].copy_(tensor)
            else:
                getattr(parameter, "weight_loader", lambda p, w: p.data.copy_(w))(parameter, tensor)
            loaded.add(name)
        return loaded if self.says else None


class Quiet(Model):
    says = False


class GptOss(GptOssForCausalLM):
    """Its experts have weights to process, and are copied into all the same."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.experts = Leaf(processed=True, w13_weight=8, w2_weight=4)
        self.experts.quant_method.moe_kernel = object()
        record_metadata_for_reloading(self)

    load_weights = Model.load_weights
    says = True


def new(model: nn.Module, *without: str, value: float = 7.0) -> list[tuple[str, Tensor]]:
    return [(n, torch.full_like(p, value)) for n, p in model.named_parameters() if n not in without]


def values(model: nn.Module) -> dict[str, list[float]]:
    return {name: p.tolist() for name, p in model.named_parameters()}


def fouled() -> None:
    """Memory that is free now is full of nonsense: what is taken without being filled shows."""
    blocks = [torch.full((size,), 99.0) for size in (2, 4, 6, 8) for _ in range(64)]
    del blocks


@pytest.mark.parametrize("kind", [Model, Quiet, GptOss])
def test_all_that_comes_is_there_in_the_place_of_what_was(kind: Any) -> None:
    model = kind()
    weights, places = new(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    reload = Reload(model)
    for pair in weights:  # each bucket's memory is used again
        reload.load([pair])
        pair[1].fill_(-3.0)
    reload.finish(CONFIG)
    assert all(set(held) == {7.0} for held in values(model).values())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


@pytest.mark.parametrize("kind", [Model, Quiet, GptOss])
def test_an_update_of_nothing_changes_nothing(kind: Any) -> None:
    model = kind()
    before = values(model)
    fouled()
    Reload(model).finish(CONFIG)
    assert values(model) == before


@pytest.mark.parametrize(
    ("kind", "left"),
    [(kind, left) for kind in (Model, Quiet) for left in ("norm.weight", "attn.sinks", "proj.weight")]
    + [(GptOss, "experts.w2_weight")],
)
def test_what_does_not_come_stays_and_is_named(kind: Any, left: str) -> None:
    model = kind()
    weights = new(model, left)
    fouled()
    reload = Reload(model)
    reload.load(weights)
    with pytest.raises(StaleWeightsError, match=rf"did not take 1 of its parameters from an update \(first {left}\)"):
        reload.finish(CONFIG)
    held = values(model)
    assert all(set(held[name]) == {7.0} for name in held if name != left)
    if kind is not GptOss and left != "proj.weight":  # of weights that kernels pack, what was there can't be unpacked
        assert set(held[left]) == {1.0}


def test_padding_is_as_it_was() -> None:
    """Sinks of fewer heads than the parameter has room for."""
    model = Model()
    weights = [*new(model, "attn.sinks"), ("attn.sinks", torch.full((3,), 7.0))]
    fouled()
    reload = Reload(model)
    reload.load(weights)
    reload.finish(CONFIG)
    assert model.attn.sinks.tolist() == [7.0, 7.0, 7.0, 1.0]


def test_a_parameter_beside_a_loaded_one_is_missing_too() -> None:
    class Experts(Model):
        def _make(self) -> None:
            self.moe = Leaf(processed=True, w13=8, w2=4)
            record_metadata_for_reloading(self)

    model = Experts()
    initialize_layerwise_reload(model)
    model.load_weights(iter([("moe.w13", torch.full((8,), 7.0))]))
    assert not_loaded(model) == ["moe.w2"]
