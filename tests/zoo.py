"""Tiny random models of a few kinds of architecture, built in memory: where attention and layout can go wrong."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 320
WIDTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
HEADS: dict[str, Any] = WIDTH | {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
WINDOW = 4  # tokens; less than any sample has
LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# name: (config class, its arguments)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # attention alone
    "llama": ("LlamaConfig", HEADS),
    "qwen2_window": ("Qwen2Config", WIDTH | LOCAL | {"use_sliding_window": True, "max_window_layers": 1}),
    "deepseek_v3": (
        "DeepseekV3Config",
        WIDTH | EXPERTS | LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "arcee": ("ArceeConfig", HEADS),
    # terms and masks that fused kernels don't have
    "gemma2": ("Gemma2Config", HEADS | LOCAL | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "gpt_oss": ("GptOssConfig", HEADS | LOCAL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon_alibi": (
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 256}),
    "doge": ("DogeConfig", WIDTH),
    "llama4_text": (
        "Llama4TextConfig",
        HEADS
        | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 5, "no_rope_layers": [1, 0]},
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        WIDTH
        | EXPERTS
        | LATENT
        | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
        | {"index_topk": 40, "index_n_heads": 2, "index_head_dim": 16},
    ),
    # classes with attention of their own
    "gptj": (
        "GPTJConfig",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "rotary_dim": 8},
    ),
    "stablelm": ("StableLmConfig", WIDTH),
    "nemotron": ("NemotronConfig", WIDTH),
    # recurrent, convolution and linear-attention layers
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "rwkv": (
        "RwkvConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "num_hidden_layers": 2,
            "context_length": 256,
        },
    ),
    "xlstm": ("xLSTMConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        WIDTH | {"lru_width": 32, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    ),
    "lfm2": ("Lfm2Config", WIDTH | {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        HEADS
        | EXPERTS
        | LINEAR
        | {
            "num_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 32,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        WIDTH
        | MAMBA
        | {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "falcon_h1": ("FalconH1Config", HEADS | MAMBA | {"mamba_d_ssm": 64}),
}


def zoo_config(name: str) -> Any:
    """The architecture's config, with special tokens 0 to 2."""
    import transformers

    kind, fields = ARCHITECTURES[name]
    return getattr(transformers, kind)(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def zoo_model(name: str, attention: str = "eager", auto_class: str = "AutoModelForCausalLM", **fields: Any) -> Any:
    """The model in fp32, the same weights every time, so large that a leak or a missing term shows in tenths."""
    import transformers

    config = zoo_config(name)
    for field, value in fields.items():
        setattr(config, field, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.15 if parameter.ndim > 1 else 0.05)
    model.tie_weights()
    return model.eval()
