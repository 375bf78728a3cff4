"""What a learner rank saves and loads, on real DeepSpeed: every ZeRO stage goes on to the bit, and nothing pickles."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from rlaif_ray.config.jobs import DpoJob, SftJob, TrainJob
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.errors import CheckpointError
from rlaif_ray.learner.dpo import DpoExample
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.model_state import model_entries
from rlaif_ray.learner.supervised import PairExample
from rlaif_ray.storage import Place, StoredFolder, open_folder, publish
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses, full_weights, make_experience, random_samples
from tests.tiny import VOCABULARY, cached_tiny_model, make_tokenizer

pytestmark = pytest.mark.slow

ADAM = {"lr": 1e-2, "eps": 1e-8, "warmup_steps": 1, "schedule": "cosine", "tokens_per_micro_batch": 80}
TURNS = [SftExample(tuple(range(5 + i, 12 + i)), tuple(range(100 + 3 * i, 109 + 3 * i))) for i in range(6)]
PAIRS = [DpoExample(PairExample(t.prompt, t.response, t.response[::-1], 0.8), -30.0, -31.0) for t in TURNS]
BESIDE = {"updates": 3}
DEEPSEEK: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


@pytest.fixture(scope="module", params=["one_rank", pytest.param("two_ranks", marks=pytest.mark.long)])
def ranks(request: pytest.FixtureRequest) -> RankProcesses:
    processes: RankProcesses = request.getfixturevalue(request.param)
    return processes


# What runs in the learner's processes


@contextmanager
def no_pickles() -> Iterator[None]:
    """Within it nothing can be pickled or unpickled, by whatever name it is known."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something pickles")

    names = ("load", "loads", "dump", "dumps", "Unpickler", "Pickler", "_Unpickler", "_Pickler")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(pickle, name, refuse))
        for name in ("load", "save"):
            stack.enter_context(patch.object(torch, name, refuse))
        yield


def take(rank: Any, job: Any, spec: RankSpec, steps: range) -> None:
    """Optimizer steps; each draws from every generator, as dropout does."""
    for step in steps:
        drawn = random.random() + float(numpy.random.rand()) + float(torch.rand(()))
        if isinstance(job, TrainJob):
            experience, lengths = experience_of(step, drawn)
            plans = plan_ranks(range(len(experience)), lengths, ranks=spec.world_size, budget=80)
            rank.update(experience, [(int(experience.mask.sum()), plans[spec.rank])])
        else:
            examples = TURNS if isinstance(job, SftJob) else PAIRS
            plans = plan_ranks(range(len(examples)), [len(e) for e in examples], ranks=spec.world_size, budget=80)
            rank.train(examples, plans[spec.rank])


def experience_of(step: int, drawn: float) -> tuple[Any, list[int]]:
    prompts, completions = random_samples([4, 9], [[5, 3], [7, 2]], seed=step)
    old = [torch.full((len(c),), -5.0 - 0.01 * drawn) for c in completions]
    values = [torch.zeros(len(c)) for c in completions]
    returns = [torch.full((len(c),), drawn) for c in completions]
    columns = {"logprobs": old, "sampler_logprobs": old, "ref_logprobs": old, "values": values}
    experience = make_experience(
        prompts,
        completions,
        finished=torch.ones(len(completions), dtype=torch.bool),
        scores=torch.zeros(len(completions)),
        advantages=returns,
        returns=returns,
        **columns,
    )
    return experience, [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]


def make(job: Any, spec: RankSpec) -> Any:
    from rlaif_ray.learner.dpo import DpoRank
    from rlaif_ray.learner.finetune import SftRank
    from rlaif_ray.learner.ppo import RlRank

    precision: Any = "bf16" if job.policy.precision == "bf16" else "fp32"
    if isinstance(job, TrainJob):
        return RlRank(job, spec, precision)
    return (SftRank if isinstance(job, SftJob) else DpoRank)(job, spec, precision, total_steps=8)


def end_of(rank: Any) -> dict[str, torch.Tensor]:
    """All that training moves: weights, the critic's too, and where the generators stand."""
    found = full_weights(rank)
    if getattr(rank, "_critic", None) is not None:
        from rlaif_ray.learner.engine import full_weights as gathered

        for name, parameter in rank._critic.module.named_parameters():
            with gathered([parameter], write=False):
                found[f"critic.{name}"] = parameter.detach().cpu().clone()
    found["drawn"] = torch.tensor([random.random(), float(numpy.random.rand()), float(torch.rand(()))])
    return found


def move_buffers(rank: Any) -> None:
    """Other values than the model's folder has, so that a checkpoint without buffers would show."""
    for entry in model_entries(rank._model):
        if not isinstance(entry.needs[0], torch.nn.Parameter):
            entry.needs[0].add_(0.1)


