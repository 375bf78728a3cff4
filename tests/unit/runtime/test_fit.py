"""Where bundles go, what doesn't fit, and the nearest settings that do: by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.model_shapes import ModelShape, known_shapes
from rlaif_ray.runtime.engine_size import GIB
from rlaif_ray.runtime.fit import Plan, _learner_options, _problems, place, plan_job, proposals, with_changes, written
from rlaif_ray.runtime.memory_plan import Machine
from rlaif_ray.runtime.placement import Slot, actor_slots
from tests.jobs import embedded

MACHINE = Machine(80 * GIB, 8, judge_context=4096, prompt_tokens=1024)


def shapes(section: Any) -> ModelShape:
    return known_shapes()[section.model]


def job(policy: str = "Qwen/Qwen2.5-7B", judge: str = "Qwen/Qwen2.5-7B", **sections: Any) -> TrainJob:
    feedback = {"type": "judge", "judge": {"model": judge} | sections.pop("judge_engine", {})}
    cluster = {"device": "gpu"} | sections.pop("cluster", {})
    sampling = {"prompts_per_step": 128, "samples_per_prompt": 4}
    values = {"policy": {"model": policy}, "feedback": feedback, "sampling": sampling, "cluster": cluster}
    return embedded(TrainJob, {"algorithm": {"type": "rloo"}, **values, **sections})


def planned(config: TrainJob, machine: Machine = MACHINE) -> Plan:
    return plan_job(config, machine, shapes, "cuda")


def found(config: TrainJob, machine: Machine = MACHINE) -> list[dict[str, Any]]:
    plan = planned(config, machine)
    assert not plan.fits
    changes = proposals(config, plan, lambda changed: planned(changed, machine), machine)
    for one in changes:  # each really fits
        changed = with_changes(config, one)
        assert changed is not None and planned(changed, machine).fits
    return [dict(one) for one in changes]


def slots(*gpus: float) -> list[Slot]:
    """A bundle each."""
    return [Slot(f"r{k}", 0, 1.0, count, k) for k, count in enumerate(gpus)]


@pytest.mark.parametrize(
    ("gpus", "nodes", "tenants"),
    [
        ([1, 1, 1], [3], [["r0"], ["r1"], ["r2"]]),
        ([8, 1, 8], [1, 1, 1], [["r0"]] * 8 + [["r2"]] * 8 + [["r1"]]),
        ([1, 8, 4, 4], [1, 2, 1], [["r1"]] * 8 + [["r2"]] * 4 + [["r3"]] * 4 + [["r0"]]),
        ([0, 0], [2], []),
    ],
)
def test_place(gpus: list[float], nodes: list[int], tenants: list[list[str]]) -> None:
    placed, roles = place(slots(*gpus), 8)
    assert sorted(sum(node.values()) for node in placed) == sorted(nodes)
    assert sorted(roles) == sorted(tenants)


def test_shared_gpus_get_one_actor_of_each_role() -> None:
    three = {"replicas": 3}
    config = job(rollout=three, learner={"ranks": 3}, judge_engine=three, cluster={"gpus_per_actor": 0.33})
    order = [(slot.role, slot.index) for slot in actor_slots(config, "cuda")]
    assert order == [(role, index) for index in range(3) for role in ("rollout", "judge", "learner")]
    _, tenants = place(actor_slots(config, "cuda"), 8)
    assert [sorted(roles) for roles in tenants] == [["judge", "learner", "rollout"]] * 3
    on_cpus = [slot.role for slot in actor_slots(config, "cpu")]
    assert on_cpus == ["rollout"] * 3 + ["learner"] * 3 + ["judge"] * 3


def test_bundles_of_a_large_job() -> None:
    plan = planned(
        job(
            "meta-llama/Llama-3.1-70B",
            "Qwen/Qwen2.5-72B",
            rollout={"tensor_parallel": 8},
            judge_engine={"tensor_parallel": 8},
            learner={"ranks": 24, "zero_stage": 3, "gradient_checkpointing": True},
        )
    )
    assert plan.fits and plan.phases[0].gpus == 40
    assert list(plan.phases[0].nodes) == [{"rollout": 1}, {"judge": 1}, *[{"learner": 8}] * 3]


def test_a_learner_that_is_too_large_needs_more_than_one_setting() -> None:
    """16 x 7.6 billion bytes are 113.5 GiB, the reference 14.2: a quarter of it fits beside activations; on one GPU it
    does where optimizer states and gradients are in the host's memory. Ranks without ZeRO save nothing."""
    got = found(job())
    assert got[0] == {"learner.zero_stage": 3, "learner.offload.optimizer": "cpu"}
    assert {"learner.zero_stage": 3, "learner.ranks": 4} in got


