"""The plan of a learner rank against real ranks on DeepSpeed: the bytes that its tensors really have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rlaif_ray.config.jobs import SftJob, TrainJob
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.model_shapes import ModelShape, shape_of_config
from rlaif_ray.models import load_config
from rlaif_ray.runtime.memory_plan import GIB, Machine, learner_memory, trained_models
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses
from tests.tiny import cached_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[int, RankProcesses]]:
    processes = RankProcesses(request.param)
    yield request.param, processes
    processes.close()


def rl_job(ranks: int, stage: int, precision: str) -> TrainJob:
    return embedded(
        TrainJob,
        {
            "policy": {"model": str(cached_tiny_model(tied=False)), "precision": precision},
            "learner": {"ranks": ranks, "zero_stage": stage},
        },
    )


def shape_of(job: Any) -> ModelShape:
    return shape_of_config(load_config(job.policy.model).to_dict(), "x")


def measured(spec: RankSpec, job: TrainJob) -> dict[str, dict[str, int]]:
    """Bytes of weights, gradients and optimizer states of policy, critic and reference after a step of each."""
    import torch

    from rlaif_ray.learner import engine as door
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, job.policy.precision)  # type: ignore[arg-type]
    batch = rank._input([(5, 6, 7)], [(8, 9, 10, 11)], [0])
    found = {}
    for name, engine in (("policy", rank._policy), ("critic", rank._critic)):
        loss = engine(batch).float().pow(2).mean()
        stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
        door.backward(engine, loss, last=stage > 1)  # stages 0 and 1 keep whole gradients until the last micro-batch
        if engine.bfloat16_enabled() and stage == 1:
            assert all(p.grad is None for p in engine.module.parameters())
            gradients = optimizer.fp32_groups_gradients_flat
        elif stage < 2:
            gradients = [p.grad for p in engine.module.parameters()]
        elif stage == 2:
            gradients = [g for group in optimizer.averaged_gradients.values() for g in group]
        else:
            gradients = [optimizer.grad_partitions_flat_buffer]
        held = sum(g.nbytes for g in gradients)
        if stage < 2:
            door.backward(engine, engine(batch).float().pow(2).mean(), last=True)
        door.optimizer_step(engine)
        if stage == 3:
            masters = optimizer.fp32_partitioned_groups_flat
        elif engine.bfloat16_enabled() and stage == 1:
            masters = optimizer.fp32_groups_flat_partition
        elif stage > 0:
            masters = optimizer.single_partition_of_fp32_groups
        else:
            masters = [p for group in getattr(optimizer, "fp32_groups", []) for p in group]
        state = getattr(optimizer, "optimizer", optimizer).state
        moments = [t for values in state.values() for t in values.values() if torch.is_tensor(t) and t.dim() > 0]
        own = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        states = sum(t.nbytes for t in [*masters, *moments])
        found[name] = {"weights": sum(p.nbytes for p in own), "gradients": held, "optimizer": states}
    reference = [getattr(p, "ds_tensor", p) for p in rank._reference.parameters()]
    found["reference"] = {"weights": sum(p.nbytes for p in reference)}
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_holds_what_was_planned(ranks: tuple[int, RankProcesses], stage: int, precision: str) -> None:
    count, processes = ranks
    job = rl_job(count, stage, precision)
    parts = learner_memory(job, shape_of(job), Machine(GIB, 8, 512, 256), "cpu").parts
    for rank in processes.run(measured, job):
        assert rank["policy"] == {name: parts[name] for name in ("weights", "gradients", "optimizer")}
        assert rank["reference"]["weights"] == parts["reference"]
        # Its head of 65 can't be halved: ZeRO pads what it shards to 16 bytes of each tensor.
        assert sum(rank["critic"].values()) == pytest.approx(parts["critic"], abs=3 * 5 * 16)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]])
def test_adapters_are_counted_as_peft_makes_them(tied: bool, targets: list[str] | None) -> None:
    import torch

    from rlaif_ray.learner.lora import add_adapters
    from rlaif_ray.models import load_causal_lm

    model = {"model": str(cached_tiny_model(tied=tied))}
    values = {"policy": model, "data": {"path": "x"}, "sft": {"lora": {"rank": 4, "targets": targets}}}
    job = SftJob.model_validate(values)
    found = load_causal_lm(job.policy.model, dtype=torch.float32, attention="sdpa")
    assert job.sft.lora is not None
    add_adapters(found, job.sft.lora, 0, job.policy.model)
    planned = trained_models(job, shape_of(job))["policy"]
    assert sum(p.numel() for p in found.parameters() if p.requires_grad) == planned.trainable
    assert sum(p.numel() for p in found.parameters() if not p.requires_grad) == planned.frozen
