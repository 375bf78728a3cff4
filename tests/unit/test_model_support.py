"""What vLLM can't compute is refused by name, with what works instead."""

from __future__ import annotations

import re

import pytest
import transformers
from transformers import (
    ApertusConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    MiniMaxM2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.model_support import LATENT_ATTENTION, LATENT_TYPES, UNSUPPORTED, engine_refusal
from tests.jobs import embedded


def test_a_model_whose_updates_get_lost_may_judge_and_not_be_trained() -> None:
    config = GptOssConfig(num_hidden_layers=1)
    refusal = engine_refusal(config, "cuda")
    assert refusal is not None and "gpt_oss" in refusal and "cluster.device=cpu" in refusal
    assert "can't be used on cluster.device=gpu" in refusal and "full precision" in refusal
    assert engine_refusal(config, "cuda", takes_weights=False) is None
    assert engine_refusal(config, "cpu") is None


def test_latent_attention_is_for_gpus_whatever_the_model_is_called() -> None:
    for config in (DeepseekV2Config(), DeepseekV3Config()):
        refusal = engine_refusal(config, "cpu", takes_weights=False)
        assert refusal is not None and config.model_type in refusal and "cluster.device=gpu" in refusal
        assert engine_refusal(config, "cuda") is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_not_known_is_let_through(device: str) -> None:
    assert engine_refusal(LlamaConfig(), device) is None  # type: ignore[arg-type]


def test_every_entry_says_where_why_and_what_instead() -> None:
    for entry in (*UNSUPPORTED.values(), LATENT_ATTENTION):
        assert entry.devices and entry.reason and entry.instead.endswith(".")


def test_every_setting_that_a_message_names_is_one() -> None:
    """As a user would type it: the config takes it."""
    texts = [f"{entry.reason} {entry.instead}" for entry in (*UNSUPPORTED.values(), LATENT_ATTENTION)]
    for config in (GptOssConfig(num_hidden_layers=1), DeepseekV3Config(), MambaConfig()):
        texts += [engine_refusal(config, device) or "" for device in ("cpu", "cuda")]  # type: ignore[arg-type]
    named = {setting for text in texts for setting in re.findall(r"\b(?:([a-z_]+)\.)?([a-z_]+)=(\w+)", text)}
    assert ("cluster", "device", "gpu") in named
    for section, key, value in named - {("", "VLLM_MLA_DISABLE", "1")}:
        embedded(TrainJob, {section or "policy": {key: value}})  # what has no section is of the model's own


def test_latent_attention_is_where_vllm_uses_it() -> None:
    """vLLM's own list, for every type of transformers whose config has a latent rank."""
    pytest.importorskip("vllm.config")  # before the next: it imports this one while it is imported
    converter = pytest.importorskip("vllm.transformers_utils.model_arch_config_convertor")
    seen = set()
    for kind in transformers.CONFIG_MAPPING.values():
        if "kv_lora_rank" not in {*getattr(kind, "__dataclass_fields__", ()), *vars(kind)}:
            continue
        config = kind().get_text_config()
        if getattr(config, "kv_lora_rank", None) is None:
            continue
        seen.add(config.model_type)
        latent = converter.ModelArchConfigConvertorBase(config, config).is_deepseek_mla()
        assert (engine_refusal(config, "cpu") is not None) == latent, config.model_type
    assert {"deepseek_v2", "deepseek_v3", "minicpm3"} <= seen
    assert engine_refusal(MiniCPM3Config(), "cpu") is None and "minicpm3" not in LATENT_TYPES


def test_apertus_is_off_in_fp32_where_it_would_be_trained() -> None:
    refusal = engine_refusal(ApertusConfig(), "cpu")
    assert refusal is not None and "xIELU" in refusal and "cluster.device=gpu" in refusal
    assert engine_refusal(ApertusConfig(), "cpu", takes_weights=False) is None
    assert engine_refusal(ApertusConfig(), "cuda") is None
    assert engine_refusal(ApertusConfig(), "cpu", precision="bf16") is None


def test_gated_linear_attention_is_in_bf16_on_cpus() -> None:
    """`CPU GDN attention requires BF16`, says vLLM at the first prompt; judges are no exception."""
    for config in (Qwen3NextConfig(), Qwen3_5TextConfig(), Qwen3_5MoeTextConfig()):
        refusal = engine_refusal(config, "cpu", takes_weights=False)
        assert refusal is not None and config.model_type in refusal and "precision=bf16" in refusal
        assert engine_refusal(config, "cpu", precision="fp32") and engine_refusal(config, "cuda") is None
        assert engine_refusal(config, "cpu", precision="bf16") is None


def test_why_apertus_is_off() -> None:
    """Where this fails, vLLM has mended it, and the entry may go."""
    torch = pytest.importorskip("torch")
    activation = pytest.importorskip("vllm.model_executor.layers.activation")
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        made = activation.XIELU()
    assert made.alpha_p.dtype == torch.bfloat16


def test_experts_that_are_not_chosen_by_softmax_need_a_gpu() -> None:
    """vLLM's CPU router asserts `scoring_func == "softmax"` (cpu_router.py)."""
    refusal = engine_refusal(MiniMaxM2Config(), "cpu", takes_weights=False)
    assert refusal is not None and "cluster.device=gpu" in refusal
    assert engine_refusal(MiniMaxM2Config(), "cuda") is None
