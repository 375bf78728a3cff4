"""Learner processes for all tests of this folder: most of what they cost is importing torch and DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.learner_ranks import RankProcesses


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankProcesses]:
    ranks = RankProcesses(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Packed attention in this process, on one thread: for models this small a second one only waits."""
    import torch

    from rlaif_ray.learner.packing import register_packed_attention

    register_packed_attention()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
