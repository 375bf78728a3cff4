"""A model that is loaded straight into ZeRO-3 shards is the model that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlaif_ray.learner.engine import RankSpec
from tests.learner_ranks import RankProcesses
from tests.zoo import HEADS, WIDTH, WINDOW, zoo_config

ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 24}
LONG = ROPE | {"rope_type": "longrope", "short_factor": [1.0 + 0.3 * i for i in range(8)], "long_factor": [9.0] * 8}
# Each with buffers of another kind: frequencies (default, scaled, of two kinds of layers), routing biases, decays.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", WIDTH),
    "qwen3": ("Qwen3Config", HEADS),
    "mistral": ("MistralConfig", WIDTH),
    "gemma3": ("Gemma3TextConfig", HEADS | {"sliding_window": WINDOW}),
    "yarn": ("LlamaConfig", WIDTH | {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}}),
    "longrope": ("Phi3Config", WIDTH | {"original_max_position_embeddings": 24, "rope_parameters": LONG}),
    "gpt_neox": ("GPTNeoXConfig", WIDTH),
    "apertus": ("ApertusConfig", WIDTH),
}
ZOO = ("llama", "deepseek_v3", "gpt2", "gptj", "granitemoehybrid", "qwen3_next", "falcon_h1", "mamba")


def state_of(folder: str, precision: Any, *, sharded: bool) -> dict[str, Any]:
    """Type and numbers of every buffer, and type and shape of every parameter."""
    from rlaif_ray.config.sections import LearnerConfig
    from rlaif_ray.learner.engine import sharded_loading
    from rlaif_ray.learner.supervised import DTYPES
    from rlaif_ray.models import load_causal_lm

    with sharded_loading(LearnerConfig(zero_stage=3 if sharded else 0), precision):
        model = load_causal_lm(folder, dtype=DTYPES[precision], attention="eager")
    parameters = {name: (p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in model.named_parameters()}
    assert all(hasattr(p, "ds_id") == sharded for p in model.parameters())
    return {"buffers": dict(model.named_buffers()), "parameters": parameters}


def both(spec: RankSpec, folders: dict[str, str], precision: str) -> dict[str, Any]:
    from rlaif_ray.learner.engine import join_ranks

    join_ranks(spec, 60)
    torch.manual_seed(0)
    return {name: [state_of(f, precision, sharded=s) for s in (False, True)] for name, f in folders.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_buffers_under_zero3_are_those_of_plain_loading(
    precision: str, tmp_path: Path, one_rank: RankProcesses
) -> None:
    configs = {name: zoo_config(name) for name in ZOO}
    for name, (kind, fields) in CONFIGS.items():
        configs[name] = getattr(transformers, kind)(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name, config in configs.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for key, buffer in model.named_buffers():
            if "e_score_correction_bias" in key:  # as trained: differences that bf16 does not have
                buffer.copy_(5.0 + torch.rand(buffer.shape) / 100)
        model.save_pretrained(tmp_path / name)
    (found,) = one_rank.run(both, {name: str(tmp_path / name) for name in configs}, precision)
    kinds = set()
    for name, (plain, sharded) in found.items():
        assert sharded["buffers"].keys() == plain["buffers"].keys()
        for key, buffer in plain["buffers"].items():
            other = sharded["buffers"][key]
            assert (other.dtype, other.tolist()) == (buffer.dtype, buffer.tolist()), (name, key)
            kinds.add(key.rpartition(".")[2])
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        shapes = {key: (dtype, shape) for key, (_, shape) in plain["parameters"].items()}
        assert sharded["parameters"] == shapes, name
    assert {"inv_freq", "e_score_correction_bias"} <= kinds
