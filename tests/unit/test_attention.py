"""The one choice of attention: what each config gets, and which requests are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from rlaif_ray.attention import PACKED, padded_kernel, plan_attention, split_refusal
from rlaif_ray.config.sections import PolicyConfig
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.contexts import check_attention
from tests.zoo import zoo_config


@pytest.mark.parametrize(
    ("name", "kernel", "packing", "reason"),
    [
        ("llama", "sdpa", "right", ""),
        ("qwen2_window", "sdpa", "right", ""),
        ("deepseek_v3", "sdpa", "right", ""),
        ("gpt2", "sdpa", "right", ""),
        ("arcee", "eager", "unknown", ""),
        ("gemma2", "eager", "wrong", "soft cap"),
        ("falcon_alibi", "eager", "wrong", "alibi"),
        ("gpt_oss", "eager", "wrong", "sinks"),
        ("bloom", "eager", "wrong", "its own"),
        ("mpt", "eager", "wrong", "its own"),
        ("gptj", "eager", "wrong", "its own"),
        ("stablelm", "sdpa", "wrong", "its own"),
        ("nemotron", "sdpa", "wrong", "bounds of samples"),
        ("doge", "sdpa", "wrong", "mask"),
        ("llama4_text", "sdpa", "wrong", "chunked_attention layers"),
        ("mamba", "eager", "wrong", "linear_attention layers"),
        ("recurrent_gemma", "sdpa", "wrong", "recurrent layers"),
        ("lfm2", "sdpa", "wrong", "conv layers"),
        ("qwen3_next", "sdpa", "wrong", "linear_attention layers"),
        ("falcon_h1", "sdpa", "wrong", "hybrid layers"),
    ],
)
def test_auto(name: str, kernel: str, packing: str, reason: str) -> None:
    plan = plan_attention("auto", zoo_config(name), name)
    assert (plan.kernel, plan.packing) == (kernel, packing)
    assert reason in plan.reason and bool(plan.reason) == bool(reason)
    assert plan.implementation == (PACKED if packing == "right" else kernel)
    assert padded_kernel(zoo_config(name)) == kernel  # what a scoring reward model gets


@pytest.mark.parametrize(
    ("name", "heads", "keys", "ranks", "why"),
    [
        ("llama", 32, 8, 4, None),
        ("llama", 32, 8, 16, None),  # each rank a key-value head that another one has as well
        ("llama", 32, 8, 3, "sequence_parallel=3 must divide its 32 attention heads"),
        ("llama", 24, 8, 12, "sequence_parallel=12 must divide its 8 key-value heads, or be a multiple"),
        ("gpt2", None, None, 2, None),
        ("gpt2", None, None, 4, "must divide its 2 attention heads"),
        ("arcee", None, None, 2, None),  # found out once it is loaded
        ("llama4_text", None, None, 2, None),
        ("gemma2", None, None, 2, "its attention is to be eager"),
        ("lfm2", None, None, 2, "its conv layers need whole rows"),
        ("mamba", None, None, 2, "its linear_attention layers need whole rows"),
        ("granitemoehybrid", None, None, 2, "its linear_attention layers need whole rows"),
        ("mamba", None, None, 1, None),
    ],
)
def test_whose_sequences_ranks_can_share(
    name: str, heads: int | None, keys: int | None, ranks: int, why: str | None
) -> None:
    config = zoo_config(name)
    if heads is not None:
        config.num_attention_heads, config.num_key_value_heads = heads, keys
    found = split_refusal("auto", config, ranks)
    assert found == why if why is None else why in str(found)


@pytest.mark.parametrize("requested", ["eager", "flash_attention_2"])
def test_other_attention_asked_for_is_not_shared(requested: str) -> None:
    assert split_refusal("sdpa", zoo_config("llama"), 2) is None
    told = str(split_refusal(requested, zoo_config("llama"), 2))
    assert "needs packed attention or sdpa" in told and f"is to be {requested}" in told
    assert split_refusal("eager", zoo_config("llama"), 1) is None


def test_a_term_that_the_config_switches_off_costs_nothing() -> None:
    config = zoo_config("gemma2")
    config.attn_logit_softcapping = None
    assert plan_attention("auto", config, "x").implementation == PACKED
    config = zoo_config("falcon_alibi")
    config.alibi = False
    assert padded_kernel(config) == "sdpa"


def test_code_that_comes_with_a_model_is_not_known_by_its_model_type() -> None:
    class LlamaConfig(PreTrainedConfig):
        model_type = "llama"

    plan = plan_attention("auto", LlamaConfig(), "x")
    assert (plan.kernel, plan.packing) == ("eager", "unknown")


def test_a_language_model_inside_another_is_not_taken_for_one_alone() -> None:
    config = AutoConfig.for_model("gemma3")
    assert plan_attention("auto", config, "x").packing == "unknown"


@pytest.mark.parametrize("requested", ["sdpa", "eager", "flash_attention_2"])
def test_another_attention_is_taken_as_asked_for(requested: str) -> None:
    plan = plan_attention(requested, zoo_config("llama"), "x")
    assert (plan.implementation, plan.packing, plan.reason) == (requested, "wrong", "")


@pytest.mark.parametrize(
    ("requested", "name", "why"),
    [
        ("packed", "gemma2", "soft cap"),
        ("packed", "gpt_oss", "sinks"),
        ("packed", "lfm2", "conv layers"),
        ("packed", "mamba", "linear_attention layers"),
        ("packed", "gptj", "its own"),
        ("packed", "llama4_text", "chunked_attention layers"),
        ("sdpa", "gemma2", "soft cap"),
        ("sdpa", "falcon_alibi", "alibi"),
        ("sdpa", "gpt_oss", "no sdpa"),
        ("sdpa", "bloom", "no sdpa"),
    ],
)
def test_what_would_be_wrong_is_refused_before_anything_starts(
    requested: Any, name: str, why: str, tmp_path: Path
) -> None:
    zoo_config(name).save_pretrained(tmp_path)
    policy = PolicyConfig(model=str(tmp_path), attention=requested)
    with pytest.raises(InputError, match=rf"policy\.attention={requested} .*{why}.*policy\.attention=auto"):
        check_attention(policy)


def test_packing_asked_for_is_taken_where_it_may_be_right() -> None:
    assert plan_attention("packed", zoo_config("llama"), "x").implementation == PACKED
    plan = plan_attention("packed", zoo_config("arcee"), "x")
    assert plan.packing == "unknown" and plan.required
