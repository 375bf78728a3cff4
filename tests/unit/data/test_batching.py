"""What is computed together: nothing lost, nothing twice, budget and balance kept."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_ray.data.batching import balanced_shares, minibatches, plan_ranks, token_budget_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=40)
RANKS = st.integers(1, 6)
BUDGET = st.integers(1, 120)
SEEDS = st.integers(0, 2**31 - 1)


def tokens(batch: tuple[int, ...], lengths: list[int]) -> int:
    return sum(lengths[i] for i in batch)


# --- micro-batches --------------------------------------------------------------------------------------------------


def test_micro_batches_by_hand() -> None:
    # longest first: 9 | 6 (6 + 5 > 10) | 5 + 2 + 1
    assert token_budget_batches(range(5), [5, 9, 1, 6, 2], budget=10) == [(1,), (3,), (0, 4, 2)]


def test_micro_batches_of_some_indices() -> None:
    assert token_budget_batches([4, 2], [5, 9, 1, 6, 2], budget=10) == [(4, 2)]


@given(LENGTHS, BUDGET)
def test_micro_batches_keep_the_budget(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(range(len(lengths)), lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)
    assert all(tokens(batch, lengths) <= budget or len(batch) == 1 for batch in batches)
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    # 8 to rank 0, 5 to rank 1, 4 to rank 1 (5 < 8), 3 to rank 0 (8 < 9); 8 + 3 fit 11, 5 + 4 do
    assert plan_ranks(range(4), [8, 5, 4, 3], ranks=2, budget=11) == [((0, 3),), ((1, 2),)]


def test_a_rank_with_fewer_micro_batches_splits_one() -> None:
    # rank 0 has 10; rank 1 has 4 + 4 | 4: out of samples, rank 0 gets an empty one
    assert plan_ranks(range(4), [10, 4, 4, 4], ranks=2, budget=9) == [((0,), ()), ((1, 2), (3,))]
    # rank 0 has 20 | 3; rank 1 has 12 + 8, which are taken apart
    assert plan_ranks(range(4), [20, 12, 8, 3], ranks=2, budget=20) == [((0,), (3,)), ((1,), (2,))]


@given(LENGTHS, RANKS, BUDGET)
def test_ranks_share_every_sample_once(lengths: list[int], ranks: int, budget: int) -> None:
    plans = plan_ranks(range(len(lengths)), lengths, ranks=ranks, budget=budget)
    assert len(plans) == ranks
    assert sorted(i for plan in plans for batch in plan for i in batch) == list(range(len(lengths)))
    assert all(tokens(batch, lengths) <= budget or len(batch) == 1 for plan in plans for batch in plan)


@given(LENGTHS, RANKS, BUDGET)
def test_ranks_have_equal_numbers_of_micro_batches(lengths: list[int], ranks: int, budget: int) -> None:
    plans = plan_ranks(range(len(lengths)), lengths, ranks=ranks, budget=budget)
    assert len({len(plan) for plan in plans}) == 1
    for plan in plans:
        if () in plan:  # a place-holder stands only where nothing is left to split
            assert max(map(len, plan)) <= 1


@given(LENGTHS.filter(bool), RANKS, BUDGET)
def test_ranks_are_balanced_within_the_longest_sample(lengths: list[int], ranks: int, budget: int) -> None:
    plans = plan_ranks(range(len(lengths)), lengths, ranks=ranks, budget=budget)
    loads = [sum(tokens(batch, lengths) for batch in plan) for plan in plans]
    assert max(loads) - min(loads) <= max(lengths)
    if len(lengths) >= ranks:
        assert min(loads) > 0


@given(LENGTHS, RANKS, BUDGET, st.randoms(use_true_random=False))
def test_ranks_do_not_depend_on_the_order_asked(lengths: list[int], ranks: int, budget: int, random) -> None:  # type: ignore[no-untyped-def]
    indices = list(range(len(lengths)))
    expected = plan_ranks(indices, lengths, ranks=ranks, budget=budget)
    random.shuffle(indices)
    assert plan_ranks(indices, lengths, ranks=ranks, budget=budget) == expected


@given(LENGTHS, RANKS, BUDGET)
def test_ranks_take_only_the_indices_asked(lengths: list[int], ranks: int, budget: int) -> None:
    indices = list(range(0, len(lengths), 2))
    plans = plan_ranks(indices, lengths, ranks=ranks, budget=budget)
    assert sorted(i for plan in plans for batch in plan for i in batch) == indices


# --- minibatches ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 8), SEEDS)
def test_minibatches_partition(count: int, parts: int, seed: int) -> None:
    batches = minibatches(count, parts=parts, seed=seed)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == min(parts, count)
    assert all(batches) and all(batch == sorted(batch) for batch in batches)
    sizes = [len(batch) for batch in batches]
    if count % parts == 0:
        assert set(sizes) <= {count // parts}
    assert len(set(sizes[:-1])) <= 1
    assert minibatches(count, parts=parts, seed=seed) == batches


def test_minibatches_differ_by_seed() -> None:
    drawn = {str(minibatches(16, parts=4, seed=seed)) for seed in range(20)}
    assert len(drawn) == 20


def test_minibatches_mix_samples_evenly() -> None:
    with_first = Counter(i for seed in range(2000) for b in minibatches(8, parts=2, seed=seed) if 0 in b for i in b)
    # beside sample 0, each of the other 7 has 3 places of 7: 2000 * 3 / 7 = 857, deviation sqrt(2000 * 12 / 49) = 22
    assert all(abs(with_first[i] - 857) < 5 * 22 for i in range(1, 8))


# --- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "parts", "expected"),
    [([], 2, [[], []]), ([3], 2, [[0], []]), ([1, 5, 4, 2], 2, [[0, 1], [2, 3]])],
)
def test_shares_by_hand(loads: list[int], parts: int, expected: list[list[int]]) -> None:
    assert balanced_shares(loads, parts) == expected


@given(LENGTHS, st.integers(1, 6))
def test_shares(loads: list[int], parts: int) -> None:
    shares = balanced_shares(loads, parts)
    assert len(shares) == parts
    assert sorted(i for share in shares for i in share) == list(range(len(loads)))
    assert all(share == sorted(share) for share in shares)
    totals = [sum(loads[i] for i in share) for share in shares]
    assert max(totals) - min(totals) <= max(loads, default=0)
