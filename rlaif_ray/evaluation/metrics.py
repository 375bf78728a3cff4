"""Means with 95% confidence intervals, and gains paired by prompt.

A value is None where it could not be measured (a judge that failed). Such values are left out and counted: failure to
judge is not a judgement. With fewer than two values left nothing is known of the spread, so the bounds are None; with
none left the mean is None too.

Values must be independent. The samples of one prompt are not: average them per prompt first (`cluster_means`), and the
interval is one over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where, at 95% confidence, the true one lies."""

    mean: float | None  # None when n is 0
    ci95_low: float | None  # None when n is below 2
    ci95_high: float | None
    n: int  # values (pairs) that entered
    dropped: int = 0  # values (pairs) left out because they, or one of the two, could not be measured

    def as_dict(self) -> dict[str, float | int | None]:
        """The fields by name, as they go into a report."""
        return asdict(self)


def mean_interval(values: Iterable[float | None]) -> Interval:
    """The mean, with Student's t interval: mean -+ t(0.975, n - 1) * s / sqrt(n), s over n - 1.

    Raises ValueError for a NaN or an infinity: what could not be measured is None.
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    given = list(values)
    kept = np.array([value for value in given if value is not None], dtype=np.float64)
    if not np.isfinite(kept).all():
        raise ValueError(f"values must be finite numbers, or None where there is none (got {kept[~np.isfinite(kept)]})")
    n, dropped = len(kept), len(given) - len(kept)
    if n == 0:
        return Interval(None, None, None, 0, dropped)
    mean = float(kept.mean())
    if n == 1:
        return Interval(mean, None, None, 1, dropped)
    half = float(t.ppf(0.975, n - 1) * kept.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, dropped)


def paired_gain(before: Sequence[float | None], after: Sequence[float | None]) -> Interval:
    """The interval of `after[i] - before[i]`; a pair with a None counts as dropped.

    Pairing takes out how much prompts differ from each other, which is most of the spread. Raises ValueError when the
    two differ in length.
    """
    pairs = zip(before, after, strict=True)
    return mean_interval(None if old is None or new is None else new - old for old, new in pairs)


def cluster_means(values: Sequence[float | None], groups: Sequence[Hashable]) -> dict[Hashable, float | None]:
    """The mean of each group's measured values, None where it has none; groups in the order they first appear.

    `groups[i]` is what `values[i]` belongs to, such as a prompt id. Raises ValueError when the two differ in length.
    """
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        of_group = members.setdefault(group, [])
        if value is not None:
            of_group.append(value)
    return {group: math.fsum(measured) / len(measured) if measured else None for group, measured in members.items()}
