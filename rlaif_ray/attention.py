"""Which attention computes a model, and whether its samples may be packed into one row.

One choice for policies, critics, references, reward models in training and reward models that score. Two questions:

    kernel    transformers' attn_implementation for padded samples: sdpa where it is known to compute every term of the
              model's attention, else eager, which is transformers' own definition of the model
    packing   right: known; wrong: known, with the reason; unknown: found out once the model is loaded
              (learner/probe.py)

What is known was measured, with tests/benchmarks/zoo_table.py: packed and sdpa against eager on each sample alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlaif_ray.errors import InputError

PACKED = "rlaif_packed"  # name of our attention in transformers' registry (learner/packing.py)


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Model types for which both packed attention and sdpa are right, unless their config has a term of _lost_terms.
PACKABLE = _types(
    "apertus bitnet cohere cohere2 deepseek_v2 deepseek_v3 gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 "
    "glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe llama minicpm3 minimax_m2 ministral ministral3 mistral "
    "mixtral olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen3 qwen3_moe smollm3 starcoder2"
)
# Model types for which sdpa is right on padded samples, while packing is wrong, not possible, or depends on the config:
# the attention of phimoe and qwen2_moe is not told its window, which only their mask has.
SDPA_ONLY = _types(
    "deepseek_v32 doge falcon falcon_h1 granitemoehybrid jamba kimi_linear lfm2 llama4_text minimax nemotron "
    "nemotron_h phimoe qwen2_moe qwen3_5_text qwen3_next recurrent_gemma stablelm zamba2"
)
# Attention-only models whose classes say that they take any attention, and don't.
NOT_PACKABLE = {
    "doge": "its attention makes a mask of its own for each token",
    "gpt_oss": "its attention has sinks",
    "granite_swa": "its attention has sinks",
    "granitemoe_swa": "its attention has sinks",
    "mimo_v2_flash": "its attention has sinks",
    "nemotron": "it does not hand the bounds of samples to its attention",
}
# Layers in which a token sees its sample only by way of causal attention. Others carry a state from sample to sample
# (recurrent, convolution, linear attention) or cut the row by their own rule (chunks).
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the attention of a model is to be computed, as far as its config tells."""

    kernel: str  # attn_implementation for padded samples
    packing: Literal["right", "wrong", "unknown"]
    reason: str = ""  # why packing is wrong; "" where the user chose otherwise
    required: bool = False  # the user asked for packing

    @property
    def implementation(self) -> str:
        """The attn_implementation to load the model with."""
        return PACKED if self.packing == "right" else self.kernel


def plan_attention(requested: str, config: Any, name: str) -> AttentionPlan:
    """The attention of model `name` with this config, where policy.attention is `requested`.

    Raises:
        InputError: the requested one leaves out a part of the model's attention, or mixes samples.
    """
    lost, kernel = _lost_terms(config), padded_kernel(config)
    if requested == "sdpa" and kernel != "sdpa" and (lost or not _class_flag(config, "_supports_sdpa")):
        why = f"sdpa does not compute {lost}" if lost else "its class in transformers has no sdpa"
        raise InputError(
            f"policy.attention=sdpa is wrong for {name} (got model type {config.model_type}): {why}. "
            f"Use policy.attention=auto or eager."
        )
    if requested not in ("auto", "packed"):
        return AttentionPlan(requested, "wrong")
    reason = _never_packed(config)
    if requested == "packed" and reason:
        raise InputError(
            f"policy.attention=packed is wrong for {name} (got model type {config.model_type}): {reason}. "
            f"Use policy.attention=auto, which pads this model's samples."
        )
    packing: Literal["right", "wrong", "unknown"] = "wrong" if reason else "right" if _known(config) else "unknown"
    return AttentionPlan(kernel, packing, reason, required=requested == "packed")


WITHOUT_SPLIT = "Use learner.sequence_parallel=1."


def split_refusal(requested: str, config: Any, ranks: int) -> str | None:
    """Why so many ranks can't compute sequences of a model together (learner.sequence_parallel), and what works; None
    where nothing is known to speak against it: learner/probe.py tries it on the loaded model."""
    if ranks == 1:
        return None
    text, setting = _text(config), f"learner.sequence_parallel={ranks}"
    heads = getattr(text, "num_attention_heads", None)
    keys = getattr(text, "num_key_value_heads", None) or heads
    if isinstance(heads, int) and heads % ranks:
        return f"{setting} must divide its {heads} attention heads. Use a divisor of both heads and learner.ranks."
    if isinstance(keys, int) and keys % ranks and ranks % keys:
        return f"{setting} must divide its {keys} key-value heads, or be a multiple of them. Use another one."
    others = sorted(_layer_kinds(config) - ATTENTION_LAYERS - {"mlp", "moe", "chunked_attention"})
    if others:
        return f"its {' and '.join(others)} layers need whole rows, which {setting} divides. {WITHOUT_SPLIT}"
    only_eager = bool(_never_packed(config)) and padded_kernel(config) == "eager"
    if requested in ("eager", "flash_attention_2") or only_eager:
        kernel = "eager" if only_eager else requested
        return f"{setting} needs packed attention or sdpa, and its attention is to be {kernel}. {WITHOUT_SPLIT}"
    return None


