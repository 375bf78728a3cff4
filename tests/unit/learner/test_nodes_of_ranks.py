"""What depends on where a learner's ranks lie: threads of an offloaded optimizer, and whether groups of ranks hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlaif_ray.learner.nodes import share_of_cores, split_groups, usable_cores


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
    assert split_groups(["a", "a", "b", "b"], "hpz_partition_size", 2) == []
    assert split_groups(["a"] * 4, "hpz_partition_size", 2) == []  # several groups on a node
    for name in ("hpz_partition_size", "sequence_parallel"):
        [note] = split_groups(["a", "b", "b", "b"], name, 2)
        assert note.startswith(f"1 of 2 groups of learner.{name}=2 ranks lie on several nodes")


def test_a_containers_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    groups, own = tmp_path / "groups", tmp_path / "own"
    assert usable_cores(groups, own) == 64  # no control groups
    (groups / "pod/job").mkdir(parents=True)
    (groups / "cpu.max").write_text("max 100000\n")
    assert usable_cores(groups, own) == 64
    own.write_text("0::/pod/job\n")
    (groups / "pod/cpu.max").write_text("800000 100000\n")  # the pod's limit holds for what is in it
    assert usable_cores(groups, own) == 8
    (groups / "pod/job/cpu.max").write_text("150000 100000\n")
    assert usable_cores(groups, own) == 1
    (groups / "pod/job/cpu.max").write_text("9600000 100000\n")  # more than there are cores for
    (groups / "pod/cpu.max").unlink()
    assert usable_cores(groups, own) == 64


def test_a_containers_share_by_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    folder, own = tmp_path / "cpu,cpuacct", tmp_path / "own"
    folder.mkdir()
    own.write_text("5:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n")  # a path outside of the container
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1", 64), ("1600000", 16), ("50000", 1)):
        (folder / "cpu.cfs_quota_us").write_text(quota)
        assert usable_cores(tmp_path, own) == cores
