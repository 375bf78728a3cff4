"""Which nodes the ranks are on, and what follows from it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
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
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(share_of_cores(cores, _nodes_of_ranks(), torch.distributed.get_rank()))


def _nodes_of_ranks() -> list[str]:
    """A collective: all ranks call it."""
    nodes: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(nodes, socket.gethostname())
    return nodes


def share_of_cores(cores: int, nodes: Sequence[str], rank: int) -> int:
    """Threads of a rank: its node's cores over the ranks there; `nodes` has each rank's node."""
    return max(1, cores // nodes.count(nodes[rank]))


def hpz_notes(cfg: LearnerConfig) -> list[str]:
    """What the user should know of hpZ's groups as the ranks were placed. A collective: all ranks call it."""
    return split_groups(_nodes_of_ranks(), cfg.hpz_partition_size) if cfg.hpz_partition_size > 1 else []


def split_groups(nodes: Sequence[str], size: int) -> list[str]:
    """A note where groups of `size` ranks are not each on one node; `nodes` has each rank's node."""
    groups = [nodes[start : start + size] for start in range(0, len(nodes), size)]
    split = sum(len(set(group)) > 1 for group in groups)
    if not split:
        return []
    return [
        f"{split} of {len(groups)} groups of learner.hpz_partition_size={size} ranks lie on several nodes: the second "
        f"copies of the weights save no traffic between nodes there. Results are the same."
    ]
