"""Does vLLM compute the weights that were pushed? `python -m tests.benchmarks.zoo_push [NAME or FOLDER ...]` says.

For each model (those below by default: tiny and random) an engine of ours starts with the weights in its folder. Then
other weights go into it by the learner's own state, sender and receiver, a layer group a message. Log-probabilities
of a fixed text are compared with transformers' (eager attention) on both sets of weights: a gap beyond 1e-3 nats at
load is vLLM's or the config's fault, one that comes with the push is ours. The last column is how far the push moved
them: what a stale engine would be off by.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.tiny import VOCABULARY, make_tokenizer

BOUND = 1e-3  # nats, fp32
CONTEXT = 64
PADDED = VOCABULARY + 10  # no multiple of 64: vLLM pads such a vocabulary, and completes it at the end of an update
WIDTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,  # heads of 32: the smallest that vLLM's CPU attention takes
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Without what these classes don't know: vLLM would read it all the same, and compute another model.
FULL = {name: value for name, value in WIDTH.items() if name != "num_key_value_heads"}
OLD = {"vocab_size": PADDED, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
DEEPSEEK = WIDTH | ROUTED | LATENT | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
# Of LFM2, what vLLM reads and transformers' class does not have; checkpoints do.
CONV = {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 128, "block_multiple_of": 32}
CONV |= {"block_auto_adjust_ff_dim": False, "block_ffn_dim_multiplier": 1.0}
EXPERTLESS = {"num_local_experts": 0, "num_experts_per_tok": 0}
LINEAR = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
# name: (config class, its arguments). Experts, shared heads under several names, buffers, and plain ones beside.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", WIDTH),
    "llama_tied": ("LlamaConfig", WIDTH | {"tie_word_embeddings": True}),
    "qwen3_tied": ("Qwen3Config", WIDTH | {"head_dim": 32, "tie_word_embeddings": True, "vocab_size": PADDED}),
    "gemma": ("GemmaConfig", WIDTH | {"head_dim": 32}),
    "gpt2": ("GPT2Config", OLD),
    "gptj": ("GPTJConfig", OLD | {"rotary_dim": 16}),
    "opt": ("OPTConfig", FULL | {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    "falcon": ("FalconConfig", FULL | {"alibi": False}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", FULL),
    "qwen3_moe": ("Qwen3MoeConfig", WIDTH | ROUTED | {"num_experts": 4, "head_dim": 32}),
    "qwen2_moe": ("Qwen2MoeConfig", WIDTH | ROUTED | {"num_experts": 4, "shared_expert_intermediate_size": 64}),
    "olmoe": ("OlmoeConfig", WIDTH | {"num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", WIDTH | {"num_local_experts": 4, "sliding_window": None}),
    "phimoe": ("PhimoeConfig", WIDTH | {"num_local_experts": 4, "sliding_window": None}),
    "granitemoe": ("GraniteMoeConfig", WIDTH | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", WIDTH | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": ("Glm4MoeConfig", WIDTH | ROUTED | {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 32}),
    "minimax_m2": (
        "MiniMaxM2Config",
        WIDTH
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 32, "scoring_func": "sigmoid"}
        | {"use_routing_bias": True},
    ),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": (
        "DeepseekV3Config",
        DEEPSEEK | {"q_lora_rank": 32, "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc"},
    ),
    "minicpm3": ("MiniCPM3Config", WIDTH | LATENT | {"q_lora_rank": 32}),
    "apertus": ("ApertusConfig", WIDTH),
    "qwen2": ("Qwen2Config", WIDTH),
    "mistral": ("MistralConfig", WIDTH | {"sliding_window": None}),
    "gemma2": ("Gemma2Config", WIDTH | WINDOW | {"query_pre_attn_scalar": 32}),
    "gemma3_text": ("Gemma3TextConfig", WIDTH | WINDOW | {"query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", WIDTH | {"sliding_window": None}),
    "phi": ("PhiConfig", WIDTH),
    "granite": ("GraniteConfig", WIDTH),
    "smollm3": ("SmolLM3Config", WIDTH),
    "olmo2": ("Olmo2Config", WIDTH),
    "olmo3": ("Olmo3Config", WIDTH | WINDOW),
    "cohere": ("CohereConfig", WIDTH),
    "cohere2": ("Cohere2Config", WIDTH | WINDOW),
    "starcoder2": ("Starcoder2Config", WIDTH | {"sliding_window": None}),
    "glm4": ("Glm4Config", WIDTH | {"head_dim": 32}),
    "stablelm": ("StableLmConfig", WIDTH),
    "nemotron": ("NemotronConfig", WIDTH),
    "lfm2": ("Lfm2Config", WIDTH | CONV | {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        WIDTH | MAMBA | EXPERTLESS | {"shared_intermediate_size": 128, "layer_types": ["mamba", "attention"]},
    ),
    "falcon_h1": ("FalconH1Config", WIDTH | MAMBA | {"mamba_d_ssm": 256, "head_dim": 32}),
    "qwen3_next": (
        "Qwen3NextConfig",
        WIDTH
        | ROUTED
        | LINEAR
        | {"num_experts": 4, "head_dim": 32, "shared_expert_intermediate_size": 64}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        WIDTH | LINEAR | {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        WIDTH
        | {"layers_block_type": ["mamba", "attention", "mlp"], "head_dim": 32}
        | {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1},
    ),
}


def make_model(name: str, folder: Path) -> Path:
    """A random fp32 model of the architecture, in a folder of its own below `folder`."""
    import torch
    import transformers

    kind, arguments = ARCHITECTURES[name]
    tokenizer = make_tokenizer(None)
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = getattr(transformers, kind)(**arguments, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    change(model, seed=0)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def measure(folder: Path, context: int = CONTEXT) -> dict[str, Any]:
    """Gaps in nats of one model: "load", "push", "again", "moved"."""
    import torch

    from rlaif_ray.models import load_causal_lm
    from rlaif_ray.rollout.vllm_engine import EngineSpec, VllmEngine

    model = load_causal_lm(folder, dtype=torch.float32, attention="eager").eval()
    vocabulary = model.config.get_text_config().vocab_size
    text = torch.randint(3, vocabulary, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    # All of the learner's first: vLLM's transformers backend changes classes of transformers in its process.
    before = learner_logprobs(model, text)
    change(model)
    after = learner_logprobs(model, text)
    engine = VllmEngine(
        EngineSpec(
            model=str(folder),
            revision=None,
            trust_remote_code=False,
            dtype="float32",
            device="cpu",
            max_context=context,
            tensor_parallel=1,
            gpu_memory_utilization=0.5,
            kv_cache_gb=0.1,
            seed=0,
            threads=1,
            transfer_backend="shm",
            engine_kwargs={"enable_prefix_caching": False},
        )
    )
    try:
        gaps = {"load": gap(engine_logprobs(engine, text), before)}
        push(model, engine)
        gaps["push"] = gap(engine_logprobs(engine, text), after)
        push(model, engine)  # a second one finds the engine as the first left it
        gaps["again"] = gap(engine_logprobs(engine, text), after)
        return gaps | {"moved": gap(before, after)}
    finally:
        close(engine)


def learner_logprobs(model: Any, text: list[int]) -> list[float]:
    """Of each token but the first, by the plain model."""
    import torch

    tokens = torch.tensor([text])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    picked: list[float] = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return picked


def engine_logprobs(engine: Any, text: list[int]) -> list[float]:
    """Of each token but the first, by vLLM."""
    from vllm import SamplingParams

    engine._llm.reset_prefix_cache()
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine._llm.generate([{"prompt_token_ids": text}], [asked], use_tqdm=False)
    return [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)]


def gap(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def change(model: Any, seed: int = 2) -> None:
    """Other weights, and other buffers."""
    import torch

    from rlaif_ray.learner.model_state import model_entries

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for entry in model_entries(model):
            (tensor,) = entry.needs
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def push(model: Any, engine: Any) -> None:
    """As runtime/weight_sync.py does it: two slots by turns, each overwritten while vLLM may still want it."""
    from rlaif_ray.learner.model_state import ModelState
    from rlaif_ray.rollout.buckets import largest, make_buckets
    from rlaif_ray.rollout.checksum import MODULUS, checksum
    from rlaif_ray.rollout.receiving import message_of
    from rlaif_ray.rollout.weight_transfer import ShmSlot

    state, slots, sent = ModelState(model), [ShmSlot(), ShmSlot()], 0
    buckets = make_buckets(state.groups(), state.metadata(), 0)
    paths = [slot.reserve(largest(buckets)) for slot in slots]
    if engine.weight_version < 0:
        engine.init_transfer({})
    engine.start_update()
    for k, bucket in enumerate(buckets):
        with state.gathered(bucket.names) as tensors:
            sent += checksum(bucket.names, tensors)
            slots[k % 2].stage(tensors)
            engine.update(message_of(bucket, [paths[k % 2]]))
    assert engine.finish_update(engine.weight_version + 1) == [sent % MODULUS]
    engine.weight_version = 1
    for slot in slots:
        slot.close()


def close(engine: Any) -> None:
    """Makes room for another engine in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine._llm.llm_engine.engine_core.shutdown()
    engine._llm = None
    cleanup_dist_env_and_memory()


def main(models: list[str]) -> int:
    """A row for each model; 1 when one of them is wrong."""
    wrong = 0
    print("| model | at load | after a push | after another | stale would be |\n|---|---|---|---|---|", flush=True)
    for model in models or ARCHITECTURES:
        name = Path(model).name
        try:
            with TemporaryDirectory(prefix="zoo-") as scratch:
                gaps = measure(Path(model) if Path(model).is_dir() else make_model(name, Path(scratch)))
        except Exception as error:  # whatever it is: the row says it, and the next model has its turn
            print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:300]} | | | |", flush=True)
            wrong += 1
            continue
        wrong += max(gaps["load"], gaps["push"], gaps["again"]) > BOUND
        cells = " | ".join(f"{gaps[key]:.2g}" for key in ("load", "push", "again", "moved"))
        print(f"| {name} | {cells} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
