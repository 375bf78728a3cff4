"""What depends on where a learner's ranks lie: threads of an offloaded optimizer, and whether hpZ's groups hold."""

from __future__ import annotations

import pytest

from rlaif_ray.learner.nodes import share_of_cores, split_groups


@pytest.mark.parametrize(
    ("cores", "nodes", "threads"),
    [
        (128, ["a"] * 8, [16] * 8),
        (96, ["a", "a", "b"], [48, 48, 96]),
        (2, ["a", "a", "a"], [1, 1, 1]),
    ],
)
def test_ranks_share_the_cores_of_their_node(cores: int, nodes: list[str], threads: list[int]) -> None:
    assert [share_of_cores(cores, nodes, rank) for rank in range(len(nodes))] == threads


def test_groups_that_lie_on_several_nodes_are_told() -> None:
    assert split_groups(["a", "a", "b", "b"], 2) == []
    assert split_groups(["a"] * 4, 2) == []  # several groups on a node
    [note] = split_groups(["a", "b", "b", "b"], 2)
    assert note.startswith("1 of 2 groups of learner.hpz_partition_size=2 ranks lie on several nodes")
