"""A GPU that learner and engine share, during a push: by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.learner.model_state import layer_groups
from rlaif_ray.model_shapes import known_shapes
from rlaif_ray.rollout.buckets import largest, make_buckets
from rlaif_ray.runtime.fit import _problems, plan_job
from rlaif_ray.runtime.memory_plan import FREE_FOR_ALLOCATOR, GIB, Actors, Machine
from rlaif_ray.runtime.push_memory import largest_bucket, push_bytes, while_pushing
from tests.jobs import embedded

MIB = 2**20
EIGHT = "meta-llama/Llama-3.1-8B"  # 128256 x 4096 embedding and head; 218,112,000 parameters a layer
TABLE, LAYER = 128256 * 4096, 218_112_000


def job(stage: int, **sections: Any) -> TrainJob:
    values = {
        "policy": {"model": EIGHT},
        "feedback": {"type": "judge", "judge": {"model": EIGHT, "gpu_memory_utilization": 0.3}},
        "algorithm": {"type": "rloo"},
        "learner": {"ranks": 8, "zero_stage": stage, "gradient_checkpointing": True},
        "rollout": {"replicas": 8, "gpu_memory_utilization": 0.3},
        "cluster": {"device": "gpu", "gpus_per_actor": 0.33},
    }
    return embedded(TrainJob, {**values, **sections})


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        (64 * MIB, (TABLE + 4096) * 2),  # the head and the last norm
        (1200 * MIB, 1200 * MIB),
        (10**12, 8_030_261_248 * 2),
    ],
)
def test_the_largest_bucket_of_8b_by_hand(limit: int, size: int) -> None:
    assert largest_bucket(known_shapes()[EIGHT], 2, limit) == size


@pytest.mark.parametrize("limit", [MIB, 64 * MIB, 900 * MIB, 2000 * MIB])
def test_no_real_bucket_is_larger(limit: int) -> None:
    """By the functions that a push makes them with."""
    metadata: list[Any] = [("model.embed_tokens.weight", "bfloat16", (128256, 4096))]
    metadata += [(f"model.layers.{k}.weights", "bfloat16", (LAYER,)) for k in range(32)]
    metadata += [("model.norm.weight", "bfloat16", (4096,)), ("lm_head.weight", "bfloat16", (128256, 4096))]
    buckets = make_buckets(layer_groups([name for name, *_ in metadata]), metadata, limit)
    bound = largest_bucket(known_shapes()[EIGHT], 2, limit)
    assert bound * 0.6 < largest(buckets) <= bound


def test_a_push_is_a_phase_of_a_shared_gpu() -> None:
    """Two slots, and under ZeRO-3 two gathered buckets, beside the learner's states and the engine's weights."""
    machine = Machine(80 * GIB, 8, judge_context=4096, prompt_tokens=1024)
    bucket = (TABLE + 4096) * 2
    for stage, buckets in ((2, 2), (3, 4)):
        config = job(stage)
        (phase,) = plan_job(config, machine, lambda section: known_shapes()[section.model], "cuda").phases
        push = push_bytes(config, phase.actors, "cuda")
        assert push == buckets * bucket
        rollout, judge, learner = phase.actors

        def at(one: Actors, reserved: int, resting: int, **parts: int) -> Actors:
            memory = replace(one.memory, reserved=reserved, resting=resting, parts=one.memory.parts | parts)
            return replace(one, memory=memory)

        # Learning takes 26 GiB, the engines at work beside the learner 40. A push: 20 + 15 + 3 + 2 and its buffers.
        parts = {"weights": 15 * GIB, "workspace": 3 * GIB}
        tenants = [
            at(rollout, 18 * GIB, 2 * GIB, **parts),
            at(judge, 2 * GIB, 2 * GIB),
            at(learner, 22 * GIB, 20 * GIB),
        ]
        need = int((40 * GIB + push) / (1 - FREE_FOR_ALLOCATOR))
        for gpu_bytes, wrong in ((need + 2, 0), (need - 2, 1)):
            texts = [one.text for one in _problems(tenants, phase.shared, replace(machine, gpu_bytes=gpu_bytes), push)]
            assert sum("of the GPU that they share during a weight sync, which has" in text for text in texts) == wrong
        # One that keeps its memory takes its whole share.
        tenants[0] = at(rollout, 18 * GIB, 18 * GIB, **parts)
        assert while_pushing(tenants[0], push) == 18 * GIB


def test_other_jobs_and_processors_push_nothing() -> None:
    assert push_bytes(None, [], "cuda") == 0
