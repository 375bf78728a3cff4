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
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from rlaif_ray.errors import StaleWeightsError
from rlaif_ray.rollout.loaded import not_loaded
from rlaif_ray.rollout.reload import Reload
from rlaif_ray.rollout.vllm_engine import EngineSpec, VllmEngine
from rlaif_ray.rollout.weight_transfer import additive_checksum
from rlaif_ray.rollout.worker_extension import WorkerExtension
from rlaif_ray.runtime.weight_sync import differs

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


# ---- vLLM's own transports, as engines on GPUs have them -------------------------------------------------------------


class Transport:
    """Of vLLM's IPC and NCCL engines: what begins, fills and ends an update (ipc_engine.py)."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, CONFIG)


class Worker(WorkerExtension):
    def __init__(self, model: nn.Module) -> None:
        self.weight_transfer_engine = Transport(model)
        self.model_runner = SimpleNamespace(model=model)


class Llm:
    """Of vLLM's `LLM`: passes everything on to its workers."""

    def __init__(self, *models: nn.Module) -> None:
        self.workers = [Worker(model) for model in models]
        self.weights: list[tuple[str, Tensor]] = []

    def start_weight_update(self) -> None:
        for worker in self.workers:
            worker.weight_transfer_engine.start_weight_update()

    def update_weights(self, request: dict[str, Any]) -> None:
        for worker in self.workers:
            worker.model_runner.model.load_weights(iter(self.weights))

    def finish_weight_update(self) -> None:
        for worker in self.workers:
            worker.weight_transfer_engine.finish_weight_update()

    def reset_prefix_cache(self) -> None: ...

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, name)(*args) for worker in self.workers]


def engine_of(*models: nn.Module, keeps_bits: bool = True) -> VllmEngine:
    spec = EngineSpec("m", None, False, "bfloat16", "cuda", 64, len(models), 0.4, 1.0, 0, 1, "ipc")
    made: Any = VllmEngine.__new__(VllmEngine)
    made._llm, made._spec, made._broken, made._asleep, made.busy_since = Llm(*models), spec, None, set(), None
    made._keeps_bits, made._sent = keeps_bits, set()
    engine: VllmEngine = made
    return engine


def pushed(engine: VllmEngine, weights: list[tuple[str, Tensor]]) -> list[int | None]:
    engine.start_update()
    engine._llm.weights = weights  # type: ignore[attr-defined]
    engine.update({"dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in weights]})
    return engine.finish_update(1)


class Counted(Model):
    """Everything goes through weight loaders but the sinks, which a tensor on the meta device swallows."""

    def _make(self) -> None:
        super()._make()
        del self.attn
        self.head = Leaf(processed=True, weight=6)
        self.head.weight = self.proj.weight  # tied: a learner sends it once
        record_metadata_for_reloading(self)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_tells_what_an_update_has_not_reached(workers: int) -> None:
    models = [Counted() for _ in range(workers)]
    engine = engine_of(*models)
    weights = new(models[0])
    assert len(pushed(engine, weights)) == workers  # the tied head is not sent, and not missing
    engine = engine_of(*models)
    with pytest.raises(StaleWeightsError, match=r"m did not take 1 of .*first norm\.weight"):
        pushed(engine, [pair for pair in weights if pair[0] != "norm.weight"])
    # Outside of an update, and in one of nothing, nothing is missing.
    assert engine_of(*models)._llm.collective_rpc("not_loaded") == [[]] * workers
    engine = engine_of(*models)
    engine.start_update()
    engine.finish_update(1)


def test_what_the_models_own_loader_copies_is_lost_there_and_noticed() -> None:
    """The weights of GPT-OSS's sinks go to the meta device; vLLM puts the old ones back."""
    model = Model()
    engine = engine_of(model)
    with pytest.raises(StaleWeightsError, match=r"first attn\.sinks"):
        pushed(engine, new(model))
    assert set(model.attn.sinks.tolist()) == {1.0}


def test_a_parameter_beside_a_loaded_one_is_missing_too() -> None:
    class Experts(Model):
        def _make(self) -> None:
            self.moe = Leaf(processed=True, w13=8, w2=4)
            record_metadata_for_reloading(self)

    model = Experts()
    initialize_layerwise_reload(model)
    model.load_weights(iter([("moe.w13", torch.full((8,), 7.0))]))
    assert not_loaded(model) == ["moe.w2"]


class Decays(Model):
    """As vLLM's linear attention: A is -exp(A_log), in fp32 (mamba_mixer2.py)."""

    dtype = torch.float32

    def _make(self) -> None:
        super()._make()
        del self.attn
        self.mixer = Leaf(A=4)

        def load(param: Tensor, weight: Tensor) -> None:
            param.data.copy_(-torch.exp(weight.float()))

        self.mixer.A.weight_loader = load  # type: ignore[attr-defined, unused-ignore]
        for leaf in (self.proj, self.norm):
            leaf.to(self.dtype)
        record_metadata_for_reloading(self)


class DecaysBf16(Decays):
    dtype = torch.bfloat16


@pytest.mark.parametrize("kind", [Decays, DecaysBf16])
@pytest.mark.parametrize("keeps_bits", [True, False])
def test_weights_that_vllm_keeps_in_another_form_are_no_stale_ones(kind: Any, keeps_bits: bool) -> None:
    model = kind()
    weights = [(name, tensor.to(kind.dtype)) for name, tensor in new(model, value=0.5)]
    found = pushed(engine_of(model, keeps_bits=keeps_bits), weights)
    assert model.mixer.A.tolist() == pytest.approx([-1.6487212707] * 4)  # -exp(0.5)
    sent = additive_checksum([tensor for _, tensor in weights])
    told = differs(found, sent, received=False, has_buffers=False)
    # In fp32 the type says nothing: there the model's kind must.
    assert told == (kind is Decays and keeps_bits)


def test_weights_that_are_kept_as_sent_are_compared() -> None:
    model = Counted()
    weights = new(model)
    found = pushed(engine_of(model), weights)
    sent = additive_checksum([tensor for _, tensor in weights])
    assert found == [sent]
    assert differs(found, sent ^ 1, received=False, has_buffers=False)
    assert not differs(found, sent ^ 1, received=False, has_buffers=True)
    assert not differs([1, 2], 3, received=False, has_buffers=False) and differs(
        [1, 2], 3, received=True, has_buffers=True
    )


@pytest.mark.parametrize(
    ("kind", "keeps"),
    [("Qwen3NextConfig", False), ("MambaConfig", False), ("Zamba2Config", False), ("LlamaConfig", True), (None, False)],
)
def test_the_engine_knows_which_models_keep_bits(kind: str | None, keeps: bool, monkeypatch: Any) -> None:
    import transformers
    import vllm

    from rlaif_ray.rollout import vllm_engine

    class Started(Exception): ...

    def start(**arguments: Any) -> None:
        raise Started

    config = None if kind is None else getattr(transformers, kind)()
    monkeypatch.setattr(vllm, "LLM", start)
    monkeypatch.setattr(vllm_engine, "_config", lambda spec: config)
    made = VllmEngine.__new__(VllmEngine)
    with pytest.raises(Exception, match="could not start"):
        made.__init__(EngineSpec("m", None, False, "bfloat16", "cuda", 64, 1, 0.4, 1.0, 0, 1, "ipc"))  # type: ignore[misc]
    assert made._keeps_bits is keeps
