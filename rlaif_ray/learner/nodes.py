"""Which nodes the ranks are on, and what follows from it."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rlaif_ray.config.sections import LearnerConfig


def use_host_threads() -> None:
    """Has this process compute on its share of the node's cores, for an optimizer that is offloaded to them.

    Ray leaves a process that has a GPU a single thread. A collective: all ranks call it.
    """
    if torch.distributed.get_backend() != "nccl":  # ranks on CPUs have their threads from the start
        return
    torch.set_num_threads(share_of_cores(usable_cores(), _nodes_of_ranks(), torch.distributed.get_rank()))


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use at a time: those that it is bound to, and no more than its container's share.

    A share is a quota of CPU time (Kubernetes' limits.cpu): more threads than it has cores are stopped for most of
    every period. Parents of a control group limit it too.
    """
    quotas = [quota for folder in _control_groups(groups, own) if (quota := _quota(folder)) is not None]
    return max(1, min(len(os.sched_getaffinity(0)), *(math.floor(quota) for quota in quotas), 1 << 20))


def _control_groups(groups: Path, own: Path) -> Iterator[Path]:
    """Of this process and its parents, as far as they can be seen from here: version 2, and version 1's for CPUs."""
    roots = {"": groups}
    for name in ("cpu", "cpu,cpuacct", "cpuacct,cpu"):
        roots |= {"cpu": groups / name} if (groups / name).is_dir() else {}
    yield from roots.values()
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            root = roots.get("cpu" if "cpu" in kinds.split(",") else kinds)
            if root is not None:
                folder = root / path.lstrip("/")
                yield from (one for one in (folder, *folder.parents) if one.is_relative_to(root))


def _quota(folder: Path) -> float | None:
    """Cores' worth of CPU time; None: no limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # not there, or "max"
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            return quota / period if quota > 0 and period > 0 else None
    return None


def _nodes_of_ranks() -> list[str]:
    """A collective: all ranks call it."""
    nodes: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(nodes, socket.gethostname())
    return nodes


def share_of_cores(cores: int, nodes: Sequence[str], rank: int) -> int:
    """Threads of a rank: its node's cores over the ranks there; `nodes` has each rank's node."""
    return max(1, cores // nodes.count(nodes[rank]))


SPLIT = {
    "hpz_partition_size": "the second copies of the weights save no traffic between nodes there",
    "sequence_parallel": "every layer's attention waits for the network between nodes there",
}


def group_notes(cfg: LearnerConfig) -> list[str]:
    """What the user should know of the groups of ranks as they were placed. A collective: all ranks call it."""
    nodes = _nodes_of_ranks() if cfg.neighbours > 1 else []
    return [note for name in SPLIT if nodes for note in split_groups(nodes, name, getattr(cfg, name))]


def split_groups(nodes: Sequence[str], name: str, size: int) -> list[str]:
    """A note where groups of `size` ranks, by the setting `name`, are not each on one node; `nodes` has each rank's."""
    groups = [nodes[start : start + size] for start in range(0, len(nodes), size)]
    split = sum(len(set(group)) > 1 for group in groups)
    if not split:
        return []
    return [
        f"{split} of {len(groups)} groups of learner.{name}={size} ranks lie on several nodes: {SPLIT[name]}. Results "
        f"are the same."
    ]
