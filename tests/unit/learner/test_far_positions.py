"""In bf16 every ZeRO stage trains the model that transformers loads: its buffers keep their types and numbers, and far
into a text, where a rounded frequency of RoPE would be off by radians, it says the same. For every model of every job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.jobs import DpoJob, RewardModelJob, SftJob, TrainJob
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.supervised import PairExample
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses, plain_logprobs, random_samples
from tests.tiny import cached_tiny_model

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
# Two answers to one prompt, at positions from 1,030 on; and a prompt of the same model's first positions.
(PROMPT, _), (LEFT, RIGHT) = random_samples([1030], [[24, 17]], seed=2)


def folder() -> Path:
    return cached_tiny_model(tied=True, context=2048)


def job_of(kind: str, stage: int) -> Any:
    # Without the threshold DeepSpeed keeps all of so small a model whole.
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    sections: dict[str, Any] = {
        "policy": {"model": str(folder()), "precision": "bf16"},
        "learner": {"zero_stage": stage, "tokens_per_micro_batch": 1100, "deepspeed_overrides": overrides},
    }
    if kind == "train":
        return embedded(TrainJob, sections | {"algorithm": {"type": "ppo", "kl": {"coef": 0.1}}})
    jobs: dict[str, Any] = {"sft": SftJob, "reward-model": RewardModelJob, "dpo": DpoJob}
    return jobs[kind].model_validate(sections | {"data": {"path": "x"}})


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By their names within the model's body."""
    return {f"rotary_emb.{name.rpartition('.')[2]}": buffer for name, buffer in module.named_buffers()}


def rl_numbers(spec: RankSpec, stage: int) -> dict[str, Any]:
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job_of("train", stage), spec, "bf16")
    assert rank._critic is not None and rank._reference is not None
    seen: list[torch.Tensor] = []  # by the critic's body: its head begins at zero
    rank._critic.module.body.register_forward_hook(
        lambda module, _, out: seen.append(out[0].detach().float().flatten())
    )
    found = rank.annotate([PROMPT] * 2, [LEFT, RIGHT], [[0], [1]], with_policy=True)
    said = {name: torch.cat([found[i][name] for i in range(2)]) for name in ("policy", "ref")}
    return {
        "policy": (buffers_of(rank._policy), said["policy"]),
        "reference": (buffers_of(rank._reference), said["ref"]),
        "critic": (buffers_of(rank._critic), torch.cat(seen)),
    }


def supervised_numbers(spec: RankSpec, kind: str, stage: int) -> dict[str, Any]:
    from rlaif_ray.learner.dpo import DpoRank
    from rlaif_ray.learner.finetune import SftRank
    from rlaif_ray.learner.supervised import RewardRank

    job, pair = job_of(kind, stage), PairExample(PROMPT, LEFT, RIGHT, 0.7)
    if kind == "sft":
        sft = SftRank(job, spec, "bf16", total_steps=1)
        said = sft.losses([SftExample(PROMPT, LEFT), SftExample(PROMPT, RIGHT)], [[0], [1]])
        return {kind: (buffers_of(sft._engine), torch.tensor([said[0], said[1]]))}
    rank: Any = (RewardRank if kind == "reward-model" else DpoRank)(job, spec, "bf16", total_steps=1)
    pairs = rank.rewards([pair], [[0]]) if kind == "reward-model" else rank.logprobs([pair], [[0]])
    return {kind: (buffers_of(rank._engine), torch.tensor(pairs[0]))}


def at_every_stage(spec: RankSpec) -> dict[int, dict[str, Any]]:
    found = {}
    for stage in STAGES:
        found[stage] = rl_numbers(spec, stage)
        for kind in ("sft", "reward-model", "dpo"):
            found[stage] |= supervised_numbers(spec, kind, stage)
    return found


@pytest.fixture(scope="module")
def found(one_rank: RankProcesses) -> dict[int, dict[str, Any]]:
    folder()  # here, so that the rank need not
    (by_stage,) = one_rank.run(at_every_stage, timeout_s=600)
    return dict(by_stage)


@pytest.fixture(scope="module")
def plain() -> Any:
    """By transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16, attn_implementation="eager").eval()


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_keep_types_and_numbers(stage: int, found: dict[int, dict[str, Any]], plain: Any) -> None:
    expected = buffers_of(plain)
    assert {str(buffer.dtype) for buffer in expected.values()} == {"torch.float32"}
    assert found[stage].keys() == {"policy", "reference", "critic", "sft", "reward-model", "dpo"}
    for who, (buffers, _) in found[stage].items():
        assert buffers.keys() == expected.keys(), who
        for name, buffer in buffers.items():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, expected[name]), (who, name)


ROUNDING = 2.0**-8  # bf16's, of one number


@torch.no_grad()
def test_far_positions_are_those_of_stage_0(found: dict[int, dict[str, Any]], plain: Any) -> None:
    for stage in STAGES[1:]:
        for who, (_, numbers) in found[stage].items():
            torch.testing.assert_close(numbers, found[0][who][1], rtol=ROUNDING, atol=ROUNDING, msg=f"{stage} {who}")
    # Transformers' own attention rounds elsewhere; RoPE in bf16 would be another model.
    asked = [PROMPT] * 2, [LEFT, RIGHT]
    expected = torch.cat(plain_logprobs(plain, *asked))
    rotary = plain.model.rotary_emb
    kept, rotary.inv_freq = rotary.inv_freq, rotary.inv_freq.bfloat16().float()
    other = torch.cat(plain_logprobs(plain, *asked))
    rotary.inv_freq = kept
    gap = (found[0]["policy"][1] - expected).abs().mean()
    assert gap < 0.04 < 0.15 < (other - expected).abs().mean()
