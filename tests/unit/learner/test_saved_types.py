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
from rlaif_ray.weight_types import WeightTypes, cast, rounding
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
    save_model_folder(model, lambda: make_tokenizer(None), state, tmp_path / "saved", load_types(source))
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
    save_model_folder(
        model, lambda: make_tokenizer(None), ModelState(model).full_state(keep=True), tmp_path / "saved", types
    )
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved[kept].dtype == torch.float32
    assert {tensor.dtype for name, tensor in saved.items() if name != kept} == {torch.bfloat16}


def test_weights_in_other_files_have_their_own_type_and_not_the_configs(tmp_path: Path) -> None:
    source = given(tmp_path / "given", "bf16", safetensors=False)
    assert load_types(source) == WeightTypes("bfloat16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert load_types(source) == WeightTypes("bfloat16")
    (source / "pytorch_model.bin").write_bytes(b"what transformers alone reads")
    assert load_types(source) == WeightTypes()


def test_files_that_are_not_loaded_say_nothing(tmp_path: Path) -> None:
    """Mistral's folders have all weights a second time, under names of its own."""
    source = given(tmp_path / "given", "bf16")
    weights = load_file(source / "model.safetensors")
    save_file({f"x.{name}": tensor.float() for name, tensor in weights.items()}, source / "consolidated.safetensors")
    assert load_types(source) == WeightTypes("bfloat16")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_types(source) == WeightTypes("bfloat16")


def test_what_is_too_large_for_fp16_is_saved_as_it_is(tmp_path: Path) -> None:
    source = given(tmp_path / "given", "fp16")
    model = load_causal_lm(source, dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    state = ModelState(model).full_state(keep=True)
    (told,) = save_model_folder(model, lambda: make_tokenizer(None), state, tmp_path / "saved", load_types(source))
    assert types_in(tmp_path / "saved") == {torch.float32}
    assert "too large for fp16" in told


@pytest.mark.parametrize(("step", "share"), [(1e-6, 2.0), (1e-2, 0.0)])
@pytest.mark.parametrize("asked", ["auto", "fp32", "bf16"])
def test_what_rounding_takes_of_an_update_is_told(step: float, share: float, asked: Any, tmp_path: Path) -> None:
    source = given(tmp_path / "given", "bf16")
    model = load_causal_lm(source, dtype=torch.float32, attention="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * torch.randn(parameter.shape, generator=generator).sign())
    state = ModelState(model).full_state(keep=True)
    types = load_types(source).saved_as(asked)
    before = load_file(source / "model.safetensors")
    moved = {name: state[name] - tensor.float() for name, tensor in before.items() if name in state}
    lost = {name: state[name].bfloat16().float() - state[name] for name in moved}
    norm = {
        kind: sum(float(t.double().square().sum()) for t in found.values()) ** 0.5
        for kind, found in (("moved", moved), ("lost", lost))
    }
    assert rounding(state, load_types(source)) == pytest.approx(norm["lost"] / norm["moved"], rel=1e-6)
    notes = save_model_folder(model, lambda: make_tokenizer(None), state, tmp_path / "saved", types)
    assert types_in(tmp_path / "saved") == {torch.float32 if asked == "fp32" else torch.bfloat16}
    if asked == "fp32" or not share:
        assert not notes
    else:
        assert (
            f"{norm['lost'] / norm['moved']:.0%} as far as training" in notes[0] and "save_precision=fp32" in notes[0]
        )


def test_a_run_says_at_its_start_what_it_will_round() -> None:
    types = WeightTypes("bfloat16", {"router": "float32"})
    (note,) = types.note("m", types.saved_as("auto"), "fp32")
    assert "m was given in bfloat16" in note and "policy.save_precision=fp32" in note
    assert not types.note("m", types.saved_as("auto"), "bf16")
    assert not types.note("m", types.saved_as("fp32"), "fp32")
    assert types.saved_as("fp32") == WeightTypes("float32")
    assert types.saved_as("bf16") == types
    assert WeightTypes("float32", {"x": "bfloat16"}).saved_as("bf16") == WeightTypes("bfloat16")


def test_empty_tensors_have_no_number_that_is_too_large() -> None:
    state = {"none": torch.empty(0, 4), "some": torch.ones(2)}
    assert cast(state, WeightTypes("float16"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


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


def saved_in_fp32(spec: RankSpec, source: str, target: str, learner: dict[str, Any], lora: Any) -> dict[str, Any]:
    """Trains in bf16, saves in fp32; what the optimizer's own fp32 weights are, and those that are not trained."""
    from deepspeed.utils import safe_get_full_fp32_param

    from rlaif_ray.learner.finetune import SftExample, SftRank

    policy = {"model": source, "save_precision": "fp32"}
    own = {"ranks": spec.world_size, "lr": 1e-3, "eps": 1e-8} | learner
    job = embedded(SftJob, {"policy": policy, "learner": own, "sft": {"lora": lora}})
    rank = SftRank(job, spec, "bf16", total_steps=3)
    examples = [SftExample((5, 6, 7), (100 + i, 103, 0)) for i in range(spec.world_size)]
    for _ in range(3):
        rank.train(examples, [[spec.rank]])
    rank.save_model(target)
    return {
        name: (safe_get_full_fp32_param(p) if p.requires_grad else p.detach()).clone()
        for name, p in rank._model.named_parameters()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "adapters"),
    [
        ({"zero_stage": 1}, False),
        ({"zero_stage": 2, "offload": {"optimizer": "cpu"}}, False),
        ({"zero_stage": 3}, False),
        ({"zero_stage": 1}, True),
    ],
    ids=["stage 1", "stage 2, offloaded", "stage 3", "adapters"],
)
def test_fp32_has_all_that_was_learned_in_bf16(
    learner: dict[str, Any], adapters: bool, two_ranks: RankProcesses, tmp_path: Path
) -> None:
    source = given(tmp_path / "given", "fp32")
    lora = {"rank": 4, "alpha": 8} if adapters else None
    own, _ = two_ranks.run(saved_in_fp32, str(source), str(tmp_path / "saved"), learner, lora)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    learned = 0
    for name, tensor in saved.items():
        if f"{name.removesuffix('.weight')}.base_layer.weight" in own:
            path = name.removesuffix(".weight")
            a, b = (own[f"{path}.lora_{x}.default.weight"] for x in "AB")
            expected = own[f"{path}.base_layer.weight"].float() + 2.0 * (b @ a)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
        else:
            assert torch.equal(tensor, own[name].float()), name
        learned += int((tensor != tensor.bfloat16().float()).sum())
    assert learned > 1000  # bf16 holds few of these numbers
