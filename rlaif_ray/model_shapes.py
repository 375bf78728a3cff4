"""What a language model is made of, in numbers: parameters and sizes, exactly, without loading it. Pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rlaif_ray.documents import read_yaml
from rlaif_ray.errors import InputError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
_VARIANT = re.compile(r"-(Instruct|it|pt|Base)(?=-v\d|$)")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of one of the FAMILIES."""

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
    )


def _vision(config: Mapping[str, Any], hidden: int) -> int:
    """Parameters of Gemma 3's SigLIP tower and of the projection into the decoder."""
    d, i = int(config["hidden_size"]), int(config["intermediate_size"])
    patches = (int(config["image_size"]) // int(config["patch_size"])) ** 2
    layer = 4 * (d * d + d) + (2 * d * i + i + d) + 4 * d
    embedding = 3 * int(config["patch_size"]) ** 2 * d + d + patches * d
    return embedding + int(config["num_hidden_layers"]) * layer + 2 * d + d * hidden + d


def known_shape(name: str) -> ModelShape | None:
    """The shape of a well-known model by its name on the hub; None for others."""
    return known_shapes().get(_VARIANT.sub("", name))


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
