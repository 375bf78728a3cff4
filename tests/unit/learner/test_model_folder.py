"""What is saved at the end: settings that transformers loads and won't save, and what must not cost the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlaif_ray.errors import InputError, RunError
from rlaif_ray.learner.engine import RankSpec, save_model_folder, try_saving
from rlaif_ray.learner.finetune import stop_at
from rlaif_ray.learner.model_state import ModelState
from rlaif_ray.models import load_causal_lm
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses
from tests.tiny import VOCABULARY, cached_tiny_model, make_tokenizer

SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}


class Unsavable:
    """A tokenizer that loads and can't be written."""

    def save_pretrained(self, folder: Any) -> None:
        raise TypeError("Object of type PostProcessor is not JSON serializable")


def model_with(folder: Path, **generation: Any) -> Any:
    """A model as a run loads it, from a folder whose generation_config.json says so."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_causal_lm(folder, dtype=torch.float32, attention="sdpa")


def weights_are_whole(model: Any, folder: Path) -> bool:
    saved = load_file(folder / "model.safetensors")
    return all(torch.equal(saved[name], tensor) for name, tensor in ModelState(model).full_state(keep=True).items())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, {"do_sample": True}),  # Llama 2
        ({"top_k": 20, "do_sample": False}, {"do_sample": True}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {}),
        ({"temperature": 0.9, "pad_token_id": -1}, {}),  # no valid settings are as these: as they were loaded
        ({"length_penalty": 2.0}, {}),
        ({"eos_token_id": [2, 7]}, {}),
    ],
)
def test_settings_for_generation_are_kept(given: dict[str, Any], kept: dict[str, Any], tmp_path: Path) -> None:
    model = model_with(tmp_path / "start", **given)
    try_saving(model, lambda: make_tokenizer(None), "start")
    target = tmp_path / "target"
    save_model_folder(model, lambda: make_tokenizer(None), ModelState(model).full_state(keep=True), target)
    found = json.loads((target / "generation_config.json").read_text())
    assert found == found | given | kept
    assert weights_are_whole(model, target)
    transformers.AutoModelForCausalLM.from_pretrained(target)
    assert model.generation_config.do_sample == given.get("do_sample")  # the model in training is left alone


def test_what_cannot_be_saved_costs_no_weights(tmp_path: Path) -> None:
    model = model_with(tmp_path / "start")
    target = tmp_path / "target"
    with pytest.raises(InputError, match=r"the tokenizer of model start can't be saved \(TypeError: Object of type"):
        try_saving(model, Unsavable, "start")
    with pytest.raises(RunError, match=r"target has the trained weights.*TypeError: Object of type.*tokenizer"):
        save_model_folder(model, Unsavable, ModelState(model).full_state(keep=True), target)
    assert weights_are_whole(model, target)
    assert (target / "config.json").exists()


def no_tokenizer() -> Any:
    raise InputError("the model's folder is gone")


def no_template(config: Any, generation: Any, tokenizer: Any) -> None:
    raise AttributeError("'NoneType' object has no attribute 'eos_token_id'")


@pytest.mark.parametrize("what", ["tokenizer", "prepare", "cast"])
def test_whatever_fails_at_the_save_costs_no_weights(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with(tmp_path / "start")
    target = tmp_path / "target"
    model.save_pretrained(target)  # what an earlier end of the run left there
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    if what == "cast":
        monkeypatch.setattr("rlaif_ray.learner.engine.cast", lambda *_: no_template(None, None, None))
    load = no_tokenizer if what == "tokenizer" else lambda: make_tokenizer(None)
    state = ModelState(model).full_state(keep=True)
    with pytest.raises(RunError, match="target has the trained weights"):
        save_model_folder(model, load, state, target, prepare=no_template)
    assert weights_are_whole(model, target)


def test_what_is_prepared_at_the_end_is_tried_at_the_start(tmp_path: Path) -> None:
    model = model_with(tmp_path / "start", eos_token_id=2)

    def prepare(config: Any, generation: Any, tokenizer: Any) -> None:
        config.note, generation.eos_token_id = "x", 3

    try_saving(model, lambda: make_tokenizer(None), "start", prepare)
    assert not hasattr(model.config, "note") and model.generation_config.eos_token_id == 2  # only tried
    with pytest.raises(InputError, match=r"model start can't be made ready .*NoneType"):
        try_saving(model, lambda: make_tokenizer(None), "start", no_template)


def test_a_model_without_settings_for_generation_stops_nowhere_else() -> None:
    stop_at(None, (3,))


def test_a_config_that_cannot_be_saved_costs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(tmp_path / "start")
    target = tmp_path / "target"
    monkeypatch.setattr(type(model.config), "save_pretrained", Unsavable.save_pretrained)
    with pytest.raises(InputError, match="the config of model start"):
        try_saving(model, lambda: make_tokenizer(None), "start")
    with pytest.raises(RunError, match=r"target has the trained weights"):
        save_model_folder(model, lambda: make_tokenizer(None), ModelState(model).full_state(keep=True), target)
    assert weights_are_whole(model, target)


def started(spec: RankSpec, kind: str) -> str:
    """What a learner says whose tokenizer can't be saved."""
    from rlaif_ray.config.jobs import SftJob, TrainJob
    from rlaif_ray.learner import ppo, supervised
    from rlaif_ray.learner.finetune import SftRank

    model = {"policy": {"model": str(cached_tiny_model(tied=True))}, "learner": {"ranks": 1}}
    module: Any = ppo if kind == "train" else supervised
    with mock.patch.object(module, "load_tokenizer", lambda *args, **kwargs: Unsavable()):
        try:
            if kind == "train":
                ppo.RlRank(embedded(TrainJob, model), spec, "fp32")
            else:
                SftRank(SftJob.model_validate(model | {"data": {"path": "x"}}), spec, "fp32", total_steps=1)
        except InputError as error:
            return str(error)
    return "started"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "sft"])
def test_every_learner_tries_before_its_first_step(kind: str, one_rank: RankProcesses) -> None:
    (said,) = one_rank.run(started, kind)
    assert "tokenizer of model" in said and "can't be " in said


# Checkpoints with quantised weights, which transformers turns back when it saves


def quantised(folder: Path, kind: str) -> Path:
    """A tiny checkpoint of GPT-OSS in mxfp4, or of Qwen 3 in fp8, as their publishers store them."""
    config: Any
    if kind == "mxfp4":
        config = transformers.GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2)
        entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
        entry["modules_to_not_convert"] += ["model.layers.*.mlp.router", "model.embed_tokens"]
    else:
        config = transformers.Qwen3Config(**SIZE)
        entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    file, weights = folder / "model.safetensors", load_file(folder / "model.safetensors")
    for name in list(weights):
        if kind == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, wide, out = weights.pop(name).shape
            blocks = torch.randint(0, 256, (experts, out, wide // 32, 16), dtype=torch.uint8)
            weights |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:-1], 122).byte()}
        elif kind == "fp8" and name.endswith("proj.weight"):
            weights[f"{name}_scale_inv"] = torch.full([-(-n // 128) for n in weights[name].shape], 0.01)
            weights[name] = (weights[name] / 0.01).to(torch.float8_e4m3fn)
    save_file(weights, file, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_a_conversion_that_loses_weights_ends_before_training(kind: str, tmp_path: Path) -> None:
    model = load_causal_lm(quantised(tmp_path, kind), dtype=torch.float32, attention="eager")
    with pytest.raises(InputError, match=r"can't be pushed or saved .*numbers in .*quantised weights") as caught:
        ModelState(model)
    assert str(tmp_path) in str(caught.value)