def padded_kernel(config: Any) -> str:
    """The attn_implementation for padded samples that computes every term of the model's attention."""
    known = _known(config) or (_is_transformers_own(config) and _text(config).model_type in SDPA_ONLY)
    return "sdpa" if known and not _lost_terms(config) else "eager"


def longest_exact(config: Any) -> int | None:
    """Tokens up to which other samples of the batch change nothing in a sample; None: any number."""
    return min(_exact_lengths(config).values(), default=None)


def check_length(config: Any, name: str, longest: int) -> None:
    """Raises InputError when samples of `longest` tokens are too long to be computed beside others."""
    for why, exact in _exact_lengths(config).items():
        if longest > exact:
            raise InputError(
                f"samples of {name} must have at most {exact} tokens, {why} (got {longest}). Use shorter ones, or "
                f"another model."
            )


def _exact_lengths(config: Any) -> dict[str, int]:
    """The most tokens of a sample, by what sets that bound."""
    found = {}
    # An index (DeepSeek-V3.2) picks the tokens that attention reads. Where several have the same score, which it picks
    # depends on the width of the batch; up to index_topk tokens it picks all.
    if topk := getattr(_text(config), "index_topk", None):
        why = "its index_topk: beyond, which tokens its attention reads depends on the other samples of the batch"
        found[why] = int(topk)
    # transformers takes the frequencies of "dynamic" RoPE from the longest sample of the batch, and of earlier ones.
    most = getattr(_text(config), "max_position_embeddings", None)
    if most and any("dynamic" in _kind(rope) for rope in _ropes(config)):
        why = "its max_position_embeddings: beyond, its dynamic RoPE depends on the other samples of the batch"
        found[why] = int(most)
    return found


def switch_length(config: Any) -> int | None:
    """Tokens beyond which a sample is computed with other RoPE factors ("longrope", Phi 3 and 4); None: never.

    transformers chooses the factors by the longest sample of a batch, so samples up to this length and longer ones must
    not share one. vLLM chooses them by the context of its engine, for samples of every length.
    """
    text = _text(config)
    lengths = []
    for rope in _ropes(config):
        if _kind(rope) in ("longrope", "su"):
            name = "original_max_position_embeddings"
            lengths.append(getattr(text, name, None) or rope.get(name) or text.max_position_embeddings)
    return min(map(int, lengths), default=None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a model: one dict, or one for each kind of layers."""
    text = _text(config)
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [part for part in found.values() if isinstance(part, dict)]
    return nested or [found]


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _text(config: Any) -> Any:
    return config.get_text_config()


def _is_transformers_own(config: Any) -> bool:
    """Whether transformers itself defines the model: code that comes with a model may reuse a model type's name."""
    return type(config).__module__.startswith("transformers.models.")


def _known(config: Any) -> bool:
    """Whether packing and sdpa were measured for it. Not for a language model inside another one."""
    return _is_transformers_own(config) and _text(config) is config and config.model_type in PACKABLE


def _lost_terms(config: Any) -> str:
    """What this model's attention has that fused kernels leave out; "" for nothing."""
    text = _text(config)
    if any(getattr(text, field, None) for field in ("attn_logit_softcapping", "attn_logit_softcap")):
        return "the soft cap on attention scores"
    if getattr(text, "alibi", False):
        return "the alibi biases"
    return ""


def _never_packed(config: Any) -> str:
    """Why samples of this model can't be packed; "" where they can or nobody knows."""
    text = _text(config)
    others = sorted(_layer_kinds(config) - ATTENTION_LAYERS - {"mlp", "moe"})
    if others:
        return f"{' and '.join(others)} layers mix samples of one row"
    lost = _lost_terms(config)
    if lost:
        return f"packed attention does not compute {lost}"
    if not _is_transformers_own(config):
        return ""
    if text.model_type in NOT_PACKABLE:
        return NOT_PACKABLE[text.model_type]
    if not _class_flag(config, "_supports_attention_backend"):
        return "its class in transformers does not support other attention than its own"
    return ""


def _layer_kinds(config: Any) -> set[str]:
    """Every config may name its layers' kinds in a field of its own: layer_types, block_types, layers_block_type."""
    text = _text(config)
    return {
        kind
        for field in ("layer_types", "block_types", "layers_block_type")
        for kind in getattr(text, field, None) or ()
        if isinstance(kind, str)
    }


def _class_flag(config: Any, flag: str) -> bool:
    """A flag of the model class that transformers has for this config; true where it has none to ask."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return bool(getattr(found[0] if isinstance(found, (list, tuple)) else found, flag))
    return True
