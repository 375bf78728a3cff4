"""What a language model is made of, in numbers: parameters and sizes, exactly, without loading it. Pure arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rlaif_ray.documents import read_yaml
from rlaif_ray.errors import InputError
from rlaif_ray.weight_types import Stored

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3", "other"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
# Bits of a weight by method, scales included, where the method alone says it. vLLM makes "fp8" and others of that kind
# of plain weights as it loads them.
QUANTIZED = {"fp8": 8.0, "fbgemm_fp8": 8.0, "deepspeedfp": 8.0, "experts_int8": 8.0, "bitsandbytes": 4.5}
QUANTIZED |= {"fp8_per_tensor": 8.0, "fp8_per_block": 8.0, "fp8_per_channel": 8.0, "int8_per_channel_weight_only": 8.0}
QUANTIZED |= {"mxfp4": 4.25, "mxfp8": 8.25, "nvfp4_per_token": 4.5, "awq": 4.16, "gptq": 4.16}
_SUFFIX = re.compile(r"-(AWQ|GPTQ-Int4|GPTQ-Int8|FP8|FP8-dynamic)$")
_SUFFIX_BITS = {"AWQ": 4 + 20 / 128, "GPTQ-Int4": 4 + 20 / 128, "GPTQ-Int8": 8 + 24 / 128}
_VARIANT = re.compile(r"-(Instruct|it|pt|Base)(?=-v\d|$)")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of one of the FAMILIES; of an "other" one only an engine's memory can be planned."""

    family: Family
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int  # tokens that it can read
    tied: bool = False  # the output head is the embedding
    attention_bias: bool = False  # on q, k, v and o; Qwen2's on q, k and v is its family's
    mlp_bias: bool = False
    other: int = 0  # parameters outside the decoder, such as a vision tower
    window: int = 0  # tokens that some layers see back
    windowed: int = 0  # how many layers those are
    bits: float | None = None  # of a weight of a linear layer, its scales included; None: it isn't quantised
    stored: Stored | None = None  # the weights as files have them, where those are at hand

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> int:
        """Parameters of an output head of its own; 0 where it is the embedding."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """Parameters without an output head: what a critic or a reward model starts from."""
        h, q, kv = self.hidden, self.queries, self.keys
        layer = 2 * h * q + 2 * h * kv + 3 * h * self.intermediate
        layer += h * (4 if self.family == "gemma3" else 2)  # norms
        if self.family in ("qwen3", "gemma3"):
            layer += 2 * self.head_dim  # norms of queries and keys
        if self.attention_bias or self.family == "qwen2":
            layer += q + 2 * kv
        if self.attention_bias:
            layer += h
        if self.mlp_bias:
            layer += 2 * self.intermediate + h
        return self.vocabulary * h + self.layers * layer + h + self.other

    @property
    def parameters(self) -> int:
        """All of the language model's, tied ones once."""
        return self.body + self.head

    def loaded(self, size: int, bits: float | None = None) -> int:
        """Bytes of the weights of an engine that computes in a type of `size` bytes, and which makes those of linear
        layers `bits` wide as it loads. Embedding, head and vision tower are never quantised."""
        if self.stored is not None and self.stored.is_quantized:
            return self.stored.floats * size + self.stored.packed
        count = self.parameters if self.stored is None else self.stored.floats
        bits = bits if self.bits is None else self.bits
        if bits is None:
            return count * size
        whole = self.vocabulary * self.hidden + self.head + self.other
        return whole * size + math.ceil((count - whole) * bits / 8)

    def adapters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """Parameters of low-rank adapters on these linear layers of the body; None: on all of them."""
        h, q, kv, i = self.hidden, self.queries, self.keys, self.intermediate
        ends = {"q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h}
        ends |= {"gate_proj": h + i, "up_proj": h + i, "down_proj": i + h}
        chosen = ends if targets is None else {target.rpartition(".")[2] for target in targets}
        return self.layers * rank * sum(ends[name] for name in chosen if name in ends)


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape in a config as transformers gives it, defaults filled in.

    Raises:
        InputError: of a family that isn't counted here.
    """
    text = config.get("text_config") or config
    kind = str(text.get("model_type")).removesuffix("_text")
    family = next((family for family in FAMILIES if family == kind), None)
    if family is None:
        raise InputError(
            f"model {name} can't be planned: its parameters are counted for {', '.join(FAMILIES)} (got {kind}). "
            f"Say how large it is: --model-params {name}=7e9."
        )
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    vision = config.get("vision_config") if text is not config else None
    return ModelShape(
        family=family,
        layers=int(text["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(text["intermediate_size"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        vocabulary=int(text["vocab_size"]),
        context=int(text["max_position_embeddings"]),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        attention_bias=bool(text.get("attention_bias")),
        mlp_bias=bool(text.get("mlp_bias")),
        other=_vision(vision, hidden) if vision else 0,
        window=int(text.get("sliding_window") or 0) if (windowed := _windowed(text, kind)) else 0,
        windowed=windowed,
        bits=quantized_bits(config),
    )


def other_shape(config: Any, name: str, stored: Stored) -> ModelShape:
    """Of a family that isn't counted here, as far as an engine's memory goes: its weights are as they are `stored`.
    A layer is as wide as what one token computes there: in a mixture of experts, those that it is sent to.

    Args:
        config: the model's, as transformers gives it.

    Raises:
        InputError: its config doesn't say how large it is.
    """
    text = config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    hidden, layers, heads, vocabulary = (getattr(text, key, None) for key in names)
    if not (hidden and layers and heads and vocabulary):
        raise InputError(f"model {name} can't be planned: its config has no {' or '.join(names)}.")
    experts = getattr(text, "num_experts_per_tok", None) or 1
    expert = getattr(text, "moe_intermediate_size", None)
    dense = getattr(text, "intermediate_size", None) or 4 * hidden
    values = text.to_dict()
    return ModelShape(
        family="other",
        layers=layers,
        hidden=hidden,
        intermediate=max(dense, expert * experts) if expert else dense * experts,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocabulary=vocabulary,
        context=getattr(text, "max_position_embeddings", None) or 2**31,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        window=int(values.get("sliding_window") or 0) if (windowed := _windowed(values, str(text.model_type))) else 0,
        windowed=windowed,
        bits=quantized_bits(config.to_dict()),
        stored=stored,
    )


def _windowed(text: Mapping[str, Any], kind: str) -> int:
    """How many layers have a sliding window."""
    types = text.get("layer_types") or ["sliding_attention"] * (
        int(text["num_hidden_layers"]) if kind == "mistral" else 0
    )
    return list(types).count("sliding_attention") if text.get("sliding_window") else 0


def quantized_bits(config: Mapping[str, Any]) -> float | None:
    """Bits of a weight of a linear layer with its share of scales and zero points, where the config says that the
    weights are quantised and how; None otherwise."""
    how = config.get("quantization_config")
    if not isinstance(how, Mapping):
        return None
    part: Mapping[str, Any] = how
    for group in (how.get("config_groups") or {}).values():  # compressed-tensors: of the first group
        part = group.get("weights") or how
        break
    bits = next((part[key] for key in ("num_bits", "bits", "w_bit") if isinstance(part.get(key), int)), None)
    size = next((part[key] for key in ("group_size", "q_group_size") if isinstance(part.get(key), int)), 0)
    if bits is not None:
        return float(bits + ((16 + bits) / size if size > 0 else 0))
    if how.get("load_in_8bit"):
        return 8.0
    return QUANTIZED.get(str(how.get("quant_method")))


def _vision(config: Mapping[str, Any], hidden: int) -> int:
    """Parameters of Gemma 3's SigLIP tower and of the projection into the decoder."""
    d, i = int(config["hidden_size"]), int(config["intermediate_size"])
    patches = (int(config["image_size"]) // int(config["patch_size"])) ** 2
    layer = 4 * (d * d + d) + (2 * d * i + i + d) + 4 * d
    embedding = 3 * int(config["patch_size"]) ** 2 * d + d + patches * d
    return embedding + int(config["num_hidden_layers"]) * layer + 2 * d + d * hidden + d


def known_shape(name: str) -> ModelShape | None:
    """The shape of a well-known model by its name on the hub, quantised where that says so; None for others."""
    plain = _SUFFIX.sub("", name)
    shape = known_shapes().get(_VARIANT.sub("", plain))
    if shape is None or plain == name:
        return shape
    return replace(shape, bits=_SUFFIX_BITS.get(name.removeprefix(f"{plain}-"), 8.0))


@cache
def known_shapes() -> dict[str, ModelShape]:
    """By name on the hub, without -Instruct and the like: model_shapes.yaml."""
    found: dict[str, ModelShape] = {}
    for name, row in read_yaml(Path(__file__).parent / "model_shapes.yaml", dict).items():
        also = row.pop("also", [])
        family, numbers = row.pop("family"), row.pop("shape")
        found |= dict.fromkeys([name, *also], ModelShape(family, *numbers, **row))
    return found


def shape_of_size(parameters: int) -> ModelShape:
    """A model of so many parameters, otherwise like the well-known one nearest in size."""
    near = min(known_shapes().values(), key=lambda shape: abs(shape.parameters - parameters))
    return replace(near, other=near.other + parameters - near.parameters)
