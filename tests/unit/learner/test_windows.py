"""Every model type that is packed without a probe, with a window of a few tokens: packed rightly, or padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlaif_ray.attention import PACKABLE, PACKED, plan_attention
from rlaif_ray.learner.modules import CausalPolicy
from rlaif_ray.learner.packing import build_input
from rlaif_ray.learner.probe import logprobs_of, settle_attention
from tests.learner_ranks import plain_logprobs, random_samples
from tests.zoo import EXPERTS, LATENT, VOCABULARY, WIDTH, WINDOW

# No sample is shorter than the window but one; two share a prompt.
PROMPTS, COMPLETIONS = random_samples([9, 2], [[12, 5], [8]], seed=4)
NOT_TOLD = ("phimoe", "qwen2_moe")  # their masks have the window, their attention is not told
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
MOE = EXPERTS | {"num_experts": 4, "num_local_experts": 4, "shared_expert_intermediate_size": 32}
DEEPSEEK = LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
PER_LAYER = {"head_dim": 16, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 16},
    "gemma3n_text": PER_LAYER
    | {"num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2},
    "gemma4_text": PER_LAYER | {"global_head_dim": 16},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def windowed_config(kind: str) -> Any:
    """A tiny config whose layers have a window of WINDOW tokens, as far as the type knows one."""
    usual = CONFIG_MAPPING[kind]()
    fields = WIDTH | MOE | OWN.get(kind, {})
    if hasattr(usual, "sliding_window"):
        fields |= WINDOWED
    if getattr(usual, "layer_types", None) is not None:
        fields["layer_types"] = ["sliding_attention", "full_attention"]
    return CONFIG_MAPPING[kind](**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize("kind", sorted({*PACKABLE, *NOT_TOLD}))
@torch.no_grad()
def test_a_window_is_kept(kind: str) -> None:
    config = windowed_config(kind)
    plan = plan_attention("auto", config, kind)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=plan.implementation
    ).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.15 if parameter.ndim > 1 else 0.05)
    run = logprobs_of(CausalPolicy(model))
    attention, note = settle_attention(plan, model, run, name=kind, device=torch.device("cpu"), precision="fp32")
    found = run(build_input(PROMPTS, COMPLETIONS, packed=attention == PACKED, device="cpu"))
    model.set_attn_implementation("eager")
    expected = torch.cat(plain_logprobs(model, PROMPTS, COMPLETIONS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if kind in NOT_TOLD:
        assert attention == "sdpa" and f"limit attention to {WINDOW} tokens" in note
    elif kind != "gemma2":  # its soft cap
        assert attention == PACKED
