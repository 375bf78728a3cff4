"""Host memory of nodes and the weight of checkpoints, by hand for models of 8 and 70 billion parameters."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif_ray.config.jobs import DpoJob, EvaluateJob, TrainJob
from rlaif_ray.model_shapes import ModelShape, known_shapes
from rlaif_ray.runtime.fit import Phase, plan_job
from rlaif_ray.runtime.host_memory import CheckpointCost, checkpoint_cost, rank_state
from rlaif_ray.runtime.memory_plan import GIB, Machine, Trained, zero_of
from tests.jobs import embedded

B8, B70 = 8_030_261_248, 70_553_706_496  # Llama 3.1 8B and 70B
CRITIC = B8 - 128_256 * 4096 + 4097
STORE = int(0.3 * GIB)


def shapes(section: Any) -> ModelShape:
    return known_shapes()[section.model]


def phase(machine_gb: float | None = None, policy: str = "8B", **sections: Any) -> tuple[Any, Phase]:
    values = {
        "policy": {"model": f"meta-llama/Llama-3.1-{policy}"},
        "feedback": {"type": "judge", "judge": {"model": "meta-llama/Llama-3.1-8B"} | sections.pop("judge", {})},
        "algorithm": {"type": "ppo"},
        "cluster": {"device": "gpu"},
        "sampling": {"prompts_per_step": 64},
    }
    job = embedded(TrainJob, {**values, **sections})
    device: Any = "cpu" if job.cluster.device == "cpu" else "cuda"
    host = None if machine_gb is None else int(machine_gb * GIB)
    (found,) = plan_job(job, Machine(80 * GIB, 8, 4096, 2048, host), shapes, device).phases
    return job, found


EIGHT = {"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True}


def test_8b_ppo_on_a_node() -> None:
    """8 ranks that share GPUs with as many sleeping engines: each rank copies an eighth of 12 bytes a parameter of
    policy and critic; an engine asleep has 2 bytes a parameter here, half as much again for how torch pins."""
    shared = {"replicas": 8, "gpu_memory_utilization": 0.35, "sleep": True}
    _, found = phase(learner=EIGHT, rollout=shared, cluster={"device": "gpu", "gpus_per_actor": 0.5}, judge=shared)
    assert list(found.nodes) == [{"learner": 8, "rollout": 8}, {"judge": 8}]
    copies = 8 * (12 * -(-B8 // 8) + 12 * -(-CRITIC // 8))
    assert [parts.get("checkpoint copies") for parts in found.host] == [copies, None]
    assert sum(parts["sleeping engines"] for parts in found.host) == 16 * int(1.5 * 2 * B8)
    assert sum(parts["processes"] for parts in found.host) == 24 * 2 * GIB
    assert all(parts["object store"] == STORE for parts in found.host)


def test_70b_over_three_nodes() -> None:
    """24 ranks: 12 bytes of 70.6 billion, a third of it on each node, 262.8 GiB, more than a node of 256 has."""
    large = {"learner": {**EIGHT, "ranks": 24}, "rollout": {"tensor_parallel": 8}, "algorithm": {"type": "rloo"}}
    large["judge"] = {"tensor_parallel": 8}
    job, found = phase(256, "70B", **large)
    learning = [parts for node, parts in zip(found.nodes, found.host, strict=True) if node == {"learner": 8}]
    copies = 8 * 12 * -(-B70 // 24)
    # When rank 0 loads the saved model again, 141 GB, its copies of the last checkpoint are gone: it fits in them.
    assert learning == [{"processes": 16 * GIB, "checkpoint copies": copies, "object store": STORE}] * 3
    assert {"processes": 9 * 2 * GIB, "object store": STORE} in found.host  # an engine of 8 workers and their head
    (text,) = [problem.text for problem in found.problems]
    assert text == (
        "a node with 8 learner needs 279.1 GiB of host memory, most of it for checkpoint copies (262.8 GiB), and has "
        "256.0 GiB"
    )
    assert not phase(300, "70B", **large)[1].problems and not phase(None, "70B", **large)[1].problems
    cost = checkpoint_cost(job, found.actors, "cuda", 2.0)
    assert cost is not None and cost.bytes == 24 * 12 * -(-B70 // 24)
    assert cost.seconds == pytest.approx(423.3, abs=0.1)
    assert (cost.enough, cost.needed_grace_s, cost.hook_grace_s, cost.cluster_grace_s) == (False, 900, 910, 930)


def test_rank_0_loads_the_saved_model_where_nothing_else_is_as_large() -> None:
    """LoRA: a checkpoint holds no optimizer states of frozen weights, under ZeRO-3 the weights themselves."""
    lora = {"policy": {"model": "meta-llama/Llama-3.1-8B"}, "data": {"path": "x"}, "cluster": {"device": "gpu"}}
    job = embedded(DpoJob, {**lora, "dpo": {"lora": {"rank": 8}}, "learner": {**EIGHT, "ranks": 2}})
    (found,) = plan_job(job, Machine(80 * GIB, 8, 4096, 2048), shapes, "cuda").phases
    (parts,) = found.host
    assert job.dpo.lora is not None
    adapters = known_shapes()["meta-llama/Llama-3.1-8B"].adapters(8, job.dpo.lora.targets)
    assert parts["checkpoint copies"] == 2 * (12 * adapters // 2 + 2 * B8 // 2)
    assert "the saved model" not in parts
    # Without ZeRO-3 and in fp32: rank 0 gathers 4 bytes a parameter, of which the copy of the weights is 2.
    wide = {**lora["policy"], "save_precision": "fp32"}
    values = {**lora, "policy": wide, "dpo": {"lora": {"rank": 8}}, "guard": {"saved": False}}
    job = embedded(DpoJob, values)
    (parts,) = plan_job(job, Machine(80 * GIB, 8, 4096, 2048), shapes, "cuda").phases[0].host
    assert parts["checkpoint copies"] == (12 + 2) * adapters + 2 * B8
    assert parts["the saved model"] == 4 * B8 - parts["checkpoint copies"]


# As DeepSpeed divides a billion parameters over 4 ranks in bf16: optimizer states and fp32 weights by rank, stage 0 as
# stage 1; weights by rank 0, unless they are the shards of stage 3, which the fp32 weights make again.
@pytest.mark.parametrize(
    ("stage", "each", "first"),
    [(0, 3 * 10**9, 2 * 10**9), (1, 3 * 10**9, 2 * 10**9), (2, 3 * 10**9, 2 * 10**9), (3, 3 * 10**9, 0)],
)
def test_who_writes_what(stage: Any, each: int, first: int) -> None:
    from rlaif_ray.config.sections import LearnerConfig

    zero = zero_of(LearnerConfig(ranks=4, zero_stage=stage), "bf16")
    models = {"policy": Trained(10**9, 0), "reference": Trained(0, 10**9)}
    assert rank_state(zero, models) == (each, first)


def test_offloaded_states_are_in_host_memory() -> None:
    """Optimizer states of 12 bytes a parameter, fp32 gradients of 4, and 2 of what micro-batches add up in bf16, of
    policy and critic; the copy comes on top."""
    offload: dict[str, Any] = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    offload["data_types"] = {"grad_accum_dtype": "bf16"}
    found = phase(learner={**EIGHT, "deepspeed_overrides": offload})[1].host
    states = sum(parts.get("offloaded states", 0) for parts in found)
    assert states == 8 * 18 * (-(-B8 // 8) + -(-CRITIC // 8))
    offload["zero_optimization"]["offload_param"] = {"device": "cpu"}
    found = phase(learner={**EIGHT, "deepspeed_overrides": offload})[1].host
    weights = 8 * 2 * (2 * -(-B8 // 8) + -(-CRITIC // 8))  # policy, reference, critic
    assert sum(parts.get("offloaded states", 0) for parts in found) == states + weights


def test_on_cpus_models_are_in_host_memory() -> None:
    """fp32: weights, gradients and Adam's moments, 16 bytes of policy and critic, 4 of the reference; an engine's
    weights and a GB of KV cache."""
    (parts,) = phase(cluster={"device": "cpu"})[1].host
    assert parts["models"] == 16 * (B8 + CRITIC) + 4 * B8 + 2 * (4 * B8 + GIB)
    assert parts["processes"] == 3 * GIB and parts["checkpoint copies"] == 12 * (B8 + CRITIC)
    short = phase(256, cluster={"device": "cpu"})[1].problems
    assert [problem.text.split(",")[0] for problem in short] == ["a node with 1 rollout"]


def test_jobs_without_a_learner_have_no_checkpoint() -> None:
    judge = {"type": "vllm", "model": "meta-llama/Llama-3.1-8B"}
    job = embedded(EvaluateJob, {"cluster": {"device": "gpu"}, "judge": judge, "data": {"path": "pairs.jsonl"}})
    plan = plan_job(job, Machine(80 * GIB, 8, 4096, 2048, GIB), shapes, "cuda")
    assert checkpoint_cost(job, [one for p in plan.phases for one in p.actors], "cuda", 2.0) is None
    assert not plan.fits  # two GB of the judge's process, on nodes of one


@pytest.mark.parametrize(
    ("size", "grace", "needed", "cluster"),
    [(0, 90, 30, 120), (30e9, 90, 60, 120), (90e9, 120, 120, 150), (91e9, 90, 150, 180)],
)
def test_grace(size: float, grace: float, needed: int, cluster: int) -> None:
    """Twice the seconds of one, at 2 GB/s, in steps of 30, and one more."""
    cost = CheckpointCost(int(size), 2.0, grace)
    assert (cost.needed_grace_s, cost.cluster_grace_s, cost.enough) == (needed, cluster, grace >= needed)
