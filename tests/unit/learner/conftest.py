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