def test_weights_may_go_to_the_host_too() -> None:
    """70B over 8 ranks with ZeRO-3: weights and the reference's are 33 GiB a rank, without the optimizer's 16 bytes."""
    learner = {"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True, "tokens_per_micro_batch": 1024}
    config = job("meta-llama/Llama-3.1-70B", learner=learner, rollout={"tensor_parallel": 8})
    offloads = [one for one in found(config) if any("offload" in key for key in one)]
    assert offloads and all(set(one.values()) == {"cpu"} for one in offloads[:1])


def test_the_logits_of_a_large_vocabulary_are_held_in_smaller_chunks() -> None:
    """32768 tokens times 152064 words are 9.3 GiB in bf16, and as much again of scratch is not needed."""
    learner = {"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True, "tokens_per_micro_batch": 32768}
    options = dict(_learner_options(job(learner=learner | {"logits_chunk": None})))
    assert options["learner.logits_chunk"] == [4096, 2048, 1024, 512, 256]
    assert dict(_learner_options(job(learner=learner)))["learner.logits_chunk"] == [2048, 1024, 512, 256]


def test_one_setting_comes_first() -> None:
    """ZeRO-3 on 4 ranks holds 32 GiB; 32768 tokens without checkpointing are about 200 more."""
    config = job(learner={"ranks": 4, "zero_stage": 3, "tokens_per_micro_batch": 32768})
    assert {"learner.gradient_checkpointing": True} in found(config)
    assert all(len(one) == 1 for one in found(config))


def test_stages_are_named_from_the_nearest_on() -> None:
    """On 4 ranks stage 2 leaves 14.2 + 7.1 + 21.3 and the reference's 14.2: enough. It must not say 3."""
    config = job(learner={"ranks": 4, "gradient_checkpointing": True})
    assert found(config)[0] == {"learner.zero_stage": 2}


def test_an_engine_that_is_too_large_is_split() -> None:
    """61 GiB of weights in the 68 of one GPU leave less than workspace and a sequence need."""
    learner = {"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True}
    got = found(job(judge="Qwen/Qwen2.5-72B", learner=learner, judge_engine={"tensor_parallel": 1}))
    assert {"feedback.judge.tensor_parallel": 4} in got
    assert not any("learner" in key or "rollout" in key for one in got for key in one)


def test_engines_and_learner_of_a_shared_gpu_add_up() -> None:
    """Two engines reserve 0.85 of it each, whatever they need: one setting alone can't do."""
    learner = {"ranks": 1, "gradient_checkpointing": True}
    config = job("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", learner=learner, cluster={"gpus_per_actor": 0.33})
    (problem,) = planned(config).problems
    assert problem.text.startswith("judge + learner + rollout take 1")
    assert problem.text.endswith("which has 76.0 GiB without what the allocator loses")
    assert {"cluster.gpus_per_actor": 1.0} in found(config)
    small = {"gpu_memory_utilization": 0.25}
    shared = {"learner": learner, "rollout": small, "judge_engine": small, "cluster": {"gpus_per_actor": 0.33}}
    assert planned(job("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", **shared)).fits


def test_a_context_too_long_for_a_gpu_is_shared_by_ranks() -> None:
    """128k tokens on 8 ranks with ZeRO-3 and checkpointing: no smaller micro-batch helps, as one sample is one."""
    long = {"rollout": {"max_context": 131072}, "judge_engine": {"max_context": 8192}}
    learner = {"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True}
    config = job("meta-llama/Llama-3.1-8B", learner=learner, **long)
    assert [problem.roles for problem in planned(config).problems] == [("learner",)]
    assert any(set(one) == {"learner.sequence_parallel"} for one in found(config))
    twelve = learner | {"ranks": 12, "sequence_parallel": 12}
    texts = [problem.text for problem in planned(job("meta-llama/Llama-3.1-8B", learner=twelve, **long)).problems]
    assert texts == ["learner: 32 attention and 8 key-value heads can't be split by learner.sequence_parallel=12"]


def test_learner_ranks_get_a_gpu_each() -> None:
    """Four ranks, an engine and a judge would be on two GPUs of three: NCCL refuses two ranks on one."""
    learner = {"ranks": 4, "zero_stage": 3, "gradient_checkpointing": True}
    small = {"gpu_memory_utilization": 0.3}
    shared = {"learner": learner, "rollout": small, "judge_engine": small, "cluster": {"gpus_per_actor": 0.33}}
    (phase,) = planned(job("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", **shared)).phases
    assert not phase.problems and phase.gpus == 4 and phase.shared == (("judge", "learner", "rollout"),)


def test_what_ray_or_the_weight_sync_refuses_is_a_problem_of_the_plan() -> None:
    sections = {"rollout": {"tensor_parallel": 2}, "cluster": {"gpus_per_actor": 0.33}}
    texts = [problem.text for problem in planned(job("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", **sections)).problems]
    assert any(text.startswith("weight_sync.backend=ipc needs a learner rank on the GPU") for text in texts)


def test_what_sleeps_makes_room_for_the_learner_and_not_for_other_engines() -> None:
    """Engines of 21.6 and 24 GiB and a learner of 32: at work together 78 of the 76 that torch's allocator leaves, but
    one sleeps while the learner learns, and the learner's activations are gone while the engines are at work."""
    shared = {
        "learner": {"gradient_checkpointing": True},
        "rollout": {"gpu_memory_utilization": 0.27},
        "judge_engine": {"gpu_memory_utilization": 0.3},
        "cluster": {"gpus_per_actor": 0.33},
    }
    (phase,) = planned(job("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", **shared)).phases
    (problem,) = phase.problems
    rollout, judge, learner = phase.actors
    total = sum(one.memory.reserved for one in phase.actors)
    assert 76 * GIB < total < 80 * GIB and problem.text.startswith("judge + learner + rollout take 77")
    asleep = replace(rollout, memory=replace(rollout.memory, resting=2 * GIB))
    working = learner.memory.reserved - learner.memory.resting
    assert total - working < 76 * GIB
    assert list(_problems([asleep, judge, learner], phase.shared, MACHINE)) == []
    larger = replace(judge, memory=replace(judge.memory, reserved=judge.memory.reserved + working))
    assert len(list(_problems([asleep, larger, learner], phase.shared, MACHINE))) == 1


def test_an_engine_must_stay_on_one_node() -> None:
    config = job(rollout={"tensor_parallel": 16}, learner={"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True})
    texts = [problem.text for problem in planned(config).problems]
    assert "rollout needs 16 GPUs on one node, of which each has 8" in texts
    assert "rollout: 28 attention heads can't be split over 16" in texts


def test_each_role_is_solved_where_two_settings_are_not_enough() -> None:
    """A 70B policy and a 72B judge with every default: told together, and they fit."""
    (one,) = found(job("meta-llama/Llama-3.1-70B", "Qwen/Qwen2.5-72B"))
    assert {"learner.zero_stage", "learner.ranks", "rollout.tensor_parallel"} <= set(one)
    assert one["learner.zero_stage"] == 3


def test_nothing_is_proposed_that_contradicts_the_config() -> None:
    """No more ranks than samples of a minibatch."""
    config = job(sampling={"prompts_per_step": 1, "samples_per_prompt": 2})
    ranks = [one.get("learner.ranks", 1) for one in found(config, replace(MACHINE, gpu_bytes=141 * GIB))]
    assert ranks and max(ranks) <= 2


def test_nothing_is_proposed_where_nothing_helps() -> None:
    machine = Machine(2 * GIB, 1, judge_context=4096, prompt_tokens=1024)
    assert found(job("Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-72B"), machine) == []


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (0.9, "0.9"), (16, "16")])
def test_values_are_written_as_the_command_line_takes_them(value: Any, text: str) -> None:
    assert written(value) == text