def straight(spec: RankSpec, job: Any, folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Six steps with a checkpoint after three, which is written after the fourth: this rank's files, and the end."""
    rank = make(job, spec)
    move_buffers(rank)
    take(rank, job, spec, range(3))
    with no_pickles():
        rank.checkpoint.copy(BESIDE)
    take(rank, job, spec, range(3, 4))
    with no_pickles():
        files = rank.checkpoint.write(Place(folder))
    take(rank, job, spec, range(4, 6))
    return files, end_of(rank)


def resumed(spec: RankSpec, job: Any, folder: StoredFolder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    rank = make(job, spec)
    take(rank, job, spec, range(7, 8))  # what it was before must not matter
    with no_pickles():
        beside = rank.checkpoint.load(folder)
    take(rank, job, spec, range(3, 6))
    return beside, end_of(rank)


def loaded(spec: RankSpec, job: Any, folder: StoredFolder) -> str:
    """What loading complains of."""
    try:
        make(job, spec).checkpoint.load(folder)
    except CheckpointError as error:
        return str(error)
    return "nothing"


# The tests


def train_job(stage: int, count: int, precision: str = "auto") -> TrainJob:
    return embedded(
        TrainJob,
        {
            "policy": {"model": str(cached_tiny_model(tied=True)), "precision": precision},
            "sampling": {"prompts_per_step": 2, "samples_per_prompt": 2},
            "learner": ADAM | {"ranks": count, "zero_stage": stage},
            "steps": 8,
        },
    )


def assert_goes_on(ranks: RankProcesses, job: Any, folder: Path) -> StoredFolder:
    place = Place(str(folder / ".partial-step-3-x"))
    saved = ranks.run(straight, job, place.address)
    files = {name: file for own, _ in saved for name, file in own.items()}
    assert len(files) == sum(len(own) for own, _ in saved)  # every file is one rank's
    publish(StoredFolder(place, files), Place(str(folder / "step-3")))
    stored, _ = open_folder(Place(str(folder / "step-3")))
    for (_, end), (beside, again) in zip(saved, ranks.run(resumed, job, stored), strict=True):
        assert beside == BESIDE
        assert end.keys() == again.keys()
        different = [name for name in end if not torch.equal(end[name], again[name])]
        assert different == []
    return stored


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_policy_and_critic_go_on_to_the_bit(ranks: RankProcesses, stage: int, tmp_path: Path) -> None:
    job = train_job(stage, ranks.count)  # type: ignore[attr-defined]
    stored = assert_goes_on(ranks, job, tmp_path)
    assert all(name.endswith((".safetensors", ".json")) for name in stored.files)
    assert any(name.startswith("critic/") for name in stored.files)
    assert {path.suffix for path in (tmp_path / "step-3").rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_adapters_with_dropout_go_on_to_the_bit(ranks: RankProcesses, tmp_path: Path) -> None:
    lora = {"rank": 2, "dropout": 0.3}
    learner = ADAM | {"ranks": ranks.count, "zero_stage": 2}  # type: ignore[attr-defined]
    policy = {"model": str(cached_tiny_model(tied=True, spread=0.04))}
    job = SftJob.model_validate(
        {"policy": policy, "data": {"path": "x"}, "learner": learner, "sft": {"lora": lora}},
    )
    assert_goes_on(ranks, job, tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_goes_on_to_the_bit(ranks: RankProcesses, stage: int, tmp_path: Path) -> None:
    """What GPUs train in: DeepSpeed then keeps fp32 weights beside, in states of other shapes."""
    learner = ADAM | {"ranks": ranks.count, "zero_stage": stage}  # type: ignore[attr-defined]
    policy = {"model": str(cached_tiny_model(tied=True)), "precision": "bf16"}
    job = SftJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner})
    stored = assert_goes_on(ranks, job, tmp_path)
    if stage == 1:
        other = job.model_copy(update={"policy": job.policy.model_copy(update={"precision": "fp32"})})
        said = ranks.run(loaded, other, stored)
        assert all("by a run in bf16 and this one is in fp32" in text for text in said)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_critic_in_bf16_goes_on_to_the_bit(ranks: RankProcesses, stage: int, tmp_path: Path) -> None:
    """Its head computes with fp32 weights, which are no parameters of the module: those of the checkpoint."""
    assert_goes_on(ranks, train_job(stage, ranks.count, "bf16"), tmp_path)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, {"optimizer": "cpu"}), (2, {"optimizer": "cpu"}), (3, {"optimizer": "cpu", "parameters": "cpu"})],
)
def test_what_is_offloaded_goes_on_to_the_bit(
    ranks: RankProcesses, stage: int, offload: dict[str, str], tmp_path: Path
) -> None:
    learner = ADAM | {"ranks": ranks.count, "zero_stage": stage, "offload": offload}  # type: ignore[attr-defined]
    policy = {"model": str(cached_tiny_model(tied=True)), "precision": "bf16"}
    job = SftJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner})
    assert_goes_on(ranks, job, tmp_path)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_buffers_and_experts_go_on_to_the_bit(ranks: RankProcesses, stage: int, tmp_path: Path) -> None:
    model = DeepseekV3Config(**DEEPSEEK)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model, dtype=torch.float32).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    # Without the threshold DeepSpeed keeps all of so small a model whole.
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    learner = ADAM | {"ranks": ranks.count, "zero_stage": stage, "deepspeed_overrides": overrides}  # type: ignore[attr-defined]
    policy = {"model": str(tmp_path / "model"), "attention": "eager"}
    job = SftJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner})
    assert_goes_on(ranks, job, tmp_path)


def test_dpo_goes_on_to_the_bit(ranks: RankProcesses, tmp_path: Path) -> None:
    learner = ADAM | {"ranks": ranks.count}  # type: ignore[attr-defined]
    policy = {"model": str(cached_tiny_model(tied=False))}
    job = DpoJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner})
    stored = assert_goes_on(ranks, job, tmp_path)
    # Another precision, as on another machine: DeepSpeed's states have other shapes then.
    other = job.model_copy(update={"policy": job.policy.model_copy(update={"precision": "bf16"})})
    said = ranks.run(loaded, other, stored)
    assert all("was written by a run in fp32 and this one is in bf16" in text for text in said)
    assert all("Set policy.precision=fp32 to go on" in text for text in said)
    # A file that changes after it was verified, as on a node that sees another one.
    path = tmp_path / "step-3" / "model" / "mp_rank_00_model_states.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = ranks.run(loaded, job, stored)
    assert all("mp_rank_00_model_states.safetensors is damaged" in text for text in said)
