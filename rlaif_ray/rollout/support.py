"""What vLLM can run, by a model's config alone, and the engine arguments that a kind of model needs.

vLLM itself is not imported (that takes ten seconds and more): its list of architectures is read from its source.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Layers that keep keys and values, or nothing at all, from token to token. All others keep a state.
_STATELESS = {"attention", "full_attention", "sliding_attention", "chunked_attention", "mlp", "moe", "dense", "sparse"}
_LAYER_FIELDS = ("layer_types", "layers_block_type", "block_types")
# Model types whose config names no kinds of layers.
_STATE_TYPES = {"bamba", "falcon_h1", "falcon_mamba", "jamba", "kimi_linear", "mamba", "mamba2", "nemotron_h", "plamo2"}
_STATE_TYPES |= {"recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"}
# The lists in vLLM's registry whose models write text.
_GENERATING = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")


def keeps_state(config: Any) -> bool:
    """Whether the model has recurrent, convolution or linear-attention layers, from transformers' config."""
    text = config.get_text_config()
    kinds = {kind for field in _LAYER_FIELDS for kind in getattr(text, field, None) or () if isinstance(kind, str)}
    return text.model_type in _STATE_TYPES or not kinds <= _STATELESS


def state_arguments(config: Any | None) -> dict[str, Any]:
    """Engine arguments of a model that keeps a state: vLLM shares no prefixes of it, where prompts aren't computed in
    chunks ("Chunked prefill is required for mamba cache mode 'align'")."""
    return {"enable_prefix_caching": False} if config is not None and keeps_state(config) else {}


@cache
def vllm_architectures() -> dict[str, frozenset[str]]:
    """Architectures by the name of vLLM's list that has them; {} where vLLM isn't here or is laid out otherwise."""
    try:
        spec = find_spec("vllm")
        if spec is None or spec.origin is None:
            return {}
        registry = Path(spec.origin).parent / "model_executor" / "models" / "registry.py"
        tree = ast.parse(registry.read_text())
    except (OSError, SyntaxError, ValueError):
        return {}
    found = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Dict):
            keys = [key.value for key in value.keys if isinstance(key, ast.Constant)]
            found[target.id] = frozenset(str(key) for key in keys)
    return found if all(found.get(name) for name in _GENERATING) else {}


def unknown_to_vllm(config: Any) -> bool:
    """Whether vLLM has no way to run the model: neither code of its own, nor transformers' in its place.

    False where there is no telling: no architecture in the config, code that comes with the model, no vLLM here.
    """
    architectures, known = tuple(config.architectures or ()), vllm_architectures()
    if not architectures or not known or getattr(config, "auto_map", None):
        return False
    if any(name in known[part] for name in architectures for part in _GENERATING):
        return False
    if keeps_state(config):
        return True  # transformers' code gets nothing but attention from vLLM
    import transformers

    classes = [getattr(transformers, name, None) for name in architectures]
    # As vLLM's own test for its "transformers" implementation.
    return not any(c is not None and (c.is_backend_compatible() or c._can_set_attn_implementation()) for c in classes)
