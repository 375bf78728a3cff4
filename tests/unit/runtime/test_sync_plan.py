"""Seconds of a push, by hand: 8B is 16.06 GB in bf16, 70B is 141.1 GB."""

from __future__ import annotations

import pytest

from rlaif_ray.runtime.sync_plan import routes

EIGHT, SEVENTY = 8_030_261_248 * 2, 70_553_706_496 * 2


def seconds(*args: object, **kwargs: object) -> dict[str, float]:
    return {route.by: round(route.seconds, 3) for route in routes(*args, **kwargs)}  # type: ignore[arg-type]


def test_8b_by_hand() -> None:
    one_node = [{"rollout": 2, "learner": 4, "judge": 1}]
    # Sent at 200 GB/s: 0.080 s; 3/4 of it gathered at the same rate, meanwhile: 0.060 s.
    assert seconds(EIGHT, "nccl", one_node, ranks=4, sharded=True) == {"nccl over NVLink": 0.08}
    # Within a GPU both are work of the same GPU: 7/8 at 200 GB/s, 0.070 s, then 0.054 s at 300.
    shared = [{"rollout": 8, "learner": 8}]
    assert seconds(EIGHT, "ipc", shared, ranks=8, sharded=True) == {"ipc": 0.124}
    assert seconds(EIGHT, "ipc", [{"rollout": 1, "learner": 1}], ranks=1, sharded=True) == {"ipc": 0.054}
    assert seconds(EIGHT, "ipc", shared, ranks=8, sharded=False) == {"ipc": 0.054}
    assert seconds(EIGHT, "ipc", shared, ranks=8, sharded=False, bandwidth=100.0) == {"ipc": 0.161}


def test_70b_by_hand() -> None:
    # 24 ranks on three nodes, an engine on a fourth. 141.1 GB: 3.528 s at 40 GB/s, 28.221 s at 5 GB/s. Gathered
    # meanwhile: two thirds into each node of 8 adapters, 0.294 s. By Ethernet that takes 18.8 s, and rank 0's node
    # passes on as much of it by the adapter that it sends the broadcast by: 47.036 s.
    nodes = [{"rollout": 1}, {"judge": 1}, *({"learner": 8} for _ in range(3))]
    found = routes(SEVENTY, "nccl", nodes, ranks=24, sharded=True)
    assert [(way.by, round(way.seconds, 3)) for way in found] == [("nccl over RDMA", 3.528), ("nccl over TCP", 47.036)]
    # Over RDMA each GPU takes 23/24 by NVLink, 0.676 s, which is longer than 2/3 by its node's adapters, 0.294 s.
    assert [round(way.gather_s, 3) for way in found] == [0.676, 18.814]
    # Each engine beside its ranks: 18.814 s by Ethernet before 0.470 s within the GPUs.
    shared = [{"rollout": 1, "learner": 8} for _ in range(3)]
    assert seconds(SEVENTY, "ipc", shared, ranks=24, sharded=True) == {
        "ipc, gathered over RDMA": 1.146,
        "ipc, gathered over TCP": 19.285,
    }


def test_gathering_can_be_what_takes_longest() -> None:
    """The engine is on rank 0's node: the other one takes no part in the broadcast, and its Ethernet none of it."""
    nodes = [{"learner": 1, "rollout": 1}, {"learner": 1}]
    for bandwidth, send_s in ((None, 0.04), (400.0, 0.02)):
        (rdma, tcp) = routes(8 * 10**9, "nccl", nodes, ranks=2, sharded=True, bandwidth=bandwidth)
        assert (rdma.by, tcp.by) == ("nccl over NVLink, gathered over RDMA", "nccl over NVLink, gathered over TCP")
        assert (rdma.gather_s, tcp.gather_s) == (pytest.approx(0.1), pytest.approx(0.8))
        assert (rdma.seconds, tcp.seconds) == (rdma.gather_s, tcp.gather_s) and rdma.send_s == pytest.approx(send_s)


def test_nodes_of_ranks_alone_receive_no_broadcast() -> None:
    """Nothing is gathered in stage 1, and rank 0's node has the only engine."""
    nodes = [{"learner": 4, "rollout": 1}, {"learner": 8}, {"learner": 4}]
    assert seconds(8 * 10**9, "nccl", nodes, ranks=16, sharded=False) == {"nccl over NVLink": 0.04}


def test_engines_on_nodes_of_ranks_share_their_ethernet() -> None:
    """8 GB, half of it gathered into each of two nodes, 0.8 s at 5 GB/s; and sent into the second one, 1.6 s."""
    nodes = [{"learner": 4, "rollout": 1}, {"learner": 4, "rollout": 1}]
    found = seconds(8 * 10**9, "nccl", nodes, ranks=8, sharded=True)
    assert found == {"nccl over RDMA": 0.2, "nccl over TCP": 2.4}
    assert seconds(8 * 10**9, "nccl", nodes, ranks=8, sharded=False) == {"nccl over RDMA": 0.2, "nccl over TCP": 1.6}


def test_a_link_that_is_known_is_one_line() -> None:
    nodes = [{"rollout": 1}, {"learner": 4}, {"learner": 4}]
    (known,) = routes(8 * 10**9, "nccl", nodes, ranks=8, sharded=True, bandwidth=10.0)
    assert known.by == "nccl over the network" and known.gb_per_s == 10.0
    assert (known.gather_s, known.send_s) == (pytest.approx(0.4), pytest.approx(0.8))
    assert known.seconds == pytest.approx(1.2)


def test_on_a_cpu() -> None:
    assert seconds(6 * 10**8, "shm", [{"learner": 2, "rollout": 1}], ranks=2, sharded=True) == {"shm": 1.0}
