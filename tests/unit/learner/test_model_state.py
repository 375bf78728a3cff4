"""What leaves the learner is the whole state under checkpoint names: what is saved loads and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from rlaif_ray.learner.engine import save_model_folder
from rlaif_ray.learner.model_state import ModelState, model_entries
from rlaif_ray.models import load_causal_lm
from tests.tiny import VOCABULARY, make_tokenizer

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# Each with something that is no parameter, or is fused, renamed or tied in transformers and not in its files.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("LlamaConfig", {**BASE, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "qwen3 moe": ("Qwen3MoeConfig", {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "sliding_window": None}),
    "deepseek v3": (
        "DeepseekV3Config",
        {**BASE, **EXPERTS, **LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    "glm4 moe": ("Glm4MoeConfig", {**BASE, **EXPERTS, "first_k_dense_replace": 1}),
    "minimax m2": ("MiniMaxM2Config", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mimo v2": (
        "MiMoV2FlashConfig",
        {**BASE, **EXPERTS, **SLIDING, "v_head_dim": 16, "swa_head_dim": 16, "swa_v_head_dim": 16}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    ),
    "nemotron h": (
        "NemotronHConfig",
        {**BASE, **EXPERTS, "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3}
        | {"mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1}
        | {"moe_shared_expert_intermediate_size": 16},
    ),
    "gemma 4": (
        "Gemma4TextConfig",
        {**BASE, **SLIDING, "global_head_dim": 16, "vocab_size_per_layer_input": VOCABULARY}
        | {"hidden_size_per_layer_input": 8},
    ),
    "apertus": ("ApertusConfig", BASE),
    "minimax": (
        "MiniMaxConfig",
        {**BASE, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "block_size": 8},
    ),
    "gpt oss": ("GptOssConfig", {**BASE, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
BUFFERS = {"apertus", "deepseek v3", "glm4 moe", "minimax m2", "mimo v2", "nemotron h", "gemma 4", "minimax"}
TOKENS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))


def build(name: str, seed: int = 0) -> Any:
    """A model as training leaves it: nothing in it is what its class starts with."""
    kind, arguments = MODELS[name]
    config = getattr(transformers, kind)(**arguments)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for entry in model_entries(model):
            (tensor,) = entry.needs
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    return model


@torch.no_grad()
def logprobs(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.float().log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    model = build(name)
    state = ModelState(model)
    save_model_folder(model, lambda: make_tokenizer(None), state.full_state(keep=True), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
    assert {name: shape for name, _, shape in state.metadata()} == saved
    reference = tmp_path / "reference"
    model.save_pretrained(reference)
    with safe_open(reference / "model.safetensors", framework="pt") as file:
        assert set(saved) == set(file.keys())

    expected = logprobs(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (logprobs(plain) - expected).abs().max() < 1e-5
    ours = load_causal_lm(tmp_path, dtype=torch.float32, attention=model.config._attn_implementation)
    assert (logprobs(ours.eval()) - expected).abs().max() < 1e-5
    sent = [tensor for entry in model_entries(model) for tensor in entry.needs]
    assert any(not isinstance(tensor, torch.nn.Parameter) for tensor in sent) == (name in BUFFERS)


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_layers_and_together_the_state(name: str) -> None:
    state = ModelState(build(name))
    whole = state.full_state(keep=True)
    names = [name for name, _, _ in state.metadata()]
    assert [name for group in state.groups() for name in group] == names == list(whole)
    assert len(state.groups()) >= 3  # two layers and what is around them
    for group, (_, dtype, _) in zip(state.groups(), state.metadata(), strict=False):
        with state.gathered(group) as tensors:
            assert dtype == "float32"
            for key, tensor in zip(group, tensors, strict=True):
                assert torch.equal(tensor, whole[key])
    for key, dtype, shape in state.metadata():
        assert (str(whole[key].dtype), tuple(whole[key].shape)) == (f"torch.{dtype}", shape)
