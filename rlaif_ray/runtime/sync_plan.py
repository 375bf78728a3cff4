"""How long a push of the weights takes, by what the links between the actors carry; pure.

Assumed, in GB/s (10^9 bytes) that arrive: what is commonly reached, not what is printed on the box. Nothing of it was
measured by this project but shared memory.

    NVLink        200    into one GPU from others of its node (H100, H200: 450 a direction)
    RDMA           40    into one GPU from another node: an adapter of 400 Gbit/s for each, four fifths of it used
    TCP             5    into a whole node: Ethernet of 100 Gbit/s, of which NCCL's sockets use two fifths
    GPU memory    300    from the learner's copy of a bucket into the engine's weights, with vLLM's loading
    host memory     0.6  the same by shared memory on a CPU, as tests/benchmarks measured it on two cores

Two things happen to every byte. ZeRO-3 ranks gather it: each node receives the part of the weights that it doesn't
have, and each GPU the part that it doesn't have. Then it is sent: by NCCL from the GPU of rank 0 to all workers of all
engines, in a pipeline that passes it on, so that their number doesn't matter; by IPC and shared memory within a GPU or
node. The next bucket is gathered while one is sent, so that the slower of the two counts. They add up where both use
the same: a GPU that does both, and Ethernet, when ranks and engines are on several nodes. Rank 0's node then passes on
what is gathered and sends the broadcast by its one adapter, and a node of ranks and engines receives both.
Left out: the first bucket, which nothing hides, start and end of an update in the engines (tenths of a second), and
the driver (1 ms for each of some five calls an engine).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlaif_ray.runtime.weight_sync import Backend

NVLINK, RDMA, TCP = 200.0, 40.0, 5.0
WITHIN = {"ipc": 300.0, "shm": 0.6}


@dataclass(frozen=True, slots=True)
class Route:
    """One push by one kind of link."""

    by: str
    gb_per_s: float  # of the sending, 10^9 bytes
    gather_s: float
    send_s: float
    seconds: float


def routes(
    size: int,
    backend: Backend,
    nodes: Sequence[Mapping[str, int]],
    *,
    ranks: int,
    sharded: bool,
    bandwidth: float | None = None,
) -> list[Route]:
    """By which links a push of `size` bytes can go, and how long it takes: over several nodes by RDMA and by TCP.

    Args:
        nodes: bundles by role, node by node (fit.py).
        ranks: of the learner.
        sharded: by ZeRO-3; otherwise every rank has all weights.
        bandwidth: GB/s of the sending, in place of what is assumed. By NCCL over several nodes it is that of a node's
            network, whichever it is, by which the weights are gathered as well.
    """
    learner = [node.get("learner", 0) for node in nodes if node.get("learner", 0)]
    sharded = sharded and ranks > 1 and backend != "shm"
    gathers_across = sharded and len(learner) > 1
    sends_across = backend == "nccl" and _receives_elsewhere(nodes)
    links: tuple[str, ...] = ("RDMA", "TCP") if gathers_across or sends_across else ("",)
    if bandwidth is not None and sends_across:
        links = ("the network",)
    found = []
    for link in links:
        between = {"": NVLINK, "RDMA": RDMA, "TCP": TCP}.get(link, bandwidth or 0.0)
        gather_s = _gather_s(size, learner, between, by_gpu=link == "RDMA") if sharded else 0.0
        if backend == "nccl":
            by = f"nccl over {link if sends_across else 'NVLink'}"
            by += f", gathered over {link}" if gathers_across and not sends_across else ""
            rate = bandwidth or (between if sends_across else NVLINK)
        else:
            by = f"{backend}, gathered over {link}" if link else backend
            rate = bandwidth or WITHIN[backend]
        send_s = size / (rate * 1e9)
        same_link = gathers_across and sends_across and link != "RDMA"
        total = gather_s + send_s if same_link or backend != "nccl" else max(gather_s, send_s)
        found.append(Route(by, rate, gather_s, send_s, total))
    return found


def _receives_elsewhere(nodes: Sequence[Mapping[str, int]]) -> bool:
    """Whether an engine is on another node than rank 0, which is on the first that has any rank."""
    first = next((k for k, node in enumerate(nodes) if node.get("learner", 0)), None)
    return any(node.get("rollout", 0) and k != first for k, node in enumerate(nodes))


def _gather_s(size: int, learner: Sequence[int], between: float, *, by_gpu: bool) -> float:
    """Until every rank has all of the weights, of which each held the same share.

    Args:
        learner: ranks by node.
        between: GB/s between nodes, of each node or `by_gpu`.
    """
    ranks = sum(learner)
    within = (ranks - 1) / ranks * size / (NVLINK * 1e9)
    if len(learner) < 2:
        return within
    slowest = max((ranks - own) / ranks / (between * own if by_gpu else between) for own in learner)
    return max(within, slowest * size / 1e9)
