"""Adapters on real DeepSpeed: only they are trained, what is saved has them merged in, and a checkpoint has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.jobs import DpoJob, RewardModelJob, SftJob
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.errors import InputError
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.supervised import PairExample
from rlaif_ray.storage import Place, StoredFolder
from tests.learner_ranks import RankProcesses, full_weights, plain_logprobs
from tests.tiny import cached_tiny_model, make_tokenizer

pytestmark = pytest.mark.slow

ADAM = {"lr": 1e-2, "eps": 1e-8, "tokens_per_micro_batch": 80}
TURNS = [SftExample(tuple(range(5 + i, 12 + i)), tuple(range(100 + 3 * i, 109 + 3 * i))) for i in range(6)]
PAIRS = [
    PairExample(t.prompt, t.response, tuple(reversed(t.response)), p)
    for t, p in zip(TURNS, (1.0, 0.0, 0.7, 0.2, 0.9, 0.4), strict=True)
]


def sft_job(**lora: Any) -> SftJob:
    learner = ADAM | lora.pop("learner", {})
    policy = {"model": str(cached_tiny_model(tied=True, spread=0.04))}
    return SftJob.model_validate({"policy": policy, "data": {"path": "x"}, "learner": learner, "sft": {"lora": lora}})


def plan_of(spec: RankSpec, job: Any, examples: Any) -> Any:
    lengths = [len(e) for e in examples]
    budget = job.learner.tokens_per_micro_batch
    return plan_ranks(range(len(examples)), lengths, ranks=spec.world_size, budget=budget)[spec.rank]


def tuned(spec: RankSpec, job: SftJob, steps: int, folder: str | None = None) -> dict[str, Any]:
    from rlaif_ray.learner.finetune import SftRank

    rank = SftRank(job, spec, "fp32", total_steps=steps)
    trainable = {n for n, p in rank._model.named_parameters() if p.requires_grad}
    before = full_weights(rank)
    losses = [rank.train(TURNS, plan_of(spec, job, TURNS))["loss"] for _ in range(steps)]
    said = rank.losses(TURNS, plan_of(spec, job, TURNS))
    if folder is not None:
        rank.save_model(folder)
    return {"trainable": trainable, "before": before, "losses": losses, "said": said, "weights": full_weights(rank)}


def test_only_adapters_learn_and_the_saved_model_has_them(one_rank: RankProcesses, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    [found] = one_rank.run(tuned, sft_job(rank=4), 8, str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True, spread=0.04), dtype=torch.float32)
    names = {name for name, _ in base.named_parameters()}
    assert found["trainable"] and all(".lora_A." in n or ".lora_B." in n for n in found["trainable"])
    assert found["weights"].keys() == names  # as without adapters
    for name, weight in base.named_parameters():
        assert torch.equal(found["before"][name], weight)  # B starts at zero
        linear = name.endswith("proj.weight")
        assert torch.equal(found["weights"][name], weight) != linear, name
        if linear:  # a change of rank 4
            change = (found["weights"][name] - weight).detach().double()
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4
    assert found["losses"][-1] < 0.9 * found["losses"][0]
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    rows = plain_logprobs(model, [t.prompt for t in TURNS], [t.response for t in TURNS])
    for i, row in enumerate(rows):
        assert -row.sum().item() == pytest.approx(found["said"][i], abs=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_and_shards_change_nothing(one_rank: RankProcesses, two_ranks: RankProcesses, stage: int) -> None:
    sgd = {"lr": 20.0, "eps": 1e3, "betas": (0.0, 0.0), "grad_clip": 1e9}
    [base] = one_rank.run(tuned, sft_job(learner=sgd), 3)
    parts = two_ranks.run(tuned, sft_job(learner=sgd | {"ranks": 2, "zero_stage": stage}), 3)
    changed = 0
    for name, weights in base["weights"].items():
        torch.testing.assert_close(parts[0]["weights"][name], weights, atol=1e-5, rtol=1e-5)
        changed += not torch.equal(weights, base["before"][name])
    assert changed


def resumed(spec: RankSpec, job: SftJob, folder: str) -> bool:
    """Whether six steps straight and three, a checkpoint, three more end in the same bits."""
    from rlaif_ray.learner.finetune import SftRank

    def take(rank: Any, steps: int) -> None:
        for _ in range(steps):
            rank.train(TURNS, plan_of(spec, job, TURNS))

    straight = SftRank(job, spec, "fp32", total_steps=6)
    take(straight, 3)
    straight.checkpoint.copy()
    files = straight.checkpoint.write(Place(folder))
    take(straight, 3)
    again = SftRank(job, spec, "fp32", total_steps=6)
    again.checkpoint.load(StoredFolder(Place(folder), files))
    take(again, 3)
    one, other = full_weights(straight), full_weights(again)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_resume_is_exact(one_rank: RankProcesses, tmp_path: Path) -> None:
    assert one_rank.run(resumed, sft_job(targets=("q_proj", "v_proj")), str(tmp_path)) == [True]


def measured_twice(spec: RankSpec, job: Any) -> tuple[Any, Any, list[float]]:
    """What is measured before and between two steps, asked twice each; the losses of one step, taken twice."""
    from rlaif_ray.learner.dpo import DpoRank
    from rlaif_ray.learner.finetune import SftRank
    from rlaif_ray.learner.supervised import RewardRank

    kind, verb, examples = {
        "sft": (SftRank, "losses", TURNS),
        "dpo": (DpoRank, "logprobs", PAIRS),
        "reward": (RewardRank, "rewards", PAIRS),
    }[job.section]
    rank: Any = kind(job, spec, "fp32", total_steps=4)
    plan = plan_of(spec, job, examples)

    def ask() -> Any:
        return getattr(rank, verb)(examples, plan)

    start = ask()
    with torch.no_grad():
        for name, parameter in rank._model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    first, second = ask(), ask()
    learned = examples
    if job.section == "dpo":
        from rlaif_ray.learner.dpo import DpoExample

        learned = [DpoExample(pair, *start[i]) for i, pair in enumerate(PAIRS)]
    return first, second, [rank.train(learned, plan)["loss"] for _ in range(2)]


@pytest.mark.parametrize("section", ["sft", "dpo", "reward"])
def test_dropout_of_adapters_is_off_where_something_is_measured(one_rank: RankProcesses, section: str) -> None:
    """A response had a reward of 2.45, then of 5.90."""
    kinds = {"sft": SftJob, "dpo": DpoJob, "reward": RewardModelJob}
    values = {"policy": {"model": str(cached_tiny_model(tied=True, spread=0.04))}, "data": {"path": "x"}}
    # A learning rate of nothing: steps differ by their dropout alone.
    learner = ADAM | {"lr": 1e-30}
    job = kinds[section].model_validate(values | {"learner": learner, section: {"lora": {"dropout": 0.5}}})
    [(first, second, losses)] = one_rank.run(measured_twice, job)
    assert first == second
    assert losses[0] != losses[1]  # in training it is on, and drawn anew
    [(again, _, same)] = one_rank.run(measured_twice, job)
    assert again == first and same == losses  # seeded


def tiny_moe(folder: Path) -> Path:
    """A mixture of experts, whose experts transformers fuses on loading."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer(folder)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, initializer_range=0.1, **experts, **heads
    )
    Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_experts_are_adapted_and_merged(
    one_rank: RankProcesses, two_ranks: RankProcesses, tmp_path: Path, stage: int
) -> None:
    """All but under ZeRO-3, where adapters are on the other layers alone."""
    from transformers import AutoModelForCausalLM

    ranks, count = (one_rank, 1) if stage == 0 else (two_ranks, 2)
    learner = ADAM | {"ranks": count, "zero_stage": stage}
    values = {"policy": {"model": str(tiny_moe(tmp_path / "start"))}, "data": {"path": "x"}, "learner": learner}
    parts = ranks.run(tuned, SftJob.model_validate(values | {"sft": {"lora": {"rank": 4}}}), 3, str(tmp_path / "out"))
    assert any(".experts." in name for name in parts[0]["trainable"]) == (stage < 3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    rows = plain_logprobs(model, [t.prompt for t in TURNS], [t.response for t in TURNS])
    said = {i: value for part in parts for i, value in part["said"].items()}
    for i, row in enumerate(rows):
        assert -row.sum().item() == pytest.approx(said[i], abs=1e-3)


def rewarded(spec: RankSpec, job: RewardModelJob, folder: str) -> dict[str, Any]:
    from rlaif_ray.learner.supervised import RewardRank

    rank = RewardRank(job, spec, "fp32", total_steps=10)
    losses = [rank.train(PAIRS, plan_of(spec, job, PAIRS))["loss"] for _ in range(10)]
    rank.save_model(folder, None)
    trainable = {n for n, p in rank._model.named_parameters() if p.requires_grad}
    return {"trainable": trainable, "losses": losses, "rewards": rank.rewards(PAIRS, plan_of(spec, job, PAIRS))}


def test_a_reward_model_trains_its_head_beside_adapters(one_rank: RankProcesses, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    policy = {"model": str(cached_tiny_model(tied=True, spread=0.04))}
    job = RewardModelJob.model_validate(
        {"policy": policy, "data": {"path": "x"}, "learner": ADAM, "reward": {"lora": {"rank": 4}}}
    )
    [found] = one_rank.run(rewarded, job, str(tmp_path))
    assert "score.weight" in found["trainable"]
    assert all(n == "score.weight" or ".lora_" in n for n in found["trainable"])
    assert found["losses"][-1] < found["losses"][0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    for i, pair in enumerate(PAIRS):
        for response, reward in zip((pair.response_a, pair.response_b), found["rewards"][i], strict=True):
            said = model(input_ids=torch.tensor([[*pair.prompt, *response]])).logits[0, 0].item()
            assert said == pytest.approx(reward, abs=1e-3)


def test_an_unknown_layer_is_told() -> None:
    from transformers import AutoModelForCausalLM

    from rlaif_ray.config.data_sections import LoraConfig
    from rlaif_ray.learner.lora import add_adapters

    model = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True))
    with pytest.raises(InputError, match=r"lora.targets .*qproj.*q_proj"):
        add_adapters(model, LoraConfig(targets=("qproj",)), 0, "m")
