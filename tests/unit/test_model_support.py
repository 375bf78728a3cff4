"""What vLLM can't compute is refused by name, with what works instead."""

from __future__ import annotations

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, LlamaConfig

from rlaif_ray.model_support import LATENT_ATTENTION, UNSUPPORTED, engine_refusal


def test_a_model_whose_updates_get_lost_may_judge_and_not_be_trained() -> None:
    config = GptOssConfig(num_hidden_layers=1)
    refusal = engine_refusal(config, "cuda")
    assert refusal is not None and "gpt_oss" in refusal and "cluster.device=cpu" in refusal
    assert engine_refusal(config, "cuda", takes_weights=False) is None
    assert engine_refusal(config, "cpu") is None


def test_latent_attention_is_for_gpus_whatever_the_model_is_called() -> None:
    for config in (DeepseekV2Config(), DeepseekV3Config()):
        refusal = engine_refusal(config, "cpu", takes_weights=False)
        assert refusal is not None and config.model_type in refusal and "cluster.device=cuda" in refusal
        assert engine_refusal(config, "cuda") is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_not_known_is_let_through(device: str) -> None:
    assert engine_refusal(LlamaConfig(), device) is None  # type: ignore[arg-type]


def test_every_entry_says_where_why_and_what_instead() -> None:
    for entry in (*UNSUPPORTED.values(), LATENT_ATTENTION):
        assert entry.devices and entry.reason and entry.instead.endswith(".")
