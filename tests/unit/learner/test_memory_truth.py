"""The plan of a learner rank against real ranks on DeepSpeed: the bytes that its tensors really have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rlaif_ray.config.jobs import SftJob, TrainJob
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.model_shapes import ModelShape, shape_of_config
from rlaif_ray.models import load_config
from rlaif_ray.runtime.engine_size import GIB
from rlaif_ray.runtime.host_memory import rank_state
from rlaif_ray.runtime.memory_plan import Machine, learner_host_memory, learner_memory, trained_models, zero_of
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses
from tests.tiny import cached_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[int, RankProcesses]]:
    processes = RankProcesses(request.param)
    yield request.param, processes
    processes.close()


def rl_job(ranks: int, stage: int, precision: str, **learner: Any) -> TrainJob:
    return embedded(
        TrainJob,
        {
            "policy": {"model": str(cached_tiny_model(tied=False)), "precision": precision},
            "learner": {"ranks": ranks, "zero_stage": stage, **learner},
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


def copied(spec: RankSpec, job: TrainJob) -> int:
    """Bytes of the tensors that a rank copies for a checkpoint after a step of policy and critic, without its random
    numbers and what DeepSpeed counts its steps in."""
    from rlaif_ray.learner import engine as door
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, job.policy.precision)  # type: ignore[arg-type]
    batch = rank._input([(5, 6, 7)], [(8, 9, 10, 11)], [0])
    for engine in (rank._policy, rank._critic):
        door.backward(engine, engine(batch).float().pow(2).mean(), last=True)
        door.optimizer_step(engine)
    rank.checkpoint.copy()
    states = [state for name, state in rank.checkpoint._copied.items() if not name.startswith("rank-")]
    return sum(tensor.nbytes for state in states for tensor in state.tensors.values() if tensor.dim() > 0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rank_copies_what_was_planned(ranks: tuple[int, RankProcesses], stage: int) -> None:
    count, processes = ranks
    job = rl_job(count, stage, "bf16")
    zero, shape = zero_of(job.learner, "bf16"), shape_of(job)
    each, first = rank_state(zero, trained_models(job, shape))
    for k, bytes_copied in enumerate(processes.run(copied, job)):
        # Padding to 16 bytes of each tensor, and buffers.
        assert bytes_copied == pytest.approx(each + (first if k == 0 else 0), abs=4096)


def _last_backward(engine: Any) -> dict[str, int]:
    """Bytes on the GPU when a bucket has just been reduced, the most so far: gradients of an offloaded stage 1, and the
    bucket."""
    optimizer, found = engine.optimizer, {"gradients": 0, "bucket": 0}
    average = optimizer.average_tensor

    def averaged(tensor: Any, kind: Any) -> None:
        average(tensor, kind)
        own = [t for p in engine.module.parameters() for t in (p.grad, getattr(p, "grad_accum", None)) if t is not None]
        own += [group.flat_partition for group in optimizer.averaged_gradients.values() if group is not None]
        buffers = [buffer for bucket in optimizer.ipg_buckets.values() for buffer in bucket.buffer]
        found["gradients"] = max(found["gradients"], sum(t.nbytes for t in own))
        found["bucket"] = max(found["bucket"], sum(t.nbytes for t in buffers))

    optimizer.average_tensor = averaged
    return found


def offloaded(spec: RankSpec, job: TrainJob) -> dict[str, int]:
    """Bytes of what DeepSpeed keeps in the host's memory for the policy, after a step of two micro-batches."""
    import torch

    from rlaif_ray.learner import engine as door
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, job.policy.precision)  # type: ignore[arg-type]
    engine, batch = rank._policy, rank._input([(5, 6, 7)], [(8, 9, 10, 11)], [0])
    peak = _last_backward(engine) if job.learner.zero_stage == 1 else {}
    for last in (False, True):
        door.backward(engine, engine(batch).float().pow(2).mean(), last=last)
        sums = [getattr(p, "grad_accum", None) for p in engine.module.parameters()]  # in bf16, those in fp32
        held = sum(g.nbytes for g in (*sums, *(p.grad for p in engine.module.parameters())) if g is not None)
        # Stage 1: whole on the GPU until the last one, and sums in fp32 of others' parts until the step.
        others = engine.bfloat16_enabled() and spec.world_size > 1
        assert (held > 0) == (job.learner.zero_stage == 1 and (not last or others))
    optimizer = engine.optimizer
    masters: list[Any]
    if job.learner.zero_stage == 3:
        assert optimizer.offload_optimizer
        masters = optimizer.fp32_partitioned_groups_flat
        summed = [optimizer.grad_partitions_flat_buffer]
    else:
        assert optimizer.cpu_offload
        masters = optimizer.single_partition_of_fp32_groups
        # Of a tensor that two ranks share each keeps the whole sum, so at most two more than its share.
        summed = [*optimizer.accumulated_grads_in_cpu.values(), *optimizer.param_buffer_of_bit16_for_cpu_offload_groups]
    gradients = [master.grad for master in masters]
    held = sum(t.nbytes for t in (*masters, *gradients, *summed))
    door.optimizer_step(engine)
    state = getattr(optimizer, "optimizer", optimizer).state
    held += sum(t.nbytes for own in state.values() for t in own.values() if torch.is_tensor(t) and t.dim() > 0)
    found = {"optimizer": held, **peak}
    if job.learner.offload.parameters == "cpu":
        models = [rank._model, rank._critic.module, rank._reference.module]  # type: ignore[union-attr]
        assert all(p.ds_tensor.device.type == "cpu" for model in models for p in model.parameters())
        found["parameters"] = sum(p.ds_tensor.nbytes for model in models for p in model.parameters())  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_node_holds_what_was_planned(ranks: tuple[int, RankProcesses], stage: int, precision: Any) -> None:
    count, processes = ranks
    job = rl_job(count, stage, precision, offload={"optimizer": "cpu", "parameters": "cpu" if stage == 3 else "none"})
    shape = shape_of(job)
    planned = learner_host_memory(job, shape, "cpu")
    parts = learner_memory(job, shape, Machine(GIB, 8, 512, 256), "cpu").parts
    on_gpu = stage == 1 or (stage == 2 and precision == "bf16")  # sums in another type than the weights'
    assert (parts["gradients"] > 0) == on_gpu
    assert parts["optimizer"] == 0 and (parts["weights"] == 0) == (stage == 3)
    models = trained_models(job, shape)
    policy = planned["optimizer"] * models["policy"].trainable / sum(m.trainable for m in models.values())
    largest = shape.vocabulary * shape.hidden * 4
    for found in processes.run(offloaded, job):
        assert found["optimizer"] == pytest.approx(policy, abs=2 * largest if count > 1 and stage < 3 else 64)
        if stage == 1:
            zero = zero_of(job.learner, precision)
            assert found["gradients"] == pytest.approx(zero.gradients(models["policy"]), abs=64)
            gathering = 50_000_000 * (4 if precision == "fp32" else 2)
            assert found["bucket"] == zero.bucket_bytes - gathering
        if stage == 3:
            assert found["parameters"] == pytest.approx(planned["parameters"], abs=3 * 5 * 16)


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
