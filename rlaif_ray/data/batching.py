"""Which samples are computed together: pure arithmetic on lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

MicroBatch = tuple[int, ...]  # indices of samples
RankPlan = tuple[MicroBatch, ...]  # what one rank computes, one micro-batch after the other; () is a place-holder


def token_budget_batches(
    indices: Sequence[int], lengths: Sequence[int], budget: int, apart: Sequence[bool] | None = None
) -> list[MicroBatch]:
    """Neighbours in length, longest first, as many as fit `budget` tokens; a sample above it stands alone.

    `apart`: for each sample, whether it is of those that may not share a micro-batch with the others.
    """
    batches: list[MicroBatch] = []
    current: list[int] = []
    used = 0
    sides = apart or [False] * len(lengths)
    for i in sorted(indices, key=lambda i: (not sides[i], -lengths[i], i)):
        if current and (used + lengths[i] > budget or sides[i] != sides[current[0]]):
            batches.append(tuple(current))
            current, used = [], 0
        current.append(i)
        used += lengths[i]
    if current:
        batches.append(tuple(current))
    return batches


def plan_ranks(
    indices: Sequence[int],
    lengths: Sequence[int],
    *,
    ranks: int,
    budget: int,
    apart: Sequence[bool] | None = None,
) -> list[RankPlan]:
    """Splits samples over ranks, balanced by tokens, each rank with the same number of micro-batches.

    `apart`: as above.

    Equal numbers matter: under ZeRO each forward and backward is a collective, and a rank with one fewer would leave
    the others waiting. Ranks with fewer split a micro-batch, or, out of samples, get an empty one.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        lightest = min(range(ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[lightest].append(i)
        loads[lightest] += lengths[i]
    plans = [token_budget_batches(share, lengths, budget, apart) for share in shares]
    count = max(len(plan) for plan in plans)
    for plan in plans:
        while len(plan) < count:
            largest = max(range(len(plan)), key=lambda b: len(plan[b]), default=None)
            if largest is None or len(plan[largest]) < 2:
                plan.append(())
                continue
            batch = plan.pop(largest)
            half = len(batch) // 2
            plan[largest:largest] = [batch[:half], batch[half:]]
    return [tuple(plan) for plan in plans]


def plans_of_ranks(plans: Sequence[RankPlan], together: int) -> list[RankPlan]:
    """The plan of every rank, where each of `plans` is that of a group of so many neighbours."""
    return [plan for plan in plans for _ in range(together)]


def minibatches(count: int, *, parts: int, seed: int) -> list[list[int]]:
    """A seeded permutation of `count` samples cut into `parts` of equal size (the last takes what does not divide)."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    size = max(1, count // parts)
    cuts = [k * size for k in range(min(parts, count))] + [count]
    return [sorted(order[a:b]) for a, b in pairwise(cuts)]


def balanced_shares(loads: Sequence[int], parts: int) -> list[list[int]]:
    """Indices split into `parts` lists of about equal load, each in ascending order; parts may stay empty."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for i in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        lightest = min(range(parts), key=lambda p: (totals[p], p))
        shares[lightest].append(i)
        totals[lightest] += loads[i]
    return [sorted(share) for share in shares]
