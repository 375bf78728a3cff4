"""What a model is given in is what it is saved in, whatever a run computes in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlaif_ray.config.jobs import DpoJob, RewardModelJob, SftJob, TrainJob
from rlaif_ray.learner.engine import RankSpec, save_model_folder
from rlaif_ray.learner.model_state import ModelState
from rlaif_ray.models import load_causal_lm, load_types
from rlaif_ray.pipelines.guard import Guard
from rlaif_ray.weight_types import WeightTypes
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses
from tests.tiny import IM_END, cached_tiny_model, make_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
JOBS: dict[str, type[Any]] = {"train": TrainJob, "sft": SftJob, "dpo": DpoJob, "reward-model": RewardModelJob}


def given(folder: Path, stored: str, *, safetensors: bool = True) -> Path:
    """The tiny model with its weights in that type."""
    model = transformers.AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True), dtype=DTYPES[stored])
    shutil.copytree(cached_tiny_model(tied=True), folder)
    model.save_pretrained(folder)
    if not safetensors:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


def types_in(folder: Path) -> set[torch.dtype]:
    found = {tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values()}
    named = json.loads((folder / "config.json").read_text())["dtype"]
    assert getattr(torch, named) in found
    return found


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("trained", ["fp32", "bf16"])
def test_weights_go_back_into_their_type(stored: str, trained: str, tmp_path: Path) -> None:
    source = given(tmp_path / "given", stored)
    model = load_causal_lm(source, dtype=DTYPES[trained], attention="sdpa")
    state = ModelState(model).full_state(keep=True)
    before = {name: tensor.clone() for name, tensor in state.items()}
    save_model_folder(model, make_tokenizer(None), state, tmp_path / "saved", load_types(source))
    assert types_in(tmp_path / "saved") == {DTYPES[stored]}
    for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert torch.equal(tensor, before[name].to(DTYPES[stored]))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == DTYPES[stored]


def test_single_tensors_keep_a_type_of_their_own(tmp_path: Path) -> None:
    """As the biases of DeepSeek-V3's routers, in fp32 in a bf16 checkpoint."""
    source = given(tmp_path / "given", "bf16")
    file, kept = source / "model.safetensors", "model.norm.weight"
    weights = load_file(file)
    save_file(weights | {kept: weights[kept].float()}, file, metadata={"format": "pt"})
    types = load_types(source)
    assert (types.usual, dict(types.other)) == ("bfloat16", {kept: "float32"})
    model = load_causal_lm(source, dtype=torch.float32, attention="sdpa")
    save_model_folder(model, make_tokenizer(None), ModelState(model).full_state(keep=True), tmp_path / "saved", types)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved[kept].dtype == torch.float32
    assert {tensor.dtype for name, tensor in saved.items() if name != kept} == {torch.bfloat16}


def test_weights_in_other_files_have_the_type_that_the_config_names(tmp_path: Path) -> None:
    assert load_types(given(tmp_path / "given", "bf16", safetensors=False)) == WeightTypes("bfloat16")


def test_what_is_too_large_for_fp16_is_saved_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = given(tmp_path / "given", "fp16")
    model = load_causal_lm(source, dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    state = ModelState(model).full_state(keep=True)
    save_model_folder(model, make_tokenizer(None), state, tmp_path / "saved", load_types(source))
    assert types_in(tmp_path / "saved") == {torch.float32}
    assert "too large for fp16" in caplog.text


def saved_by(spec: RankSpec, kind: str, source: str, target: str) -> tuple[dict[str, float], Any]:
    """Saves with a learner of that job, in fp32; the gap that the guard finds, and where the saved model stops."""
    from rlaif_ray.learner.dpo import DpoRank
    from rlaif_ray.learner.finetune import SftRank
    from rlaif_ray.learner.ppo import RlRank
    from rlaif_ray.learner.supervised import RewardRank

    job = embedded(JOBS[kind], {"policy": {"model": source}, "learner": {"ranks": spec.world_size}})
    ranks: dict[str, Any] = {"sft": SftRank, "dpo": DpoRank, "reward-model": RewardRank}
    rank = RlRank(job, spec, "fp32") if kind == "train" else ranks[kind](job, spec, "fp32", total_steps=1)
    save = {"train": lambda: rank.save_policy(target), "reward-model": lambda: rank.save_model(target, None)}
    save.get(kind, lambda: rank.save_model(target))()

    class NoCheckpoints:
        def newest(self) -> None: ...

    gap = Guard(job, rank, "fp32", 512).check_saved(Path(target), NoCheckpoints())  # type: ignore[arg-type]
    return gap, getattr(rank._model, "generation_config", None) and rank._model.generation_config.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("kind", JOBS)
def test_every_job_saves_in_the_type_it_was_given(kind: str, one_rank: RankProcesses, tmp_path: Path) -> None:
    source = given(tmp_path / "given", "bf16")
    (source / "generation_config.json").write_text('{"eos_token_id": 0}')  # as of a base model with a chat template
    ((gap, stops),) = one_rank.run(saved_by, kind, str(source), str(tmp_path / "saved"))
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert 0 <= gap["guard/saved_gap"] < 0.15
    if kind in ("sft", "dpo"):
        assert stops == [0, make_tokenizer(None).convert_tokens_to_ids(IM_END)]
        assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == stops
