"""ZeRO++ hpZ on four ranks in two groups, as two GPUs on each of two nodes: one rank's numbers, from second copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.types import Experience
from tests.learner_ranks import RankProcesses
from tests.unit.learner.test_update import (
    UNEVEN_PARTS,
    assert_same_weights,
    sharded_job,
    train,
    uneven_experience,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses(4)
    yield ranks
    ranks.close()


def copies(spec: RankSpec, job: TrainJob, experience: Experience) -> dict[str, Any]:
    """Elements of the second copies while a forward pass has made them, and after a step; the sums over ranks."""
    from rlaif_ray.learner import engine as door
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, "fp32")
    batch = rank._input([(5, 6, 7)], [(8, 9, 10, 11)], [0])
    logprobs, _ = rank._policy(batch, 1.0)

    def held() -> dict[str, int]:
        found = {n: p.ds_secondary_tensor for n, p in rank._model.named_parameters()}
        return {name: 0 if copy is None else copy.numel() for name, copy in found.items()}

    during = held()
    door.backward(rank._policy, logprobs.sum(), last=True)
    door.optimizer_step(rank._policy)
    return {"during": during, "after": held(), "elements": {n: p.ds_numel for n, p in rank._model.named_parameters()}}


def test_four_ranks_in_two_groups_equal_one(one_rank: RankProcesses, four_ranks: RankProcesses) -> None:
    job = sharded_job(0, 1e9)
    want = one_rank.run(train, job, uneven_experience(job), UNEVEN_PARTS)[0]
    job = sharded_job(3, 1e9, ranks=4, hpz_partition_size=2)
    results = four_ranks.run(train, job, uneven_experience(job), UNEVEN_PARTS, timeout_s=300)
    for name, weight in results[0]["weights"].items():
        assert all(torch.equal(other["weights"][name], weight) for other in results), f"the ranks disagree on {name}"
    assert_same_weights(results[0]["weights"], want["weights"], tolerance=1e-3)
    assert not any(results[0]["elements"])
    for found in four_ranks.run(copies, job, uneven_experience(job), timeout_s=300):
        for name, count in found["elements"].items():
            assert found["during"][name] == -(-count // 4) * 2, name  # half of it: two ranks have all
            assert found["after"][name] == 0, f"the copy of {name} outlived the step that changed it"
