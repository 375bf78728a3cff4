"""What is known of vLLM without starting it: its list of models, and the arguments that a kind of model needs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import transformers

from rlaif_ray.rollout import support
from rlaif_ray.rollout.support import keeps_state, state_arguments, unknown_to_vllm, vllm_architectures
from rlaif_ray.rollout.vllm_engine import EngineSpec, engine_arguments

STATEFUL = [
    ("MambaConfig", {}),
    ("Mamba2Config", {}),
    ("JambaConfig", {}),
    ("FalconH1Config", {}),
    ("Zamba2Config", {}),
    ("NemotronHConfig", {}),
    ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
    ("Qwen3NextConfig", {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}),
    ("GraniteMoeHybridConfig", {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}),
    ("MiniMaxConfig", {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}),
    ("RecurrentGemmaConfig", {}),
    ("RwkvConfig", {}),
]
STATELESS = [
    ("LlamaConfig", {}),
    ("Gemma3TextConfig", {}),
    ("Gemma3Config", {}),  # with eyes: what counts is its text
    ("Llama4TextConfig", {}),
    ("GPT2Config", {}),
    ("Qwen3MoeConfig", {}),
    ("DeepseekV3Config", {}),
    ("GraniteMoeHybridConfig", {"layer_types": ["attention", "attention"], "num_hidden_layers": 2}),
]


def make(name: str, values: dict[str, Any]) -> Any:
    return getattr(transformers, name)(**values)


@pytest.mark.parametrize(("name", "values"), STATEFUL, ids=lambda x: x if isinstance(x, str) else "")
def test_models_that_keep_a_state_share_no_prefixes(name: str, values: dict[str, Any]) -> None:
    config = make(name, values)
    assert keeps_state(config)
    assert engine_arguments(SPEC, config)["enable_prefix_caching"] is False
    assert engine_arguments(SPEC, config) | {"enable_prefix_caching": True} == engine_arguments(SPEC)


@pytest.mark.parametrize(("name", "values"), STATELESS, ids=lambda x: x if isinstance(x, str) else "")
def test_models_of_attention_alone_need_nothing(name: str, values: dict[str, Any]) -> None:
    assert not keeps_state(make(name, values))
    assert state_arguments(make(name, values)) == state_arguments(None) == {}


SPEC = EngineSpec(
    model="x",
    revision=None,
    trust_remote_code=False,
    dtype="float32",
    device="cpu",
    max_context=64,
    tensor_parallel=1,
    gpu_memory_utilization=0.5,
    kv_cache_gb=0.1,
    seed=0,
    threads=1,
    transfer_backend=None,
)


def test_mistral_engines_read_the_tokenizer_that_learner_and_judges_read() -> None:
    config = transformers.MistralConfig()
    assert engine_arguments(SPEC, config)["tokenizer_mode"] == "hf"
    assert "tokenizer_mode" not in engine_arguments(SPEC)


def test_the_users_engine_arguments_win() -> None:
    from dataclasses import replace

    spec = replace(SPEC, engine_kwargs={"enable_prefix_caching": True})
    assert engine_arguments(spec, make("MambaConfig", {}))["enable_prefix_caching"] is True


@pytest.fixture
def no_cache() -> Any:
    vllm_architectures.cache_clear()
    yield
    vllm_architectures.cache_clear()


def test_vllms_list_is_read_without_importing_it() -> None:
    imported = "vllm" in sys.modules
    found = vllm_architectures()
    assert "LlamaForCausalLM" in found["_TEXT_GENERATION_MODELS"]
    assert "Qwen2VLForConditionalGeneration" in found["_MULTIMODAL_MODELS"]
    assert ("vllm" in sys.modules) == imported


@pytest.mark.parametrize(
    ("config", "architecture", "unknown"),
    [
        ("LlamaConfig", "LlamaForCausalLM", False),
        ("JambaConfig", "JambaForCausalLM", False),
        ("SmolLM3Config", "SmolLM3ForCausalLM", False),  # by transformers' code in vLLM
        ("RwkvConfig", "RwkvForCausalLM", True),
        ("xLSTMConfig", "xLSTMForCausalLM", True),
        ("LlamaConfig", "NobodysForCausalLM", True),
        ("LlamaConfig", None, False),  # says nothing of itself
    ],
)
def test_architectures_that_vllm_has_no_code_for(config: str, architecture: str | None, unknown: bool) -> None:
    made = make(config, {"architectures": [architecture] if architecture else None})
    assert unknown_to_vllm(made) is unknown


def test_without_vllm_nothing_is_said(monkeypatch: pytest.MonkeyPatch, no_cache: None) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert vllm_architectures() == {}
    assert not unknown_to_vllm(make("RwkvConfig", {"architectures": ["RwkvForCausalLM"]}))


def test_code_that_comes_with_a_model_may_be_anything() -> None:
    config = make("LlamaConfig", {"architectures": ["NobodysForCausalLM"], "auto_map": {"AutoModelForCausalLM": "x.Y"}})
    assert not unknown_to_vllm(config)
